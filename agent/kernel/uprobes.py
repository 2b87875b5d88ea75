"""Probes on functions of files, in every process that runs them: by links of their own kind, or else by perf events.

Linux 6.6 and later have such links (BPF_TRACE_UPROBE_MULTI). Taken back side by side they share one grace period,
where perf events wait for one lock, each for 0.1 s; and CAP_BPF with CAP_PERFMON is enough for them, where perf events
on programs want CAP_SYS_ADMIN.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agent.kernel._libbpf import ffi, lib

DETACH_THREADS = 64

Link = Any
"""A descriptor of a link of that kind, or a ``struct bpf_link *`` of a perf event."""


@functools.cache
def has_links() -> bool:
    """Whether the kernel has links for uprobes; it was asked once. False, too, when it allows no programs."""
    return lib.spanloom_links_uprobes()


def prepare(program: Any) -> None:
    """Before it is loaded: how the program will be attached."""
    if has_links():
        lib.bpf_program__set_expected_attach_type(program, lib.UPROBE_LINK)


def attach(program: Any, path: str, offset: int, *, is_return: bool) -> Link:
    """Attach a prepared, loaded program to the function at ``offset`` of a file, and with ``is_return`` to its end.

    ``path`` is followed once; what it leads to then is what is watched. Raises OSError when that is refused.
    """
    if has_links():
        link = lib.spanloom_link_uprobe(lib.bpf_program__fd(program), path.encode(), offset, is_return)
        error = -link
    else:
        link = lib.spanloom_attach_uprobe_at(program, path.encode(), offset, is_return)
        error = ffi.errno if link == ffi.NULL else 0
    if error > 0:
        raise OSError(error, os.strerror(error))
    return link


def detach(links: Iterable[Link]) -> None:
    """Take back what ``attach`` gave, side by side."""
    links = list(links)
    if links:
        with ThreadPoolExecutor(min(len(links), DETACH_THREADS)) as threads:
            list(threads.map(_detach, links))


def _detach(link: Link) -> None:
    if isinstance(link, int):
        os.close(link)
    else:
        lib.bpf_link__destroy(link)
