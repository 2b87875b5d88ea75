"""Who called whom: exchanges become spans with trace ids, parents and links.

In: exchanges with what their protocol read from them, in any order, and watermarks. Out: spans, each exactly once.
Never guesses: where more than one parent is possible the span gets none.

A server exchange S and a client exchange C are related in five ways (DESIGN.md, "Stitching"):

1. C carries S's own inbound context: parent of C is S ("forwarded"); the server that C calls gets C ("peer").
2. C carries S's trace and another id, which an SDK made: that id is the parent ("header").
3. C carries another trace: the header wins ("header"), and a link to S records the causality.
4. C carries nothing: the kernel's parent by thread ("thread"); trace ids are inherited along all edges.
5. Neither: the one server exchange in flight in the process with the same trace id ("trace_id"), or the same
   x-request-id ("request_id").

What an exchange depends on may arrive after it. It waits for the record it needs, or until the watermark says that no
record of an earlier beginning is to come: after that everything that could matter is known. The wait is bounded by
``hold_ns`` in time and ``hold_spans`` in number; what had to leave early is counted.

What the kernel says of threads holds where the thread that reads a request also answers it, and shows only with the
answer: a call waits for the answer of the request that its thread read. A process is believed in advance (which matters
when the wait gets too long, or no answer comes) once it has given ``_PROOFS`` answers on the thread that had read while
other requests were unanswered, and never again once another thread answered (``_migrating``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import msgspec

from agent.model import Attributes, Call, Exchange, Flag, Role, Span, SpanKind, SpanLink, TraceContext
from agent.sampling import Sampler

ProcessKey = tuple[int, int]

_CLIENT_ONLY = int(Flag.CLIENT_ONLY)
_SERVER = int(Role.SERVER)
_KINDS = {int(Role.SERVER): int(SpanKind.SERVER), int(Role.CLIENT): int(SpanKind.CLIENT)}
_CAUSE: Attributes = (("spanloom.link.reason", "served_exchange"),)
_OTHER_CONTEXT: Attributes = (("spanloom.link.reason", "other_context"),)
_INTERNAL = int(SpanKind.INTERNAL)
_OPENED: dict[int, tuple[str, str]] = {
    int(Role.SERVER): ("spanloom.opened", "server"),
    int(Role.CLIENT): ("spanloom.opened", "client"),
}
_OUTCOME = ("http.response.", "http.request.body.", "rpc.response.", "spanloom.rpc.", "spanloom.response.", "error.")
"""Attributes that only the end decides: what a request that is open tells of begins with none of these."""


class _Trace(msgspec.Struct, frozen=True, gc=False):
    """The trace of an exchange, where its own context does not say the same."""

    trace_id: bytes
    sampled: bool
    trace_state: str


class _Proofs(msgspec.Struct, gc=False):
    """What speaks for a process answering on the threads that read. ``answered_ns``: when the latest answer began."""

    count: int = 0
    answered_ns: int = 0


class _Node(msgspec.Struct, gc=False, weakref=False):
    """One exchange while it may still matter to others.

    ``target_id`` is the exchange that the kernel named: a server's peer, a client's parent. ``trace`` is None until the
    exchange has been placed in its trace; once its span was made ``exchange``, ``call`` and a client's ``context`` are
    let go, and ``span_id`` is kept. ``end_ns`` is 0 while no byte of a response is known. ``awaits_answer`` says that a
    client cannot be placed before it is known who answered ``target_id``.
    """

    exchange_id: int
    role: int
    process: ProcessKey
    start_ns: int
    end_ns: int
    flags: int
    target_id: int
    context: TraceContext | None
    request_id: str
    finished: bool
    exchange: Exchange | None
    call: Call | None
    trace: _Trace | TraceContext | None = None
    parent: bytes = b""
    method: str = ""
    span_id: bytes = b""
    links: tuple[SpanLink, ...] = ()
    waiters: list[_Node] | None = None
    is_deciding: bool = False
    awaits_answer: bool = False


class Stitcher:
    """Places exchanges in traces.

    ``threads_interleave(process)`` tells whether a process runs several requests on one thread in a way that the
    kernel cannot see (goroutines, event loops): the kernel's parent is not used there.

    An announced exchange that is still open ``announce_open_ns`` after its beginning (0: never) makes a span beside its
    own, once and as soon as it is placed: without a length, at its beginning, and below its own.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        threads_interleave: Callable[[ProcessKey], bool] = lambda process: False,
        hold_ns: int = 5_000_000_000,
        hold_spans: int = 50_000,
        announce_open_ns: int = 0,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._keeps = sampler.keeps
        self._apart: dict[ProcessKey, Callable[[bytes, bool | None], bool]] = {}
        self._threads_interleave = threads_interleave
        self._hold_ns = hold_ns
        self._hold_spans = hold_spans
        self._announce_open_ns = announce_open_ns
        self._random_bytes = random_bytes
        self._random = b""
        self._random_position = 0
        self._spans: list[Span] = []
        # Exchanges that others may still refer to, in two generations that are swapped as the watermark moves: an entry
        # lives for one to two of the sweep's periods in calm. Bound: 2 * _GENERATION_NODES.
        self._recent: dict[int, _Node] = {}
        self._previous: dict[int, _Node] = {}
        self._generation_end_ns = 0
        # Servers by process and inbound trace id or x-request-id, in the same generations: one node or a list.
        self._served: dict[ProcessKey, _Index] = {}
        self._served_before: dict[ProcessKey, _Index] = {}
        self._servers: set[ProcessKey] = set()
        # Processes in which an answer came from another thread than the one that had read the request; and those that
        # answered on the same thread only, but not often enough to be believed.
        self._migrating: set[ProcessKey] = set()
        self._unproven: dict[ProcessKey, _Proofs] = {}
        self._watermark_ns = 0
        # When the oldest request began that a process, of those in _unproven, has not answered; as of the last sweep.
        self._unanswered: dict[ProcessKey, int] = {}
        # Exchanges that could not be placed yet, oldest arrival first, and what an id that is not known is awaited by.
        self._undecided: dict[int, _Node] = {}
        self._expected: dict[int, _Node | list[_Node]] = {}
        self._announced: dict[int, _Node] = {}
        self._opened: set[int] = set()  # those of _announced that a span has told of
        self._placed: list[_Node] = []
        self.held = 0
        """Finished exchanges that wait for their place."""
        self.sampled_out = 0
        self.openings = 0
        """Spans beside those of exchanges: they tell of one that was open for long."""
        self.released_early = 0
        """Exchanges placed before everything was known, because of the bounds."""
        self.parents_lost = 0
        """Exchanges whose parent or peer was named by the kernel and never arrived."""
        self.ambiguous = 0
        """Client exchanges left without a parent because several were possible."""
        self.clock_offset_ns = 0
        """Unix time minus CLOCK_MONOTONIC; set by the pipeline."""

    def reconfigure(self, sampler: Sampler, *, hold_ns: int, hold_spans: int, announce_open_ns: int = 0) -> None:
        """Decide otherwise about traces that are not known yet, and wait and tell otherwise, from now on."""
        self._keeps = sampler.keeps
        self._apart.clear()
        self._hold_ns = hold_ns
        self._hold_spans = hold_spans
        self._announce_open_ns = announce_open_ns

    def sample_apart(self, process: ProcessKey, sampler: Sampler | None) -> None:
        """Let a sampler of its own decide about the traces that begin in a process; None: no longer."""
        if sampler is None:
            self._apart.pop(process, None)
        else:
            if len(self._apart) >= self._PROCESSES:
                self._apart.clear()
            self._apart[process] = sampler.keeps

    # One generation holds this many nodes at most; then it is swapped whatever the watermark says.
    _GENERATION_NODES = 50_000
    # From this number on a generation is worth ending before its time, by a sweep of its own.
    _CROWDED_NODES = 1_500
    # What is known of processes beyond this number is forgotten, and learned again from their next exchanges.
    _PROCESSES = 16_384
    # Answers on the thread that had read the request before a process is believed to do so always; of those that were
    # given while another request was unanswered, since threads that take up each other's work may answer a lone request
    # always themselves. Two threads that answer whatever comes next do this by chance once in 65 536 times.
    _PROOFS = 16
    # The sweep that returns a watermark has reported all answers that were given so long before it.
    _REPORTED_NS = 200_000_000

    def add(self, exchange: Exchange, call: Call, process: ProcessKey | None = None) -> None:
        """Take a finished exchange. Its span comes out of ``take()`` as soon as its place is known.

        Cheapest when parents come before their children; any order gives the same spans. ``process`` saves making the
        exchange's key again.
        """
        exchange_id = exchange.exchange_id
        if self._announced:
            node = self._announced.pop(exchange_id, None)
            if node is not None:
                self._opened.discard(exchange_id)
                node.exchange = exchange
                node.call = call
                node.end_ns = exchange.response_end_ns
                node.finished = True
                self._recent[exchange_id] = node
                if node.role == _SERVER:
                    self._learn_threads(node.process, exchange)
                if node.trace is None:
                    self.held += 1
                else:
                    self._emit(node)
                return
        role = exchange.role
        self._enter(
            _Node(
                exchange_id,
                role,
                process or (exchange.tgid, exchange.process_start_ns),
                exchange.request_start_ns,
                exchange.response_end_ns,
                exchange.flags,
                exchange.peer_id if role == _SERVER else exchange.parent_id,
                call.context,
                call.request_id,
                True,
                exchange,
                call,
            ),
            exchange,
        )

    def announce(self, exchange: Exchange, call: Call) -> None:
        """Take what is known of an exchange that has not finished, so that others can refer to it."""
        node = self._announced.get(exchange.exchange_id)
        if node is not None:
            if node.role == _SERVER and not node.end_ns:
                self._learn_threads(node.process, exchange)
                node.end_ns = exchange.response_end_ns
        else:
            node = self._announced[exchange.exchange_id] = _Node(
                exchange.exchange_id,
                exchange.role,
                (exchange.tgid, exchange.process_start_ns),
                exchange.request_start_ns,
                exchange.response_end_ns,
                exchange.flags,
                exchange.peer_id if exchange.role == _SERVER else exchange.parent_id,
                call.context,
                call.request_id,
                False,
                exchange,
                call,
            )
            self._enter(node, exchange)

    @property
    def is_crowded(self) -> bool:
        """So much has come since the last ``advance()`` that another one soon would save memory."""
        return len(self._recent) > self._CROWDED_NODES

    def knows(self, exchange_id: int) -> bool:
        """Whether the exchange was added or announced not long ago."""
        return self._find(exchange_id) is not None

    def withdraw(self, exchange_id: int) -> None:
        """Forget an announced exchange that makes no span after all; does nothing when it was not announced."""
        node = self._announced.pop(exchange_id, None)
        if node is None:
            return
        self._opened.discard(exchange_id)
        self._recent.pop(exchange_id, None)
        self._previous.pop(exchange_id, None)
        self._undecided.pop(exchange_id, None)
        self._expect_no_longer(node, node.target_id)
        for generation in (self._served, self._served_before):
            index = generation.get(node.process, {})
            for key in (node.context.trace_id if node.context is not None else b"", node.request_id):
                found = index.get(key)
                if found is node:
                    del index[key]
                elif isinstance(found, list) and node in found:
                    found.remove(node)

    def advance(self, watermark_ns: int, now_ns: int) -> None:
        """Decide what can be decided: every exchange that began before ``watermark_ns`` is known by now.

        Both arguments are CLOCK_MONOTONIC nanoseconds.
        """
        overdue_ns = now_ns - self._hold_ns
        self._watermark_ns = watermark_ns
        self._unanswered.clear()
        if self._unproven:
            for node in self._announced.values():
                if node.role == _SERVER and not node.end_ns and node.process in self._unproven:
                    start_ns = self._unanswered.get(node.process, node.start_ns)
                    self._unanswered[node.process] = min(start_ns, node.start_ns)
        unready: set[int] = set()
        for node in list(self._undecided.values()):
            if node.start_ns < watermark_ns:
                self._decide(node, unready)
            if node.trace is None and (node.start_ns < overdue_ns or len(self._undecided) > self._hold_spans):
                self.released_early += 1
                self._decide(node)
        if self._announce_open_ns:
            self._tell_of_open(now_ns - self._announce_open_ns)
        if watermark_ns >= self._generation_end_ns or len(self._recent) > self._GENERATION_NODES:
            # What refers to an exchange begins before it ends. The older generation had ended when the younger one was
            # begun, and of everything that began before that a record has been seen: nobody refers to it any more.
            self._generation_end_ns = now_ns
            kept = self._still_referred_to()
            self._previous, self._recent = self._recent, kept
            self._served_before, self._served = self._served, {}
            for node in kept.values():
                if node.role == _SERVER:
                    self._index(node)
            if len(self._servers) > self._PROCESSES:
                self._servers.clear()
                self._unproven.clear()
            if len(self._migrating) > self._PROCESSES:
                self._migrating.clear()

    def _tell_of_open(self, begun_ns: int) -> None:
        """Make the span that tells of each announced exchange that began up to ``begun_ns`` and is in a trace by now.

        What it says stays true whatever comes: where and when the request was made, and nothing of how it goes on.
        """
        for exchange_id, node in self._announced.items():
            trace, call = node.trace, node.call
            if node.start_ns > begun_ns or trace is None or call is None or exchange_id in self._opened:
                continue
            self._opened.add(exchange_id)
            if not trace.sampled:
                continue
            self.openings += 1
            start_ns = node.start_ns + self.clock_offset_ns
            asked = tuple(pair for pair in call.all_attributes() if not pair[0].startswith(_OUTCOME))
            self._spans.append(
                Span(
                    trace.trace_id,
                    self._new_trace_id()[8:],
                    _span_id(node),
                    trace.trace_state,
                    f"{call.name} (opened)",
                    _INTERNAL,
                    start_ns,
                    start_ns,
                    (*asked, _OPENED[node.role]),
                    False,
                    (),
                    "opened",
                    True,
                    node.process,
                )
            )

    def _still_referred_to(self) -> dict[int, _Node]:
        """What the next generation needs: what lasts or waits, and all that may be above what waits."""
        kept = dict(self._announced)
        wanted: dict[tuple[ProcessKey, bytes | str], int] = {}  # and since when
        for node in self._undecided.values():
            kept[node.exchange_id] = node
            target = self._find(node.target_id)
            if target is not None:
                kept[node.target_id] = target
            if node.role != _SERVER:
                for key in (node.context.trace_id if node.context is not None else b"", node.request_id):
                    if key:
                        start_ns = wanted.get((node.process, key), node.start_ns)
                        wanted[node.process, key] = min(start_ns, node.start_ns)
        for (process, key), start_ns in wanted.items():
            for generation in (self._served, self._served_before):
                found = generation.get(process, {}).get(key, ())
                for one in found if isinstance(found, list | tuple) else (found,):
                    if not one.finished or one.end_ns >= start_ns:
                        kept[one.exchange_id] = one
        return kept

    def flush(self) -> None:
        """Place everything that waits, with what is known now (shutdown)."""
        for node in list(self._undecided.values()):
            self._decide(node)

    def take(self) -> list[Span]:
        """Hand out the spans made since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def forget_process(self, process: ProcessKey) -> None:
        """Drop what is remembered of a process that ended."""
        self._servers.discard(process)
        self._migrating.discard(process)
        self._unproven.pop(process, None)

    def _enter(self, node: _Node, exchange: Exchange) -> None:
        exchange_id = node.exchange_id
        self._recent[exchange_id] = node
        if node.role == _SERVER:
            context = node.context
            self._index(node)
            if exchange.response_tid != exchange.request_tid or (self._unproven and node.process in self._unproven):
                self._learn_threads(node.process, exchange)
            if node.target_id:
                self._follow(node, node.target_id)
            elif context is not None and node.finished:
                # _place_by_header() and _place() for the most frequent case: nobody can be waiting for this node yet.
                keeps = self._apart.get(node.process, self._keeps) if self._apart else self._keeps
                sampled = keeps(context.trace_id, context.sampled)
                node.trace = (
                    context if sampled is context.sampled else _Trace(context.trace_id, sampled, context.trace_state)
                )
                node.parent = context.span_id or b""
                node.method = "header"
                self._emit(node)
            else:
                self._place_by_header(node)
        else:
            self._enter_client(node)
        if self._expected:
            waiting = self._expected.pop(exchange_id, None)
            if waiting is not None:
                for waiter in waiting if isinstance(waiting, list) else (waiting,):
                    self._follow(waiter, exchange_id)

    def _index(self, node: _Node) -> None:
        served = self._served.get(node.process)
        if served is None:
            if node.process not in self._servers:
                self._servers.add(node.process)
                if node.process not in self._migrating:
                    self._unproven[node.process] = _Proofs()
            served = self._served[node.process] = {}
        context = node.context
        if context is not None:
            earlier = served.setdefault(context.trace_id, node)
            if earlier is not node:
                _index_again(served, context.trace_id, earlier, node)
        if node.request_id:
            earlier = served.setdefault(node.request_id, node)
            if earlier is not node:
                _index_again(served, node.request_id, earlier, node)

    def _learn_threads(self, process: ProcessKey, exchange: Exchange) -> None:
        """Take notice of which thread answered a request."""
        if not exchange.response_tid:
            return
        if exchange.response_tid != exchange.request_tid:
            self._migrating.add(process)
            self._unproven.pop(process, None)
        else:
            proofs = self._unproven.get(process)
            if proofs is not None:
                if exchange.request_start_ns < proofs.answered_ns:
                    proofs.count += 1
                    if proofs.count >= self._PROOFS:
                        del self._unproven[process]
                proofs.answered_ns = max(proofs.answered_ns, exchange.response_start_ns)

    def _enter_client(self, node: _Node) -> None:
        is_lone = node.context is None and not node.target_id and not node.request_id
        if is_lone or (node.flags & _CLIENT_ONLY and node.process not in self._servers):
            self._place_by_header(node)
        elif node.target_id and self._trusts_threads(node.process):
            self._follow(node, node.target_id)
        else:
            self._postpone(node)

    def _trusts_threads(self, process: ProcessKey) -> bool:
        return process not in self._migrating and not self._threads_interleave(process)

    def _is_confirmed(self, served: _Node) -> bool:
        """Whether the thread that read a request is known to have served it: it answered. While little is known of the
        process, who answered the others that it had read until then must be known, too.
        """
        return bool(served.end_ns) and (
            served.process not in self._unproven
            or (
                served.end_ns + self._REPORTED_NS < self._watermark_ns
                and served.end_ns < self._unanswered.get(served.process, self._watermark_ns)
            )
        )

    def _needs_thread(self, node: _Node) -> bool:
        """Whether the headers alone do not tell where a client exchange belongs, and what caused it."""
        context = node.context
        if node.awaits_answer or context is None:
            return True
        is_in_trace, same_parent = False, 0
        for generation in (self._served, self._served_before):
            found = generation.get(node.process, {}).get(context.trace_id, ())
            for one in found if isinstance(found, list | tuple) else (found,):
                is_in_trace = True
                same_parent += context.span_id is None or one.context.span_id == context.span_id
                if same_parent > 1:
                    break
        node.awaits_answer = same_parent > 1 or not is_in_trace
        return node.awaits_answer

    def _find(self, exchange_id: int) -> _Node | None:
        return self._recent.get(exchange_id) or self._previous.get(exchange_id)

    def _postpone(self, node: _Node) -> None:
        exchange_id = node.exchange_id
        if exchange_id not in self._undecided:
            self._undecided[exchange_id] = node
            if node.finished:
                self.held += 1

    def _follow(self, node: _Node, target_id: int) -> None:
        """Place a node by the exchange that the kernel named, when that is known and placed; else wait for it."""
        if node.trace is not None:
            return
        target = self._find(target_id)
        if target is None:
            waiting = self._expected.setdefault(target_id, node)
            if waiting is not node:
                _wait_as_well(self._expected, target_id, waiting, node)
            self._postpone(node)
        elif target.trace is None:
            if target.waiters is None:
                target.waiters = []
            target.waiters.append(node)
            self._postpone(node)
        elif node.role == _SERVER:
            self._place(node, target.trace, _span_id(target), "peer")
        else:
            self._place_client_of(node, target)

    def _expect_no_longer(self, node: _Node, target_id: int) -> None:
        waiting = self._expected.get(target_id)
        if waiting is node:
            del self._expected[target_id]
        elif isinstance(waiting, list) and node in waiting:
            waiting.remove(node)
            if not waiting:
                del self._expected[target_id]

    def _place_client_of(self, node: _Node, served: _Node) -> None:
        """Place a client exchange whose thread was serving ``served`` (rules 1 to 4)."""
        context, inbound = node.context, served.context
        if not self._trusts_threads(node.process):
            self._postpone(node)
        elif not served.end_ns or (self._unproven and not self._is_confirmed(served)):
            self._postpone(node)  # until it is known which thread answered: see _settle()
        elif context is None:
            self._place(node, served.trace, _span_id(served), "thread")
        elif inbound is not None and inbound.trace_id == context.trace_id and inbound.span_id == context.span_id:
            self._place(node, served.trace, _span_id(served), "forwarded")
        elif inbound is not None and inbound.trace_id == context.trace_id and context.span_id is not None:
            self._place_by_header(node)
        else:
            self._postpone(node)  # the trace of another exchange of this process, or a foreign one

    def _decide(self, node: _Node, unready: set[int] | None = None) -> None:
        """Place a node, and what it depends on, with what is known: no record is to come of what began before it.

        With ``unready`` it may find that it has to wait for an answer: then it goes on waiting, and is noted there with
        all that waits for it. Chains may be long: they are walked with a list, not by recursion.
        """
        node.is_deciding = True
        chain = [node]
        while chain:
            last = chain[-1]
            needed = self._settle(last, unready is None) if last.trace is None else None
            if unready is not None and needed is not None and (needed is last or needed.exchange_id in unready):
                for one in chain:
                    one.is_deciding = False
                    unready.add(one.exchange_id)
                return
            if needed is not None:
                needed.is_deciding = True
                chain.append(needed)
            else:
                last.is_deciding = False
                chain.pop()

    def _settle(self, node: _Node, at_once: bool) -> _Node | None:
        """Place a node, or return the one that has to be placed before it: itself when it has to wait for an answer.
        References in a circle are cut.
        """
        target_id = node.target_id
        is_client = node.role != _SERVER
        if is_client and not self._trusts_threads(node.process):
            target_id = 0
        target = self._find(target_id) if target_id else None
        if is_client and target is not None and not self._is_confirmed(target):
            if not at_once and (target.end_ns or not target.finished):
                if self._needs_thread(node):
                    return node
                target, target_id = None, 0
            elif not target.end_ns and node.process in self._unproven:
                target, target_id = None, 0
        if target is not None and target.trace is None:
            if not target.is_deciding:
                return target  # it began before this one, so it is due as well
            target = None
        if target_id and target is None:
            self.parents_lost += 1
            node.target_id = 0
            self._expect_no_longer(node, target_id)
        if not is_client:
            if target is not None:
                self._place(node, target.trace, _span_id(target), "peer")
            else:
                self._place_by_header(node)
        elif node.context is not None:
            return self._settle_client_with_context(node, node.context, target)
        elif target is not None:
            self._place(node, target.trace, _span_id(target), "thread")
        else:
            return self._settle_by_request_id(node)
        return None

    def _settle_client_with_context(self, node: _Node, context: TraceContext, served: _Node | None) -> _Node | None:
        if served is not None and _forwards(context, served):
            self._place(node, served.trace, _span_id(served), "forwarded")
            return None
        same_trace = self._candidates(node, context.trace_id)
        same_parent = [one for one in same_trace if one.context is not None and one.context.span_id == context.span_id]
        if same_parent or (context.span_id is None and same_trace):
            candidates, method = (same_parent, "forwarded") if same_parent else (same_trace, "trace_id")
            candidates = _in_flight(candidates, node) or candidates
            if served is not None and served in candidates:
                candidates = [served]  # the context has no parent, and the thread tells which one of its trace it is
            elif len(candidates) > 1 and node.request_id:
                candidates = [one for one in candidates if one.request_id == node.request_id] or candidates
            return self._settle_in_one_of(node, candidates, method, self._trace_of(node, context))
        links = ()
        if served is not None and served.trace.trace_id != context.trace_id:
            trace = served.trace
            links = (SpanLink(trace.trace_id, _span_id(served), trace.trace_state, _CAUSE),)
        self._place_by_header(node, links)
        return None

    def _settle_by_request_id(self, node: _Node) -> _Node | None:
        candidates = _in_flight(self._candidates(node, node.request_id), node) if node.request_id else []
        if not candidates:
            self._place_by_header(node)
            return None
        return self._settle_in_one_of(node, candidates, "request_id", self._new_trace(node))

    def _settle_in_one_of(
        self, node: _Node, candidates: list[_Node], method: str, otherwise: _Trace | TraceContext
    ) -> _Node | None:
        """Place a client exchange below the only candidate; below none when there are several."""
        parent = candidates[0]
        if len(candidates) == 1 and parent.trace is None and not parent.is_deciding:
            return parent
        if len(candidates) == 1 and parent.trace is not None:
            self._place(node, parent.trace, _span_id(parent), method)
        else:
            self.ambiguous += 1
            self._place(node, otherwise, b"", "ambiguous")
        return None

    def _candidates(self, node: _Node, key: bytes | str) -> list[_Node]:
        """Server exchanges of the same process with the same trace id or request id that began before the node."""
        known: dict[int, _Node] = {}  # one that lasts is in both generations
        for served in (self._served, self._served_before):
            index = served.get(node.process)
            found = index.get(key, ()) if index else ()
            for one in found if isinstance(found, list | tuple) else (found,):
                if one.start_ns <= node.start_ns:
                    known[one.exchange_id] = one
        return list(known.values())

    def _trace_of(self, node: _Node, context: TraceContext) -> _Trace | TraceContext:
        sampled = self._apart.get(node.process, self._keeps)(context.trace_id, context.sampled)
        return context if sampled is context.sampled else _Trace(context.trace_id, sampled, context.trace_state)

    def _place_by_header(self, node: _Node, links: tuple[SpanLink, ...] = ()) -> None:
        context = node.context
        if context is None:
            self._place(node, self._new_trace(node), b"", "", links)
        else:
            self._place(node, self._trace_of(node, context), context.span_id or b"", "header", links)

    def _new_trace(self, node: _Node) -> _Trace:
        trace_id = self._new_trace_id()
        decision = node.call.decision if node.call is not None else None
        return _Trace(trace_id, self._apart.get(node.process, self._keeps)(trace_id, decision), "")

    def _new_trace_id(self) -> bytes:
        position = self._random_position
        if position >= len(self._random):
            self._random = self._random_bytes(16 * 256)
            position = 0
        self._random_position = position + 16
        return self._random[position : position + 16]

    def _place(
        self, node: _Node, trace: _Trace | TraceContext, parent: bytes, method: str, links: tuple[SpanLink, ...] = ()
    ) -> None:
        node.trace = trace
        node.parent = parent
        node.method = method
        node.links = links
        if self._undecided and self._undecided.pop(node.exchange_id, None) is not None and node.finished:
            self.held -= 1
        if node.finished:
            self._emit(node)
        if node.waiters is not None:
            self._place_waiters(node)

    def _place_waiters(self, node: _Node) -> None:
        """Place what has waited for a node, and so on; with a list, since chains may be long."""
        self._placed.append(node)
        if len(self._placed) > 1:
            return
        for placed in self._placed:  # grows while it is walked
            waiters, placed.waiters = placed.waiters, None
            for waiter in waiters or ():
                self._follow(waiter, placed.exchange_id)
        self._placed.clear()

    def _emit(self, node: _Node) -> None:
        trace, exchange, call = node.trace, node.exchange, node.call
        node.exchange = node.call = None
        if exchange.role != _SERVER:
            node.context = None
        node.span_id = span_id = node.span_id or node.exchange_id.to_bytes(8, "big")
        if not trace.sampled:
            self.sampled_out += 1
            return
        offset_ns = self.clock_offset_ns
        links = node.links
        if call.other_contexts:
            links += tuple(
                SpanLink(other.trace_id, other.span_id, other.trace_state, _OTHER_CONTEXT)
                for other in call.other_contexts
                if other.span_id is not None
            )
        self._spans.append(
            Span(
                trace.trace_id,
                span_id,
                node.parent,
                trace.trace_state,
                call.name,
                _KINDS[exchange.role],
                node.start_ns + offset_ns,
                (exchange.response_end_ns or exchange.end_ns) + offset_ns,
                call.attributes,
                call.error,
                links,
                node.method,
                True,
                node.process,
                call.groups,
            )
        )


def _forwards(context: TraceContext, served: _Node) -> bool:
    """Whether the context of a client exchange is the one that a server exchange came with."""
    inbound = served.context
    return inbound is not None and inbound.trace_id == context.trace_id and inbound.span_id == context.span_id


def _in_flight(candidates: Iterable[_Node], node: _Node) -> list[_Node]:
    """Those that had not ended when the node began."""
    return [one for one in candidates if not one.finished or one.end_ns >= node.start_ns]


_Index = dict[bytes | str, "_Node | list[_Node]"]


def _wait_as_well(
    expected: dict[int, _Node | list[_Node]], key: int, waiting: _Node | list[_Node], node: _Node
) -> None:
    if isinstance(waiting, list):
        waiting.append(node)
    else:
        expected[key] = [waiting, node]


def _index_again(served: _Index, key: bytes | str, earlier: _Node | list[_Node], node: _Node) -> None:
    if isinstance(earlier, list):
        earlier.append(node)
    else:
        served[key] = [earlier, node]


def _span_id(node: _Node) -> bytes:
    return node.span_id or node.exchange_id.to_bytes(8, "big")
