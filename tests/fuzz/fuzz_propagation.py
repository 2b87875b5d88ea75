"""Fuzz target of trace-context extraction: ``python tests/fuzz/fuzz_propagation.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is a block of header lines, ``name:value``, separated by line feeds; a repeated name makes a list. Out:
an AssertionError or any other exception is a finding. The checks need no atheris, so the unit tests replay the corpus
and their own inputs through them.
"""

from __future__ import annotations

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
    from agent.model import TraceContext
    from agent.propagation import FORMATS, HEADER_NAMES, Extractor

EXTRACTORS = (Extractor(FORMATS), Extractor(FORMATS[::-1]), *(Extractor([name]) for name in FORMATS))


def parse(data: bytes) -> dict[bytes, bytes | list[bytes]]:
    """Turn an input into the mapping that the protocol parser passes; lines of other headers are left out."""
    headers: dict[bytes, bytes | list[bytes]] = {}
    for line in data.split(b"\n"):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name not in HEADER_NAMES:
            continue
        known = headers.get(name)
        if known is None:
            headers[name] = value
        elif isinstance(known, list):
            known.append(value)
        else:
            headers[name] = [known, value]
    return headers


def check(headers: dict[bytes, bytes | list[bytes]]) -> None:
    """Extract in several configurations and assert what holds for every input."""
    for extractor in EXTRACTORS:
        before = dict(extractor.malformed)
        subset = {name: value for name, value in headers.items() if name in extractor.header_names}
        context, others = extractor.extract(subset)
        grown = {name: count - before[name] for name, count in extractor.malformed.items()}
        assert extractor.malformed.keys() == before.keys()
        assert all(0 <= count <= len(subset) for count in grown.values()), grown
        assert context is not None or others == (), "another context without a first one"
        formats = [each.format for each in (context, *others) if each is not None]
        assert len(set(formats)) == len(formats), formats
        assert set(formats) <= extractor.malformed.keys(), formats
        for each in (context, *others):
            if each is not None:
                check_context(each)
        assert all((other.trace_id, other.span_id) != (context.trace_id, context.span_id) for other in others), (
            "no disagreement"
        )
        assert (context, others) == extractor.extract(subset), "a second reading differs"


def check_context(context: TraceContext) -> None:
    """Assert what the model promises of a single context."""
    assert type(context.trace_id) is bytes
    assert len(context.trace_id) == 16
    assert any(context.trace_id)
    if context.span_id is None:
        assert context.format == "xray"
    else:
        assert type(context.span_id) is bytes
        assert len(context.span_id) == 8
        assert any(context.span_id)
    assert context.sampled is None or type(context.sampled) is bool
    assert type(context.trace_state) is str
    assert context.trace_state == "" or context.format == "tracecontext"
    members = [member.strip(" \t") for member in context.trace_state.split(",")]
    keys = [member.split("=")[0] for member in members if member]
    assert len(set(keys)) == len(keys) <= 32, keys
    assert all(member.count("=") == 1 for member in members if member), members
    assert all(" " <= character <= "~" or character == "\t" for character in context.trace_state)


def test_one_input(data: bytes) -> None:
    """The entry point for atheris."""
    check(parse(data))


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
