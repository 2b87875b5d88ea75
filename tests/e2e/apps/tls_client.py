"""Python's ssl, blocking: ``python tls_client.py PORT CERTIFICATE COUNT`` makes COUNT requests on one connection.

With a word behind that it waits for a line of input then, and does it again.
"""

import http.client
import ssl
import sys

port, certificate, count, *again = sys.argv[1:]
context = ssl.create_default_context(cafile=certificate)


def ask(name):
    connection = http.client.HTTPSConnection("localhost", int(port), context=context)
    for number in range(int(count)):
        connection.request("GET", f"/status/200?id={name}{number}")
        response = connection.getresponse()
        response.read()
        print(response.status, flush=True)
    connection.close()


ask("")
if again:
    sys.stdin.readline()
    ask("again-")
