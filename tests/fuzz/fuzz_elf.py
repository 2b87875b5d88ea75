"""Fuzz target of what processes say of themselves: ``python tests/fuzz/fuzz_elf.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is an executable's bytes, also those of a Go program, and at once the value of OTEL_RESOURCE_ATTRIBUTES
and the text of a cgroup file. Out: any exception, a broken bound or an answer of an unknown kind is a finding. The
checks need no atheris.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

# Run as a script, only this directory is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["agent"]) if atheris else nullcontext():
    from agent.elf import function_offsets, functions_with
    from agent.go_binary import GoUnseenError, crypto_tls_calls
    from agent.process import language_of_elf, parse_resource_attributes, systemd_unit

READS_MAX = 2000
GO_READS_MAX = 100_000
BYTES_MAX = 1 << 20


def check_elf(data: bytes) -> str:
    """Return the language; reads are bounded in number and in size, wherever the headers point."""
    reads = total = 0

    def read_at(offset: int, count: int) -> bytes:
        nonlocal reads, total
        assert 0 <= offset <= 2**63, "pread refuses such an offset"
        assert 0 <= count <= BYTES_MAX
        reads += 1
        total += count
        return data[offset : offset + count]

    offsets = function_offsets(read_at, ("SSL_read", "SSL_write"))
    assert offsets.keys() <= {"SSL_read", "SSL_write"}
    assert all(0 <= offset < 2**64 for offset in offsets.values())
    found = functions_with(read_at, b"SSL", re.compile(rb"\w*SSL\w*"))
    assert all(0 <= offset < 2**64 for offset in found)
    language = language_of_elf(read_at)
    assert language in ("", "go", "rust")
    assert reads <= READS_MAX
    assert total <= 64 * BYTES_MAX
    return language


def check_go(data: bytes) -> str:
    """Return why Go's TLS is not seen, or an empty string; offsets are within the file, and reads are bounded."""
    reads = 0

    def read_at(offset: int, count: int) -> bytes:
        nonlocal reads
        assert 0 <= offset <= 2**63, "pread refuses such an offset"
        assert 0 <= count <= BYTES_MAX
        reads += 1
        return data[offset : offset + count]

    try:
        calls = crypto_tls_calls(read_at)
    except GoUnseenError as error:
        reason = error.reason
        calls = ()
    else:
        reason = ""
    assert reads <= GO_READS_MAX
    assert reason in ("", "go_old", "go_no_tls", "go_layout", "go_code")
    for call in calls:
        assert 0 <= call.entry <= len(data)
        assert call.returns
        assert all(0 <= offset < len(data) for offset in call.returns)
    return reason


def check_attributes(text: str) -> None:
    pairs = parse_resource_attributes(text)
    assert len(pairs) <= 64
    for key, value in pairs.items():
        assert 0 < len(key) <= 255
        assert len(value) <= 1024
        (key + value).encode()  # no lone surrogates


def check(data: bytes) -> None:
    """The entry point for atheris."""
    check_elf(data)
    check_go(data)
    check_attributes(data.decode("utf-8", "replace"))
    check_attributes(data.decode("latin-1"))
    unit = systemd_unit(data)
    assert "/" not in unit
    unit.encode()


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
