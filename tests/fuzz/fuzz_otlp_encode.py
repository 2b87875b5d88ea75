"""Fuzz target of the OTLP encoder: ``python tests/fuzz/fuzz_otlp_encode.py [libFuzzer arguments] CORPUS_DIR``.

In: one input is a recipe for one span, its links, a resource and the span's groups. A finding is when the hand-written
bytes are refused by the official stubs, decode to something else, or change with what the caches hold or with the
grouping; or when the readers of collector answers raise on the input. The checks need no atheris, so the unit tests
replay the corpus through them.
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
    from agent.model import AttributeGroup, Attributes, AttributeValue, Span, SpanLink
    from agent.otlp import encode, retry

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.collector import count_spans
from tests.unit.otlp.test_encode import check_span, decoded_attributes, expected_attributes, forget_all, ungrouped

KEYS = (*encode.VOLATILE_KEYS, *sorted(encode.INTEGER_KEYS), "http.request.method", "user_agent.original")
SIZES = (0, 1, 2, 8, 100, 127, 128, 300, 20000)


class Recipe:
    """Reads values off the front of the input; zeros and empty text when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def take(self, size: int) -> bytes:
        taken = self._data[self._offset : self._offset + size]
        self._offset += size
        return taken.ljust(size, b"\0")

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self) -> str:
        """UTF-8 with lone surrogates let through, repeated to one of the sizes at which a length prefix changes."""
        choice = self.number(1)
        text = self.take(choice & 15).decode("utf-8", errors="surrogateescape")
        size = SIZES[choice >> 4] if choice >> 4 < len(SIZES) else len(text)
        return (text * size)[:size]

    def value(self) -> AttributeValue:
        choice = self.number(1) % 6
        if choice == 0:
            return self.text()
        if choice == 1:
            return self.number(1) & 1 == 1
        if choice == 2:
            return self.number(self.number(1) % 9, signed=True)
        if choice == 3:
            return float(self.number(1))
        if choice == 4:
            return encode._DOUBLE.unpack(self.take(8))[0]
        return tuple(self.text() for _ in range(self.number(1) % 4))

    def attributes(self) -> Attributes:
        pairs = []
        for _ in range(self.number(1) % 16):
            choice = self.number(1)
            pairs.append((KEYS[choice] if choice < len(KEYS) else self.text(), self.value()))
        return tuple(pairs)

    def groups(self) -> tuple[AttributeGroup, ...]:
        """Up to three; a set high bit has the first one come again."""
        choice = self.number(1)
        groups = tuple(AttributeGroup(self.attributes()) for _ in range(choice % 4))
        return groups + groups[: choice >> 7]

    def link(self) -> SpanLink:
        return SpanLink(self.take(16), self.take(8), self.text(), self.attributes())

    def span(self) -> Span:
        bits = self.number(1)
        return Span(
            trace_id=self.take(16),
            span_id=self.take(8),
            parent_span_id=self.take(8) if bits & 1 else b"",
            trace_state=self.text(),
            name=self.text(),
            kind=1 + self.number(1) % 3,
            start_time_ns=self.number(8),
            end_time_ns=self.number(8),
            attributes=self.attributes(),
            error=bits & 2 != 0,
            links=tuple(self.link() for _ in range(bits >> 6)),
            link_method=self.text(),
            sampled=bits & 4 != 0,
            process_key=(1, 2),
        )


def test_one_input(data: bytes) -> None:
    """The entry point for atheris."""
    recipe = Recipe(data)
    span = recipe.span()
    resource = recipe.attributes()
    # Last in the recipe, so that the inputs from before there were groups still mean the same span.
    span = msgspec.structs.replace(span, groups=recipe.groups())
    warm = encode.encode_span(span)
    forget_all()
    assert encode.encode_span(span) == warm, "a cache changed the bytes"
    assert encode.encode_span(span) == warm, "the caches that this span filled changed the bytes"
    assert encode.encode_span(ungrouped(span)) == warm, "a group changed the bytes"
    assert len(encode._groups) <= len(span.groups)
    assert all(len(fragment) <= encode.MAX_CACHED_GROUP_BYTES for fragment in encode._groups.values())
    payload = encode.encode_request([(encode.encode_resource(resource), [warm, warm])])
    assert count_spans(payload) == 2
    [resource_spans] = ExportTraceServiceRequest.FromString(payload).resource_spans
    assert decoded_attributes(resource_spans.resource.attributes) == expected_attributes(resource)
    for decoded in resource_spans.scope_spans[0].spans:
        check_span(span, decoded)

    delay_seconds = retry.retry_info_seconds(data)
    assert delay_seconds is None or delay_seconds >= 0
    assert retry.partial_success(data)[0] >= 0


def main() -> None:
    if atheris is None:
        sys.exit("fuzzing needs atheris: install the package's fuzz extra")
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
