"""A raw ASGI application: ``/status/N`` answers N, anything else 404. Run with ``uvicorn asgi_app:app``."""


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    path = scope["path"]
    status = int(path.rpartition("/")[2]) if path.startswith("/status/") else 404
    body = b"" if status in (204, 304) else b"as asked\n"
    headers = [] if status in (204, 304) else [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
