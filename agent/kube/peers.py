"""Names for the other ends of client calls: the address that was called -> the service, and the pod behind it.

In: Services and EndpointSlices of the whole cluster, as lists and watches give them, cut down on arrival to addresses,
ports and names. Out: attributes of a called address and port. Never: a request to the API server, an exception for an
object that makes no sense (counted), or a name where several are possible.

Only what was called is named. Who called has a port of no service, and its address may be a node's, from where anything
may have called; within a node the trace itself tells.

Pods are not watched: an EndpointSlice (discovery.k8s.io/v1) has the addresses and names of those that anything selects,
in a tenth of the bytes. Sources: Kubernetes API reference, Service ``spec.clusterIPs`` and EndpointSlice ``endpoints``;
semantic conventions, ``service.peer.name`` and ``service.peer.namespace``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

import msgspec

from agent.model import Attributes

SERVICES_PATH = "/api/v1/services"
SLICES_PATH = "/apis/discovery.k8s.io/v1/endpointslices"

MAX_CLAIMS = 400_000
"""Addresses with a port, of services and endpoints together (about 100 bytes each); what comes after that is counted as
``overflowed`` and has no name."""

_OF_SERVICE = "kubernetes.io/service-name"
_TCP = (None, "TCP")

Endpoint = tuple[bytes, int]
"""16 bytes of address, IPv4 as IPv4-mapped IPv6, and a port in host byte order."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What one object says of an address. ``pod`` is empty for the address of the service itself."""

    namespace: str
    service: str
    pod: str


class Claims(msgspec.Struct, frozen=True, gc=False):
    """What is kept of one Service or EndpointSlice: ``key`` is its kind, namespace and name."""

    key: str
    claims: tuple[tuple[Endpoint, Claim], ...]


def read_service(item: Mapping[str, Any]) -> Claims:
    """The cluster addresses of a Service with their TCP ports. Raises ValueError for what is none."""
    namespace, name = _identity(item)
    spec = item.get("spec")
    if not isinstance(spec, dict):
        raise ValueError("a service without a spec")
    addresses = [*_packed(_texts(spec.get("clusterIPs")) or _texts([spec.get("clusterIP")]))]
    ports = [port for port in _objects(spec.get("ports")) if port.get("protocol") in _TCP]
    numbers = [port["port"] for port in ports if _is_port(port.get("port"))]
    claim = Claim(namespace, name, "")
    return Claims(f"service/{namespace}/{name}", tuple(((a, n), claim) for a in addresses for n in numbers))


def read_slice(item: Mapping[str, Any]) -> Claims:
    """The addresses of an EndpointSlice with their TCP ports. Raises ValueError for what is none."""
    namespace, name = _identity(item)
    labels = item["metadata"].get("labels")
    service = labels.get(_OF_SERVICE) if isinstance(labels, dict) else None
    if not isinstance(service, str):
        service = ""
    ports = [port for port in _objects(item.get("ports")) if port.get("protocol") in _TCP]
    numbers = [port["port"] for port in ports if _is_port(port.get("port"))]
    claims = []
    for endpoint in _objects(item.get("endpoints")):
        target = endpoint.get("targetRef")
        pod = ""
        if isinstance(target, dict) and target.get("kind") == "Pod" and isinstance(target.get("name"), str):
            pod = target["name"]
        if not service and not pod:
            continue
        claim = Claim(namespace, service, pod)
        claims += [((a, n), claim) for a in _packed(_texts(endpoint.get("addresses"))) for n in numbers]
    return Claims(f"slice/{namespace}/{name}", tuple(claims))


