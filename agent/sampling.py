"""Keep or drop, decided once per trace.

In: a trace id and what the sender's context said. Out: a decision that every part of the trace agrees on, on this node
and on others. Never reads a clock and keeps no state.
"""

from __future__ import annotations

_SPACE = 1 << 56


class Sampler:
    """Parent-based plus ratio sampling.

    With ``parent_based`` a decision that came with the context is kept; without one, or without ``parent_based``, the
    lowest 56 bits of the trace id decide: they are random by W3C Trace Context level 2 (section 3.2.2.3), so every
    node decides alike. ``ratio`` is the share kept, 0..1.
    """

    def __init__(self, ratio: float = 1.0, parent_based: bool = True) -> None:
        self._parent_based = parent_based
        self._keeps_all = ratio >= 1.0
        self._threshold = int((1.0 - ratio) * _SPACE)

    def keeps(self, trace_id: bytes, sampled: bool | None) -> bool:
        """Decide on a trace. ``trace_id`` is 16 bytes; ``sampled`` is the sender's decision or None."""
        if sampled is not None and self._parent_based:
            return sampled
        return self._keeps_all or int.from_bytes(trace_id[9:], "big") >= self._threshold
