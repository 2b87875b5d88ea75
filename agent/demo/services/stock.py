"""The stock: one thread per connection. Asks ``warehouse``, and forwards no header at all.

Nothing has to be forwarded here: the thread that makes the call is the one that serves the request.

Environment: LISTEN and WAREHOUSE, each host:port.
"""

import http.client
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes

    def do_GET(self):
        article = self.path.partition("?")[0].removeprefix("/stock/")
        time.sleep(0.003)  # looks up the rack
        warehouse = http.client.HTTPConnection(os.environ["WAREHOUSE"], timeout=10)
        try:
            warehouse.request("GET", f"/rack/{article}")
            count = json.load(warehouse.getresponse())["count"]
        finally:
            warehouse.close()
        time.sleep(0.002)  # takes off what is reserved
        body = json.dumps({"left": count - 2}).encode() + b"\n"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


host, port = os.environ["LISTEN"].rsplit(":", 1)
ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
