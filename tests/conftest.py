"""Options and environment of the whole test suite."""

from __future__ import annotations

import os

import pytest

# Tests run gRPC servers in this process and start programs from it: no fork handlers of gRPC in between.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Errors are asserted on; gRPC's own log lines about ends of connections are noise.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Needs programs that take minutes to build: `make real`.
collect_ignore = [] if os.environ.get("SPANLOOM_REAL") else ["real"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", action="store_true", help="rewrite the expected outputs instead of comparing with them"
    )


@pytest.fixture
def rewrites_golden(request: pytest.FixtureRequest) -> bool:
    """Whether expected outputs are rewritten. The option is unknown when only a directory above was named."""
    return bool(request.config.getoption("--golden", default=False))
