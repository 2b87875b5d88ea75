"""The protocols, one module each, in the order in which they are asked about a record."""

from __future__ import annotations

from agent.protocols.http1 import Http1
from agent.protocols.http2 import Http2

PROTOCOLS = (Http1, Http2)
