"""Real servers with a minimal configuration of their own, each in a directory of the test.

In: a port and a directory that other users may read (workers of nginx and Apache are not root). Out: the command line
that runs the server in the foreground, what its spans say about it, and, where it keeps one, its own log. Each answers
``/status/N`` with status N (200, 204, 404, 500) to a GET.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.harness import clean_environment

APPS = Path(__file__).with_name("apps")
CACHE = Path(os.environ.get("SPANLOOM_CACHE") or Path.home() / ".cache" / "spanloom")
"""What takes long to make or to fetch is kept here, by what it is made of."""
STATUSES = (200, 204, 404, 500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How to run a server, and what is expected of its spans.

    ``language`` is empty where none is known. ``keeps_environment`` is False for a server that overwrites its
    environment in memory, which is what ``/proc/<pid>/environ`` shows: it cannot name its service in this way.
    """

    arguments: Sequence[str | Path]
    executable: str
    language: str
    keeps_environment: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    cwd: Path = APPS


def nginx(
    port: int,
    directory: Path,
    extra: str = "",
    workers: int = 1,
    main: str = "",
    root: Path | None = None,
    http: str = "",
) -> Server:
    """nginx; further directives are ``extra`` in the server block, ``http`` around it and ``main`` outside of both.

    The access log ``directory/nginx-PORT.log`` has one line per request: status, seconds that it took, Unix time of
    its end, target.
    """
    prefix = directory / f"nginx-{port}"
    prefix.mkdir()
    config = prefix / "nginx.conf"
    returns = "\n".join(
        f'    location = /status/{status} {{ return {status} "{"" if status == 204 else "as asked"}"; }}'
        for status in STATUSES
    )
    config.write_text(
        f"""
daemon off;
worker_processes {workers};
pid {prefix}/pid;
error_log {prefix}/error.log warn;
{main}
events {{ worker_connections 1024; }}
http {{
  log_format account '$status $request_time $msec $request_uri';
  access_log {directory}/nginx-{port}.log account;
  client_body_temp_path {prefix}/body;
  proxy_temp_path {prefix}/proxy;
  fastcgi_temp_path {prefix}/fastcgi;
  uwsgi_temp_path {prefix}/uwsgi;
  scgi_temp_path {prefix}/scgi;
  sendfile on;
  keepalive_requests 1000000;
{http}
  server {{
    listen 127.0.0.1:{port} backlog=512;
    root {root or prefix};
{returns}
{extra}
  }}
}}
"""
    )
    nginx_path = shutil.which("nginx") or "/usr/sbin/nginx"
    arguments = [nginx_path, "-e", prefix / "error.log", "-p", prefix, "-c", config]
    # Its process title ("nginx: worker process") takes the place of the arguments and of the environment.
    return Server(arguments=arguments, executable="nginx", language="", keeps_environment=False)


def apache(port: int, directory: Path, model: str = "event", modules: Sequence[str] = (), extra: str = "") -> Server:
    """Apache httpd with the multi-processing module ``model``, event or prefork; further directives are ``extra``, and
    the modules that they need ``modules``. It serves the files of ``directory/apache-PORT/root``.
    """
    prefix = directory / f"apache-{port}"
    root = prefix / "root"
    (root / "status").mkdir(parents=True)
    (root / "status" / "200").write_text("as asked\n")
    names = (f"mpm_{model}", "authz_core", "alias", "dir", *modules)
    loaded = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in names)
    config = prefix / "apache.conf"
    config.write_text(
        f"""
{loaded}
ServerRoot {prefix}
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {prefix}/pid
DefaultRuntimeDir {prefix}
ErrorLog {prefix}/error.log
User nobody
Group nogroup
DocumentRoot {root}
StartServers 2
KeepAlive On
Redirect 204 /status/204
Redirect 500 /status/500
<Directory {root}>
  Require all granted
</Directory>
{extra}
"""
    )
    apache_path = shutil.which("apache2") or "/usr/sbin/apache2"
    return Server(arguments=[apache_path, "-f", config, "-DFOREGROUND"], executable="apache2", language="")


def python_threads(port: int, directory: Path) -> Server:
    """Python's ThreadingHTTPServer, HTTP/1.1 with keep-alive; its account is ``directory/python-PORT.json``."""
    account = directory / f"python-{port}.json"
    return Server(
        arguments=[sys.executable, APPS / "python_threads.py", str(port), account],
        executable=Path(sys.executable).resolve().name,
        language="python",
    )


