"""The customers: sends the requests of a JSON list on standard input, a few at a time, over kept-open connections.

In: ``[{"address": "host:port", "target": "/path", "headers": {}}, ...]``. Out: the list of the statuses, in order; null
where there was no answer.
"""

import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import local

CONCURRENCY = 3
connections = local()


def send(request):
    address = request["address"]
    kept = connections.__dict__
    connection = kept.get(address)
    if connection is None:
        connection = kept[address] = http.client.HTTPConnection(address, timeout=15)
    try:
        connection.request("GET", request["target"], headers=request["headers"])
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException) as error:
        print(f"{request['target']}: {error!r}", file=sys.stderr)
        connection.close()
        return None


with ThreadPoolExecutor(CONCURRENCY) as pool:
    json.dump(list(pool.map(send, json.load(sys.stdin))), sys.stdout)
