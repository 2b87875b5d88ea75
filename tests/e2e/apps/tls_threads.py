"""Python's ssl, blocking, behind ``python_threads.py``'s handler: ``python tls_threads.py PORT CERTIFICATE [NEXT]``.

With NEXT, a port, each request is passed on to the server there, over TLS and with the headers of the request when its
path begins with ``/copied/``, without them otherwise.
"""

import http.client
import ssl
import sys

from python_threads import Handler, Server

port, certificate = int(sys.argv[1]), sys.argv[2]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate)
client_context = ssl.create_default_context(cafile=certificate)


class Relay(Handler):
    def do_GET(self):
        headers = {"traceparent": self.headers["traceparent"]} if self.path.startswith("/copied/") else {}
        onward = http.client.HTTPSConnection("localhost", int(sys.argv[3]), context=client_context)
        onward.request("GET", self.path, headers=headers)
        response = onward.getresponse()
        body = response.read()
        onward.close()
        self.answer(response.status, body)


class TlsServer(Server):
    def finish_request(self, request, client_address):
        with context.wrap_socket(request, server_side=True) as secured:
            self.RequestHandlerClass(secured, client_address, self)

    def handle_error(self, request, client_address):
        pass  # a connection that was only tried


TlsServer(("127.0.0.1", port), Relay if len(sys.argv) > 3 else Handler).serve_forever()
