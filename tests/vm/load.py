"""Runs inside the machines of tools/vm.py, as root: every backend that the kernel has loads, and sees real traffic.

Prints what the verifier had to do, and exits 1 with the reason when a program is refused, an exchange is missing, or
two backends differ in what they record. Where the clock counts instructions it prints what the backends cost instead,
and in a kernel that is locked down what it says to that.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from agent.errors import KernelUnsupportedError, SpanloomError
from agent.kernel.capture import Capture, CaptureSettings
from agent.kernel.records import Decoder
from agent.model import ConnectionUpgraded, Exchange, Flag, Segment
from tests.vm import traffic

BACKENDS = ("syscalls", "fentry")
RECORD: dict = {"release": os.uname().release, "backends": {}}
"""What tools/kernels.py makes a table of."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ASKS = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n"
SWITCHES = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
TALKERS, TALKS = 4, 100
CALLS, ROUNDS = 500, 2
STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


class Seen(NamedTuple):
    """One end of an exchange, without what differs from run to run."""

    target: str
    role: int
    request_bytes: int
    response_bytes: int
    parent: str
    peer: str
    flags: int
    request: bytes
    response: bytes
    tail: bytes


def drained(capture: Capture) -> list[object]:
    capture.sweep()
    decoder, found = Decoder(capture.layout), []
    while True:
        batch, offsets = capture.drain()
        if not offsets:
            return found
        found += decoder.decode(batch, offsets)


def exchanges(backend: str) -> tuple[list[Seen], list[traffic.Expected]]:
    """What a backend records of exchanges of many kinds, and what it should."""
    with Capture(CaptureSettings(backend=backend)) as capture:
        capture.load_tls()
        capture.load_rust()
        with contextlib.suppress(KernelUnsupportedError):  # this kernel's return probes are not safe, as found out
            capture.unwatch(capture.try_return())
        work = {one.name: one.verified_instructions for one in capture.statistics()}
        capture.attach()
        capture.detach()
        capture.attach()
        expected = [*traffic.reading_and_writing(), *traffic.large_bodies(), *traffic.parents()]
        time.sleep(0.1)
        last = {one.exchange_id: one for one in _last(capture)}
        counters = {name: count for name, count in capture.counters().items() if count}
        counters |= {f"missed {one.name}": one.misses for one in capture.statistics() if one.misses}
        print(f"{os.uname().release} {backend}: by {capture.hooks} {capture.reasons}")
        print(f"{backend}: {len(last)} exchanges, counters {counters}")
        RECORD["backends"][backend] = {"hooks": capture.hooks, "exchanges": len(last), "instructions": work}
    targets = {number: one.request.split(b" ")[1].decode() for number, one in last.items()} | {0: ""}
    own = Flag.FIRST | Flag.PROCESS_UNKNOWN
    return sorted(
        Seen(
            targets[one.exchange_id],
            one.role,
            one.request_bytes,
            one.response_bytes,
            targets.get(one.parent_id, "?"),
            targets.get(one.peer_id, "?"),
            one.flags & ~own,
            one.request,
            one.response,
            one.tail if one.flags & Flag.TAIL_VALID else b"",
        )
        for one in last.values()
    ), expected


def wrong_exchanges(found: list[Seen], expected: list[traffic.Expected]) -> str:
    """How the exchanges differ from those that there were; "" when they do not."""
    wanted = [
        (one.target, role, one.request_bytes, one.response_bytes, one.parent if role == 2 else "")
        for one in expected
        for role in (1, 2)
    ]
    return _difference(sorted(wanted), [one[:5] for one in found])


def _difference(wanted: list, found: list) -> str:
    missing, more = [one for one in wanted if one not in found], [one for one in found if one not in wanted]
    return f"missing {missing}, more {more}" if missing or more or len(wanted) != len(found) else ""


