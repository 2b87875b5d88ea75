"""The price list where Node.js is not installed; the same as price.mjs.

Environment: LISTEN, host:port.
"""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes

    def do_GET(self):
        fails = self.path.partition("?")[0] == "/price/gold"
        time.sleep(0.006 if fails else 0.012)
        body = json.dumps({"error": "no price for gold today"} if fails else {"price": 1.9}).encode() + b"\n"
        self.send_response(500 if fails else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


host, port = os.environ["LISTEN"].rsplit(":", 1)
ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