def python_plain(port: int, directory: Path) -> Server:
    """``python -m http.server``, unchanged: HTTP/1.0, a file server (200 and 404 only)."""
    root = directory / f"root-{port}" / "status"
    root.mkdir(parents=True)
    (root / "200").write_text("as asked\n")
    return Server(
        arguments=[sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", root.parent],
        executable=Path(sys.executable).resolve().name,
        language="python",
    )


def uvicorn(port: int, directory: Path) -> Server:
    """uvicorn with asyncio and h11."""
    arguments = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--loop", "asyncio", "--log-level", "warning", "asgi_app:app"]
    return Server(arguments=arguments, executable=Path(sys.executable).resolve().name, language="python")


def gunicorn(port: int, directory: Path) -> Server:
    """gunicorn with two forked synchronous workers."""
    arguments = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2"]
    arguments += ["--worker-class", "sync", "--log-level", "warning", "--no-control-socket", "wsgi_app:app"]
    return Server(arguments=arguments, executable=Path(sys.executable).resolve().name, language="python")


def node(port: int, directory: Path) -> Server:
    return Server(arguments=["node", APPS / "node_server.mjs", str(port)], executable="node", language="nodejs")


def java(port: int, directory: Path) -> Server:
    """The JDK's own HttpServer, run from its source."""
    arguments = ["java", "-XX:TieredStopAtLevel=1", "-Xshare:auto", APPS / "JavaServer.java", str(port)]
    return Server(arguments=arguments, executable="java", language="java")


def go(port: int, directory: Path) -> Server:
    """Go's net/http."""
    return Server(arguments=[go_program(directory), "serve", str(port)], executable="go_http", language="go")


def python_between(mode: str, behaviour: str, port: int, next_port: int, directory: Path) -> Server:
    """A tier of ``apps/tier.py`` that asks the next one for the same path. The likes of it follow."""
    arguments = [sys.executable, APPS / "tier.py", mode, behaviour, str(port), str(next_port)]
    return Server(arguments=arguments, executable=Path(sys.executable).resolve().name, language="python")


def nginx_between(port: int, next_port: int, directory: Path) -> Server:
    """A reverse proxy that keeps connections to what is behind it; it passes on all headers."""
    upstream = f"upstream behind {{ server 127.0.0.1:{next_port}; keepalive 32; }}"
    location = f"""
    location /r/ {{
      proxy_pass http://behind;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host 127.0.0.1:{next_port};
    }}"""
    return nginx(port, directory, location, http=upstream)


def node_between(port: int, next_port: int, directory: Path) -> Server:
    arguments = ["node", APPS / "node_tier.mjs", str(port), str(next_port)]
    return Server(arguments=arguments, executable="node", language="nodejs")


def java_between(threads: str, client: str, port: int, next_port: int, directory: Path) -> Server:
    """``threads``: pool or virtual, which needs JDK 21; ``client``: blocking or selecting."""
    java = "java" if threads == "pool" else NEWER_JAVA
    arguments = [java, "-XX:TieredStopAtLevel=1", "-Xshare:auto", APPS / "JavaTier.java", str(port), str(next_port)]
    return Server(arguments=[*arguments, threads, client], executable="java", language="java")


def go_between(port: int, next_port: int, directory: Path) -> Server:
    arguments = [go_program(directory), "between", str(port), str(next_port)]
    return Server(arguments=arguments, executable="go_http", language="go")


def go_program(directory: Path) -> Path:
    """The built Go program."""
    return go_build(APPS / "go_http", directory / "go_http")


def go_build(source: Path, program: Path, *, ldflags: str = "", mode: str = "exe") -> Path:
    """Build a Go program. The toolchain's cache makes every build but the first quick; no network is used."""
    built = subprocess.run(
        ["go", "build", f"-buildmode={mode}", f"-ldflags={ldflags}", "-o", program, "."],
        cwd=source,
        env=clean_environment(GOFLAGS="-mod=mod", GOTOOLCHAIN="local", GOPROXY="off", CGO_ENABLED="0"),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert built.returncode == 0, built.stderr
    return program


def rust_program() -> Path:
    """The built Rust program, from the cache, since building it takes a minute."""
    source = APPS / "rust_tls"
    made_of = hashlib.sha256()
    for name in ("Cargo.toml", "Cargo.lock", "src/main.rs"):
        made_of.update((source / name).read_bytes())
    made_of.update(subprocess.run(["rustc", "-vV"], capture_output=True, check=True).stdout)
    kept = CACHE / f"rust-{made_of.hexdigest()[:16]}" / "rust_tls"
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix="spanloom-rust-") as target:
            command = ["cargo", "build", "-q", "--release", "--locked", "--target-dir", target]
            built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=400)
            assert built.returncode == 0, built.stderr
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = shutil.copy(Path(target, "release", "rust_tls"), kept.with_suffix(".partial"))
            Path(partial).replace(kept)
    return kept


def _has_rust() -> bool:
    """Whether there is a toolchain that can build the program: Rust 1.85, of February 2025."""
    if shutil.which("cargo") is None:
        return False
    said = subprocess.run(["cargo", "--version"], capture_output=True, text=True, timeout=60).stdout
    version = re.match(r"cargo (\d+)\.(\d+)", said)
    return version is not None and (int(version[1]), int(version[2])) >= (1, 85)


HAS_RUST = _has_rust()
"""Like Go: what is written in it is traced where there is a toolchain."""


def _newer_java() -> str | None:
    """A JDK that knows virtual threads."""
    for java in (shutil.which("java"), *sorted(Path("/usr/lib/jvm").glob("*/bin/java"))):
        if java is not None:
            said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60).stderr
            version = re.search(r'version "(\d+)', said)
            if version is not None and int(version[1]) >= 21:
                return str(java)
    return None


NEWER_JAVA = _newer_java()
"""Virtual threads are tested where a JDK has them."""

HAS_GO = shutil.which("go") is not None
"""Go is traced where there is a toolchain; everything else is installed by the set-up."""

SERVERS: dict[str, Callable[[int, Path], Server]] = {
    "nginx": nginx,
    "apache-event": apache,
    "apache-prefork": lambda port, directory: apache(port, directory, "prefork"),
    "python-threads": python_threads,
    "uvicorn": uvicorn,
    "gunicorn": gunicorn,
    "node": node,
    "java": java,
    **({"go": go} if HAS_GO else {}),
}
