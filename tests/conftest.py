"""Options and environment of the whole test suite."""

from __future__ import annotations

import os

# Tests run gRPC servers in this process and start programs from it: no fork handlers of gRPC in between.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Errors are asserted on; gRPC's own log lines about ends of connections are noise.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