def wrong_segments(backend: str) -> str:
    """What is wrong with the bytes of pipelined requests, seen from both ends."""
    with Capture(CaptureSettings(backend=backend)) as capture:
        capture.attach()
        expected = traffic.pipelined()
        segments = [one for one in drained(capture) if type(one) is Segment]
    for role in (1, 2):
        for direction, wanted in expected.items():
            mine = [one for one in segments if (one.role, one.direction) == (role, direction)]
            if b"".join(one.data for one in mine) != wanted:
                return f"{role} {direction}: {mine}"
    return ""


def wrong_frames(backend: str, upgrades: bool) -> str:
    """What is wrong with what a backend forwards of an HTTP/2 connection, seen from both ends; "" when nothing is.

    ``upgrades``: HTTP/1 has asked for it.
    """
    sent = PREFACE + frame(4, 0, bytes(6)) + frame(1, 1, b"block")
    sent += frame(0, 1, bytes(20_000)) + frame(1, 1, b"trailers")
    with Capture(CaptureSettings(backend=backend)) as capture:
        capture.attach()
        with traffic.pair() as (client, server):
            if upgrades:
                for sender, receiver, data in ((client, server, ASKS), (server, client, SWITCHES)):
                    sender.sendall(data)
                    traffic.read_all(receiver, len(data))
            client.sendall(sent)
            traffic.read_all(server, len(sent))
        records = drained(capture)
    segments = [one for one in records if type(one) is Segment]
    if sum(type(one) is ConnectionUpgraded for one in records) != 2 * upgrades:
        return f"upgrades: {records}"
    for role in (1, 2):
        mine = [one for one in segments if one.role == role and one.flags & 1]
        forwarded = b"".join(one.data for one in mine)
        if mine[-1].offset + mine[-1].length != len(sent) or b"block" not in forwarded or b"trailers" not in forwarded:
            return f"{role}: {segments}"
        if len(forwarded) > 200:
            return f"{role}: {len(forwarded)} bytes were forwarded"
    return ""


def frame(kind: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, 4 * (kind == 1))) + stream.to_bytes(4, "big") + payload


def wrong_fast_open() -> str:
    """What is wrong with requests of TCP fast open: the sockets' backend sees them where they arrive. Where they leave
    they are counted, and so are their responses.
    """
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text("3")
    with Capture(CaptureSettings(backend="fentry")) as capture:
        capture.attach()
        traffic.fast_open()
        found = sorted((one.role, one.request.split(b" ")[1].decode()) for one in _last(capture))
        counted = capture.counters()["ignored_other"]
    expected = [(1, "/fast/0"), (1, "/fast/1"), (1, "/next/0"), (1, "/next/1"), (2, "/next/0"), (2, "/next/1")]
    return "" if (found, counted) == (expected, 4) else f"{found}, {counted} counted"


def _last(capture: Capture) -> list[Exchange]:
    """The last record of each exchange."""
    return list({one.exchange_id: one for one in drained(capture) if type(one) is Exchange}.values())


def wrong_crowd(backend: str) -> str:
    """What is missing when many processes talk at once."""
    with Capture(CaptureSettings(backend=backend)) as capture:
        capture.attach()
        talkers = [subprocess.Popen([sys.executable, "-m", "tests.vm.traffic", str(TALKS)]) for _ in range(TALKERS)]
        if any(talker.wait() for talker in talkers):
            return "a process that talks failed"
        found = len(_last(capture))
        missed = {one.name: one.misses for one in capture.statistics() if one.misses}
        return f"{found} exchanges, {missed}" if missed or found != 2 * TALKERS * TALKS else ""


def sleep_through_a_detachment(backend: str) -> None:
    """A thread sleeps in a call that is watched when the probes are taken back. If that is unsafe, the kernel dies."""
    with traffic.pair() as (client, server):
        for _ in range(3):
            reader = threading.Thread(target=traffic.read_all, args=(server, len(traffic.OK)))
            with Capture(CaptureSettings(backend=backend)) as capture:
                capture.attach()
                reader.start()
                time.sleep(0.2)
            time.sleep(0.5)
            client.sendall(traffic.OK)
            reader.join(20)
            assert not reader.is_alive()


