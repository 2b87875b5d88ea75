"""Python's clients: ``python_client.py urllib|http.client|aiohttp|httpx URL...`` prints the status of each."""

import asyncio
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request


def with_urllib(urls):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for url in urls:
        try:
            with opener.open(url) as response:
                response.read()
                yield response.status
        except urllib.error.HTTPError as error:
            error.read()
            yield error.code


def with_http_client(urls):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(urls[0]).netloc)
    for url in urls:
        connection.request("GET", urllib.parse.urlsplit(url)._replace(scheme="", netloc="").geturl())
        response = connection.getresponse()
        response.read()
        yield response.status
    connection.close()


def with_aiohttp(urls):
    import aiohttp

    async def fetch_all():
        async with aiohttp.ClientSession() as session:
            statuses = []
            for url in urls:
                async with session.get(url) as response:
                    await response.read()
                    statuses.append(response.status)
            return statuses

    return asyncio.run(fetch_all())


def with_httpx(urls):
    import httpx

    with httpx.Client(trust_env=False) as client:
        return [client.get(url).status_code for url in urls]


CLIENTS = {"urllib": with_urllib, "http.client": with_http_client, "aiohttp": with_aiohttp, "httpx": with_httpx}

if __name__ == "__main__":
    for status in CLIENTS[sys.argv[1]](sys.argv[2:]):
        print(status)
