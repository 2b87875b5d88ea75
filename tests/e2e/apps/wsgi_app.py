"""A WSGI application: ``/status/N`` answers N, anything else 404. Run with ``gunicorn wsgi_app:app``."""

from http import HTTPStatus


def app(environ, start_response):
    path = environ["PATH_INFO"]
    status = int(path.rpartition("/")[2]) if path.startswith("/status/") else 404
    body = b"" if status in (204, 304) else b"as asked\n"
    start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Length", str(len(body)))] if body else [])
    return [body]
