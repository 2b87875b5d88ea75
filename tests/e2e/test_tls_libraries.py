"""Libraries of the interface of OpenSSL, each as server and as client of a program that was built without any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.harness import free_port, wait_until
from tests.e2e.servers import CACHE, Server
from tests.e2e.test_tls import assert_agreed, assert_pairs, nginx, wait_for_libraries
from tests.e2e.tls_any import ClientFactory

MACHINE = f"{os.uname().machine}-linux-gnu"
LIBRARIES = {
    "openssl-3": Path("/usr/lib") / MACHINE / "libssl.so.3",
    "openssl-1.1": CACHE / "openssl-1.1" / "usr/lib" / MACHINE / "libssl.so.1.1",
    "boringssl": Path("/usr/lib") / MACHINE / "android/libssl.so.0",
}
"""``tools/setup.sh test`` gets them."""


@pytest.mark.parametrize("name", LIBRARIES)
def test_both_ends_run_it(name: str, tls_agent, serve, tls_any: Path, tls_client: ClientFactory, pem: Path):
    """Every request is seen from both ends, and their spans belong together."""
    library, port = LIBRARIES[name], free_port()
    tracing = tls_agent([port])
    environment = {"LD_LIBRARY_PATH": str(library.parent)}
    arguments = [tls_any, library, str(port), pem]
    serve(Server(arguments=arguments, executable="tls_any", language="", environment=environment), port)
    client = tls_client(library, port)
    client.ask("/early?id=0")
    wait_until(lambda: f'"library":"{library.name}"' in tracing.stderr(), lambda: f"it is watched{tracing.state()}")
    tracing.settle()
    earlier = len(tracing.spans(port))
    client.ask(*(f"/later?id={number}" for number in range(10)))
    spans = tracing.exact_spans(earlier + 20, port=port)[earlier:]
    assert_pairs(spans, 10)
    assert_agreed(spans, "1.3")
    for span in spans:
        assert span.attributes.get("url.scheme", "https") == "https"
        assert span.attributes["server.address"] == "localhost"
        assert span.resource["process.executable.name"] == "tls_any"
    assert tracing.metrics()["spanloom_kernel_events_total{event=tls_contradicted}"] == 0


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_other_end_is_nginx(
    name: str, version: str, tls_agent, serve, tls_client: ClientFactory, public_path: Path, pem: Path
):
    """Whose library is this machine's, by either version of TLS."""
    library, port = LIBRARIES[name], free_port()
    tracing = tls_agent([port])
    serve(nginx(port, public_path, pem, extra="location / { return 200 hello; }", version=version), port)
    wait_for_libraries(tracing)
    client = tls_client(library, port)
    client.ask("/early?id=0")
    wait_until(lambda: f'"library":"{library.name}"' in tracing.stderr(), lambda: f"it is watched{tracing.state()}")
    tracing.settle()
    earlier = len(tracing.spans(port))
    client.ask(*(f"/later?id={number}" for number in range(10)))
    spans = tracing.exact_spans(earlier + 20, port=port)[earlier:]
    assert_pairs(spans, 10)
    assert_agreed(spans, version.removeprefix("TLSv"))
