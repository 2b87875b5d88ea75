"""Objects of the API server, kept up to date: list, then watch, for as long as the agent runs.

In: an ``ApiClient`` and what to watch. Out, from one thread and in order: ``on_replace(objects)`` after each list and
``on_change(type, object)`` with ``ADDED``, ``MODIFIED`` or ``DELETED`` after each event, and counters. Never: raises
because the API server is absent, slow, hostile or unwilling, asks it more often than the back-off allows, keeps an
object, or changes one.

The rules are those of client-go's reflector, because API servers are built for them: the first list is answered from
the server's cache (``resourceVersion=0``); a watch that breaks goes on from the last version seen; a version that is
too old (410) leads to a list that is at least as new as that version; only when the server does not know the version
either (it was restored from a backup) the list is read from etcd. See "Efficient detection of changes" and "Semantics
for get and list" in the Kubernetes API concepts.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from agent.kube.api import ApiClient, ApiError, Interrupt, status_message
from agent.telemetry import event

PODS_PATH = "/api/v1/pods"
MAX_PODS = 20_000
"""Of one node; the kubelet's default limit is 110."""
_MAX_RETRY_AFTER_SECONDS = 300.0
_CHANGES = ("ADDED", "MODIFIED", "DELETED")

_log = logging.getLogger("spanloom.kube")


class WatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times and sizes of the protocol; the defaults are for clusters, tests shorten them."""

    page_objects: int = 500
    """Objects per list request. Older API servers ignore it when they answer from their cache."""

    watch_min_seconds: float = 240.0
    watch_max_seconds: float = 480.0
    """How long the server is asked to keep a watch open, drawn at random so that a fleet does not return in step."""

    grace_seconds: float = 15.0
    """A watch that is still open, or silent, for this much longer than asked for is given up."""

    healthy_seconds: float = 1.0
    """A watch that lasted this long, or brought an event, ends a series of failures."""

    backoff_initial_seconds: float = 1.0
    backoff_max_seconds: float = 60.0

    relist_calm_seconds: float = 120.0
    """Lists closer together than this are spaced by a back-off of their own: they are what costs the server most."""


class _Backoff:
    """Exponential with full jitter: anything between nothing and a bound that doubles."""

    def __init__(self, settings: WatchSettings) -> None:
        self._settings = settings
        self._bound_seconds = 0.0

    def reset(self) -> None:
        self._bound_seconds = 0.0

    def next_seconds(self) -> float:
        settings = self._settings
        bound_seconds = self._bound_seconds * 2 or settings.backoff_initial_seconds
        self._bound_seconds = min(bound_seconds, settings.backoff_max_seconds)
        return random.uniform(0.0, self._bound_seconds)


class _RelistError(Exception):
    """The watch cannot go on from its version. ``gone``: the server said so, which is no failure."""

    def __init__(self, error: ApiError, *, gone: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.gone = gone


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """What a watcher asks for. ``noun`` stands in messages; ``selector`` goes with every request.

    ``shrink`` is applied to each page of a list and turns objects into what ``on_replace`` gets: without it a list of
    ``at_most`` objects is held whole for a moment.
    """

    path: str
    noun: str
    at_most: int
    selector: dict[str, str] = {}
    shrink: Callable[[list[dict[str, Any]]], list[Any]] = list


class Watcher:
    """One thread that lists and watches. Counters may be read from any thread; each is monotonic and exact.

    ``clock`` is monotonic seconds. ``sleep`` waits that many seconds; the default ends early on ``stop``.
    """

    def __init__(
        self,
        client: ApiClient,
        watched: Watched,
        on_replace: Callable[[list[Any]], None],
        on_change: Callable[[str, dict[str, Any]], None],
        settings: WatchSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._client = client
        self._watched = watched
        self._on_replace = on_replace
        self._on_change = on_change
        self._settings = settings = settings or WatchSettings()
        self._clock = clock
        self._interrupt = Interrupt()
        self._sleep = sleep or self._interrupt.wait
        self._thread: threading.Thread | None = None
        self._version = ""  # the last one seen; empty before the first list and when the server no longer knows it
        self._must_list = True
        self._listed_once = False
        self._listed_at: float | None = None
        self._failure_backoff = _Backoff(settings)
        self._relist_backoff = _Backoff(settings)
        self._state = "new"
        self._forbidden_after: float | None = None  # the last success before the server forbade something

        self.lists = 0
        """Lists that were handed to ``on_replace``, of however many pages."""
        self.watches = 0
        """Watches that the server agreed to."""
        self.events = 0
        """Watch events taken in, bookmarks included."""
        self.relists = 0
        """Times a watch could not go on and everything was listed anew."""
        self.failures: Counter[str] = Counter()
        """By reason: those of ``ApiError``, and ``short_watch``, ``watch_error``, ``callback`` and ``internal``."""
        self.connected = False
        """Whether a watch is open, or ended so recently that nothing failed since."""
        self.last_success: float | None = None
        """The clock's seconds when the server last answered as it should; None before."""

    def start(self) -> None:
        """Begin; returns at once. May be called once."""
        if self._thread is not None:
            raise RuntimeError("the watcher was started already")
        self._thread = threading.Thread(target=self._run, name=f"kube-{self._watched.noun}", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> bool:
        """End the request in progress and the thread. False when it did not end in time (a callback that hangs).

        May be called twice, and without ``start``. No callback begins after it returned True.
        """
        self._interrupt.set()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        self.connected = False
        return True

    def _run(self) -> None:
        while not self._interrupt.is_set:
            delay_seconds = self._step()
            if delay_seconds > 0.0 and not self._interrupt.is_set:
                self._sleep(delay_seconds)

    def _step(self) -> float:
        """One list or one watch; the seconds to wait before the next. Raises nothing."""
        try:
            if self._must_list:
                self._list()
                return 0.0
            return self._watch()
        except _RelistError as relist:
            return self._plan_relist(relist)
        except ApiError as error:
            if error.reason == "interrupted":
                return 0.0
            return self._failed(error)
        except Exception as error:  # a defect here must not end the metadata of all pods for good
            return self._failed(ApiError(0, "internal", repr(error)))

    # ------------------------------------------------------------------------------------------------ list

    def _list(self) -> None:
        self._listed_at = self._clock()
        try:
            objects, version = self._read_list(self._settings.page_objects)
        except ApiError as error:
            if error.status not in (410, 504):
                raise
            # 410: a continue token expired between two pages, or the version did. 504: the server is behind the
            # version, for a moment or for ever. Without a version both end.
            self._version = ""
            if error.status == 504:
                raise
            objects, version = self._read_list(0)  # all at once: what expired between pages would expire again
        self._version = version
        self._must_list = False
        self._listed_once = True
        self.lists += 1
        self.last_success = self._clock()
        self._call(self._on_replace, objects)

    def _read_list(self, page_objects: int) -> tuple[list[Any], str]:
        watched = self._watched
        query: dict[str, object] = dict(watched.selector)
        if page_objects:
            query["limit"] = page_objects
        if not self._listed_once:
            query["resourceVersion"] = "0"
        elif self._version:
            # Without the match a limit would turn "at least this version" into "exactly this version".
            query |= {"resourceVersion": self._version, "resourceVersionMatch": "NotOlderThan"}
        objects: list[Any] = []
        seen_tokens: set[str] = set()
        while True:
            page = self._client.get(watched.path, query, interrupt=self._interrupt)
            metadata = page.get("metadata")
            items = page.get("items") or []  # null when there is none
            if not isinstance(metadata, dict) or not isinstance(items, list):
                raise ApiError(
                    0, "malformed", f"the API server answered the list of {watched.noun} with something else"
                )
            version, token = metadata.get("resourceVersion"), metadata.get("continue") or ""
            if not isinstance(version, str) or not version or not isinstance(token, str):
                raise ApiError(0, "malformed", f"the list of {watched.noun} has no resourceVersion")
            if not all(isinstance(item, dict) for item in items):
                raise ApiError(0, "malformed", f"the list of {watched.noun} holds something else")
            objects += watched.shrink(items)
            if len(objects) > watched.at_most:
                raise ApiError(0, "too_large", f"the list of {watched.noun} has more than {watched.at_most} objects")
            if not token:
                return objects, version
            if not items or token in seen_tokens:
                raise ApiError(0, "malformed", f"the list of {watched.noun} does not end")
            seen_tokens.add(token)
            # A continue token brings its version along; the server refuses another one beside it.
            query = watched.selector | {"limit": page_objects, "continue": token}

    # ------------------------------------------------------------------------------------------------ watch

    def _watch(self) -> float:
        settings = self._settings
        asked_seconds = random.uniform(settings.watch_min_seconds, settings.watch_max_seconds)
        query = self._watched.selector | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": max(1, round(asked_seconds)),
        }
        limit_seconds = asked_seconds + settings.grace_seconds
        try:
            stream = self._client.stream(self._watched.path, query, limit_seconds, interrupt=self._interrupt)
        except ApiError as error:
            if error.status == 410:
                raise _RelistError(error, gone=True) from error
            if error.status in (400, 404, 422, 504):  # the server cannot make sense of our version
                raise _RelistError(error, gone=False) from error
            raise
        started = self.last_success = self._clock()
        self.watches += 1
        self.connected = True
        self._enter("connected", logging.INFO, "kube_connected", watch=self._watched.noun, version=self._version)
        has_events = False
        broken: ApiError | None = None
        try:
            with stream:
                for message in stream:
                    self._take(message)
                    if not has_events:
                        has_events = True
                        self._failure_backoff.reset()
                    if self._clock() - started > limit_seconds:
                        break
        except ApiError as error:
            if error.reason in ("malformed", "too_large"):  # an event is lost, so the state is unknown
                raise _RelistError(error, gone=False) from error
            if error.reason == "interrupted":
                raise
            broken = error
        if self._clock() - started >= settings.healthy_seconds:
            self._failure_backoff.reset()
        elif broken is None and not has_events:
            # client-go's "very short watch": without this a server that ends each one at once is asked in a loop.
            broken = ApiError(0, "short_watch", "the API server ends watches at once")
            return self._failed(broken)
        if broken is None:
            # As agreed. A pause only when the server cut it short, lest one event at a time becomes a loop.
            return self._failure_backoff.next_seconds() if self._clock() - started < settings.healthy_seconds else 0.0
        # Load balancers and upgrades end watches all the time: counted, and a warning only if the next try fails too.
        self.failures[broken.reason] += 1
        self.connected = False
        event(_log, "kube_watch_interrupted", level=logging.DEBUG, reason=broken.reason, error=broken.message)
        return self._failure_backoff.next_seconds()

    def _take(self, message: dict[str, Any]) -> None:
        """One watch event."""
        kind, thing = message.get("type"), message.get("object")
        if not isinstance(thing, dict):
            raise ApiError(0, "malformed", "a watch event without an object")
        if kind == "ERROR":
            self._refused(thing)
        metadata = thing.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if not isinstance(version, str) or not version:
            raise ApiError(0, "malformed", "a watch event without a resourceVersion")
        if kind != "BOOKMARK" and kind not in _CHANGES:
            raise ApiError(0, "malformed", "a watch event of an unknown type")
        self.events += 1
        self.last_success = self._clock()
        if kind != "BOOKMARK":
            self._call(self._on_change, kind, thing)
        self._version = version

    def _refused(self, status: dict[str, Any]) -> None:
        """An ERROR event: the watch is over, and the server says why."""
        code = status.get("code")
        said = status_message(status) or "no message"
        if code == 410:
            raise _RelistError(ApiError(410, "gone", said), gone=True)
        error = ApiError(code if isinstance(code, int) else 0, "watch_error", f"the API server ends the watch: {said}")
        raise _RelistError(error, gone=False)

    # ------------------------------------------------------------------------------------------------ failure

    def _plan_relist(self, relist: _RelistError) -> float:
        self._must_list = True
        self.relists += 1
        if relist.gone:
            event(_log, "kube_relist", level=logging.DEBUG, reason="gone", error=relist.error.message)
            self.connected = False
            delay_seconds = 0.0
        else:
            delay_seconds = self._failed(relist.error)
        if self._listed_at is not None and self._clock() - self._listed_at < self._settings.relist_calm_seconds:
            return max(delay_seconds, self._relist_backoff.next_seconds())
        self._relist_backoff.reset()
        # All agents of a cluster hear of a restarted server at the same moment.
        return max(delay_seconds, random.uniform(0.0, self._settings.backoff_initial_seconds))

    def _failed(self, error: ApiError) -> float:
        """Count, say it once, and return how long to wait."""
        self.failures[error.reason] += 1
        self.connected = False
        # An API server that has just started forbids everything until it has read the roles. Who was allowed before is
        # told of a missing rule when it is missing the second time.
        may_be_starting = error.reason == "forbidden" and self._forbidden_after != self.last_success
        if error.reason == "forbidden":
            self._forbidden_after = self.last_success
        if not may_be_starting:
            values: dict[str, object] = {"status": error.status} if error.status else {}
            values["watch"] = self._watched.noun
            self._enter(
                error.reason, logging.WARNING, "kube_unavailable", reason=error.reason, error=error.message, **values
            )
        delay_seconds = self._failure_backoff.next_seconds()
        if error.retry_after_seconds:
            asked_seconds = min(error.retry_after_seconds, _MAX_RETRY_AFTER_SECONDS)
            delay_seconds = max(delay_seconds, asked_seconds * random.uniform(1.0, 1.1))
        return delay_seconds

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        """A consumer's defect is counted and logged; the watch goes on."""
        if self._interrupt.is_set:
            return
        try:
            callback(*arguments)
        except Exception as error:
            self.failures["callback"] += 1
            event(_log, "kube_callback_failed", level=logging.ERROR, error=repr(error))

    def _enter(self, state: str, level: int, name: str, **fields: object) -> None:
        """Log on the way into a state, not while it lasts."""
        if self._state != state:
            self._state = state
            event(_log, name, level=level, **fields)


class PodWatcher(Watcher):
    """The pods of one node."""

    def __init__(
        self,
        client: ApiClient,
        node_name: str,
        on_replace: Callable[[list[dict[str, Any]]], None],
        on_change: Callable[[str, dict[str, Any]], None],
        settings: WatchSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        selector = {"fieldSelector": f"spec.nodeName={node_name}"}
        watched = Watched(path=PODS_PATH, noun="pods", at_most=MAX_PODS, selector=selector)
        super().__init__(client, watched, on_replace, on_change, settings, clock, sleep)