class PeerIndex:
    """The names behind addresses. The threads of the watches write, the pipeline reads.

    Readers call ``dict.get`` and see finished, frozen records without a lock: see ``agent.kube.pods.PodIndex``. Writers
    take turns. ``generation`` moves after a change is in place.
    """

    def __init__(self, max_claims: int = MAX_CLAIMS) -> None:
        self._max_claims = max_claims
        self._writing = threading.Lock()
        self._objects: dict[str, Claims] = {}
        self._names: dict[Endpoint, tuple[Claim, ...]] = {}
        self._claims = 0
        self.generation = 0
        self.malformed = 0
        """Objects of the API server that are no services or slices."""
        self.overflowed = 0
        """Addresses that were not taken in because of the bound."""

    @property
    def addresses(self) -> int:
        """Addresses with a port that have a claim."""
        return len(self._names)

    def attributes(self, address: bytes, port: int) -> Attributes:
        """Span attributes of a called address; empty for one that is not known, or that has no one name.

        A pod behind several services has a name and no service.
        """
        claims = self._names.get((address, port))
        if claims is None:
            return ()
        named = [claim for claim in claims if not claim.pod] or claims  # a service's own address is nobody else's
        first = named[0]
        if any(claim.namespace != first.namespace or claim.pod != first.pod for claim in named):
            return ()
        services = {claim.service for claim in named}
        attributes: Attributes = ()
        if len(services) == 1 and first.service:
            attributes = (("service.peer.name", first.service),)
        attributes += (("service.peer.namespace", first.namespace),)
        return (*attributes, ("spanloom.peer.pod.name", first.pod)) if first.pod else attributes

    # -- for the watches

    def shrink(self, read: Callable[[Mapping[str, Any]], Claims], items: Iterable[dict[str, Any]]) -> list[Claims]:
        """What is kept of a page of a list: the objects themselves would fill the memory."""
        kept = []
        for item in items:
            try:
                kept.append(read(item))
            except ValueError:
                self.malformed += 1
        return kept

    def replace(self, kind: str, listed: Iterable[Claims]) -> None:
        """These are all objects of a kind ("service" or "slice")."""
        kept = {one.key: one for one in listed}
        with self._writing:
            for key in [key for key in self._objects if key.startswith(kind + "/") and key not in kept]:
                self._withdraw(key)
            for one in kept.values():
                self._put(one)
            self.generation += 1

    def change(self, read: Callable[[Mapping[str, Any]], Claims], kind: str, item: dict[str, Any]) -> None:
        """One event of a watch: ADDED, MODIFIED or DELETED."""
        for one in self.shrink(read, [item]):
            with self._writing:
                before = self._objects.get(one.key)
                if kind == "DELETED":
                    self._withdraw(one.key)
                else:
                    self._put(one)
                if self._objects.get(one.key) is not before:
                    self.generation += 1

    def _put(self, one: Claims) -> None:
        if self._objects.get(one.key) == one:
            return
        self._withdraw(one.key)
        room = self._max_claims - self._claims
        if len(one.claims) > room:
            self.overflowed += len(one.claims) - room
            one = Claims(one.key, one.claims[:room])
        self._objects[one.key] = one
        self._claims += len(one.claims)
        for endpoint, claim in one.claims:
            self._names[endpoint] = (*self._names.get(endpoint, ()), claim)

    def _withdraw(self, key: str) -> None:
        one = self._objects.pop(key, None)
        if one is None:
            return
        self._claims -= len(one.claims)
        for endpoint, claim in one.claims:
            left = list(self._names.get(endpoint, ()))
            if claim in left:
                left.remove(claim)
            if left:
                self._names[endpoint] = tuple(left)
            else:
                self._names.pop(endpoint, None)


def _identity(item: Mapping[str, Any]) -> tuple[str, str]:
    metadata = item.get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError("an object without metadata")
    namespace, name = metadata.get("namespace"), metadata.get("name")
    if not isinstance(namespace, str) or not isinstance(name, str) or not namespace or not name:
        raise ValueError("an object without a name")
    return namespace, name


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _is_port(value: Any) -> bool:
    return type(value) is int and 0 < value < 65536


def _packed(addresses: Iterable[str]) -> Iterable[bytes]:
    """The bytes of those that are addresses; "None" (headless) and host names are not."""
    for address in addresses:
        try:
            if ":" in address:
                yield inet_pton(AF_INET6, address)
            else:
                yield bytes(10) + b"\xff\xff" + inet_pton(AF_INET, address)
        except OSError:
            continue
