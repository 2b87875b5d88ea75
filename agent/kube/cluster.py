"""One agent's connection to its cluster: the directory of pods, the watch that fills it, and events.

In: the configuration and the environment of the agent's own pod. Out: a ``Cluster``, or None outside of one. Never:
a wait, or an exception, because the API server is away: tracing goes on with what is known.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import ConfigError, SpanloomError
from agent.kube.directory import PodDirectory
from agent.kube.select import PodRules
from agent.telemetry import event

if TYPE_CHECKING:
    from agent.config import Config
    from agent.kube.peers import PeerIndex
    from agent.kube.watch import PodWatcher, Watcher

MAX_PEER_OBJECTS = 100_000
"""Services, or endpoint slices, of the whole cluster."""

_log = logging.getLogger("spanloom.kube")


class Cluster:
    """Watches the pods of one node. ``directory`` answers from the first moment on, with what is known by then.

    ``node_name`` is the host's name, too: that of the agent's own pod would change with every rollout.
    """

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        """Raises ConfigError when this is no pod, or the name of the node is not known."""
        # TLS and JSON over HTTP cost 8 MB: only where there is an API server.
        from agent.kube.api import ApiClient, InClusterConfig
        from agent.kube.watch import PodWatcher

        node_name = config.kubernetes.node_name or environ.get("NODE_NAME", "")
        if not node_name:
            raise ConfigError(
                "kubernetes.node_name: missing; set it, or the environment variable NODE_NAME from spec.nodeName"
            )
        self.node_name = node_name
        self.directory = PodDirectory(
            _rules(config),
            node_name=node_name,
            cluster_name=config.kubernetes.cluster_name or "",
            use_labels=config.kubernetes.use_labels,
        )
        self.client = ApiClient(InClusterConfig.load(Path(config.kubernetes.service_account), environ))
        self.watcher: PodWatcher = PodWatcher(self.client, node_name, self.directory.replace, self.directory.change)
        self.peers: PeerIndex | None = None
        self.peer_watchers: list[Watcher] = []
        if config.kubernetes.peers:
            self._name_peers()
        self._own_pod = tuple(environ.get(name, "") for name in ("POD_NAMESPACE", "POD_NAME", "POD_UID"))

    def _name_peers(self) -> None:
        from agent.kube import peers
        from agent.kube.watch import Watched, Watcher, WatchSettings

        self.peers = index = peers.PeerIndex()
        for kind, path, noun, read, page_objects in (
            ("service", peers.SERVICES_PATH, "services", peers.read_service, 500),
            ("slice", peers.SLICES_PATH, "endpointslices", peers.read_slice, 100),  # of a hundred endpoints each
        ):
            self.peer_watchers.append(
                Watcher(
                    self.client,
                    Watched(path=path, noun=noun, at_most=MAX_PEER_OBJECTS, shrink=partial(index.shrink, read)),
                    partial(index.replace, kind),
                    partial(index.change, read),
                    WatchSettings(page_objects=page_objects),
                )
            )

    @classmethod
    def of(cls, config: Config, environ: Mapping[str, str]) -> Cluster | None:
        """The cluster that the configuration asks for; ``auto``: when this pod has a node's name and an account."""
        enabled = config.kubernetes.enabled
        if enabled == "off":
            return None
        if enabled == "auto":
            if not environ.get("KUBERNETES_SERVICE_HOST"):
                return None
            try:
                return cls(config, environ)
            except ConfigError as error:
                # A pod that was not given what the chart gives: it still traces the node's processes.
                event(_log, "kubernetes_off", level=logging.WARNING, reason=str(error))
                return None
        return cls(config, environ)

    def configure(self, config: Config) -> None:
        """Describe and select pods by other settings from now on."""
        self.directory.configure(
            _rules(config),
            cluster_name=config.kubernetes.cluster_name or "",
            use_labels=config.kubernetes.use_labels,
        )

    def start(self) -> None:
        """Begin to watch."""
        for watcher in (self.watcher, *self.peer_watchers):
            watcher.start()

    def stop(self) -> None:
        """Stop watching; takes at most two seconds."""
        deadline = time.monotonic() + 2.0
        for watcher in (self.watcher, *self.peer_watchers):
            watcher.stop(max(0.0, deadline - time.monotonic()))

    def report(self, reason: str, message: str) -> None:
        """Write an Event about the agent's own pod, without waiting for it; what prevents it is logged."""
        namespace, name, uid = self._own_pod
        if not namespace or not name:
            return

        def post() -> None:
            error = self.client.post_event(namespace, name, uid, reason, message)
            if error is not None:
                event(_log, "kube_event_not_written", level=logging.WARNING, error=str(error))

        threading.Thread(target=post, name="kube-event", daemon=True).start()


def report_failure(error: SpanloomError, environ: Mapping[str, str], account: Path | None = None) -> None:
    """Write an Event about the agent's own pod, which ends with this error: ``kubectl describe`` shows it between the
    restarts. Takes three seconds at most; where there is no service account or no API server, nothing happens.
    """
    from agent.kube.api import SERVICE_ACCOUNT_DIRECTORY, ApiClient, InClusterConfig

    namespace, name, uid = (environ.get(variable, "") for variable in ("POD_NAMESPACE", "POD_NAME", "POD_UID"))
    reason = "ConfigRefused" if isinstance(error, ConfigError) else "AgentFailed"
    if not namespace or not name:
        return
    try:
        client = ApiClient(InClusterConfig.load(account or SERVICE_ACCOUNT_DIRECTORY, environ))
    except ConfigError:
        return
    thread = threading.Thread(target=client.post_event, args=(namespace, name, uid, reason, str(error)), daemon=True)
    thread.start()
    thread.join(3.0)


def _rules(config: Config) -> PodRules:
    rules = config.select.kubernetes
    return PodRules(
        rules.namespaces.include,
        rules.namespaces.exclude,
        rules.labels,
        rules.containers.include,
        rules.containers.exclude,
        rules.annotation,
    )