def costs() -> Iterator[str]:
    """A line per backend: the time in its programs per exchange, both ends, and what the process takes for one in all.

    The clock counts instructions (tools/vm.py --counted), which says what is to be done, and not how fast a processor
    does it: the lines are to be compared with each other only.
    """
    sent = traffic.request("/")
    taken: dict[str, list[float]] = {}
    with traffic.pair() as (client, server), open(os.devnull) as other:
        out, into, neither = client.fileno(), server.fileno(), other.fileno()

        def exchanges(count: int) -> None:
            for _ in range(count):
                os.write(out, sent)
                os.read(into, 4096)
                for _ in range(4):
                    os.lseek(neither, 0, os.SEEK_SET)
                os.write(into, traffic.OK)
                os.read(out, 4096)

        for backend in ("", *BACKENDS) * ROUNDS:
            capture = Capture(CaptureSettings(backend=backend, ring_buffer_bytes=64 << 20)) if backend else None
            if capture:
                capture.attach([])
            exchanges(CALLS // 10)
            began = time.process_time_ns()
            exchanges(CALLS)
            taken.setdefault(backend, []).append((time.process_time_ns() - began) / CALLS)
            if capture:
                STATISTICS.write_text("1")
                before = {one.name: one for one in capture.statistics()}
                exchanges(CALLS)
                after = {one.name: one for one in capture.statistics()}
                STATISTICS.write_text("0")
                capture.close()
                runs = {name: (one.run_count - before[name].run_count) / CALLS for name, one in after.items()}
                times = {name: (one.run_time_ns - before[name].run_time_ns) / CALLS for name, one in after.items()}
                shares = ", ".join(
                    f"{name} {times[name]:.0f} ns in {runs[name]:.1f} runs" for name in runs if runs[name]
                )
                yield f"{backend}: {sum(times.values()):.0f} ns of programs per exchange: {shares}"
    for backend, rounds in taken.items():
        yield f"{backend or 'neither'}: {min(rounds):.0f} ns in all per exchange"


def refusal() -> str:
    """What the probes come to where the kernel is locked down: how the agent would end, or that it would not."""
    subprocess.run(["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], check=True)
    print("lockdown: " + Path("/sys/kernel/security/lockdown").read_text().strip())
    try:
        with Capture(CaptureSettings()) as capture:
            capture.attach()
    except SpanloomError as error:
        return f"exit code {error.exit_code}: {error}"
    return "nothing is refused"


def main() -> int:
    if "lockdown=confidentiality" in Path("/proc/cmdline").read_text().split():
        print(refusal())
        return 0
    # Whether the kernel is preemptible: what a running system has mounted anyway.
    subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    if "spanloom.counted" in Path("/proc/cmdline").read_text().split():
        for line in costs():
            print(line)
        return 0
    seen: dict[str, list[Seen]] = {}
    has_fentry = "spanloom.fentry" in Path("/proc/cmdline").read_text().split()
    for backend in BACKENDS if has_fentry else BACKENDS[:1]:
        try:
            seen[backend], expected = exchanges(backend)
        except SpanloomError as error:
            print(f"{backend}: {error}")
            return 1
        wrong = wrong_exchanges(seen[backend], expected) or wrong_segments(backend)
        wrong = wrong or wrong_frames(backend, upgrades=False) or wrong_frames(backend, upgrades=True)
        if wrong:
            print(f"{backend}: {wrong}")
            return 1
        print(f"{backend}: pipelined requests, frames of HTTP/2")
        if wrong := wrong_crowd(backend):
            print(f"{backend}: {wrong}")
            return 1
        sleep_through_a_detachment(backend)
        print(f"{backend}: many processes, sleep through a detachment")
    if has_fentry and (wrong := _difference(seen["syscalls"], seen["fentry"])):
        print(f"the backends differ: {wrong}")
        return 1
    if has_fentry and (wrong := wrong_fast_open()):
        print(f"fast open: {wrong}")
        return 1
    with Capture(CaptureSettings()) as capture:
        RECORD["auto"] = f"{capture.backend} by {capture.hooks}"
    print(f"auto: {RECORD['auto']}")
    print("record " + json.dumps(RECORD))
    return 0


if __name__ == "__main__":
    sys.exit(main())
