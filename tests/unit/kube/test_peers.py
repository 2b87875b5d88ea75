"""agent.kube.peers: which service and pod an address belongs to, and that nothing is guessed."""

from __future__ import annotations

from contextlib import suppress
from socket import AF_INET6, inet_pton

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kube.peers import Claims, PeerIndex, read_service, read_slice
from tests.apiserver import make_endpoint_slice, make_service


def packed(address: str) -> bytes:
    return inet_pton(AF_INET6, address if ":" in address else f"::ffff:{address}")


def named(index: PeerIndex, address: str, port: int) -> tuple[str, str, str] | None:
    """Service, namespace and pod of an address; None when it has no name."""
    found = dict(index.attributes(packed(address), port))
    if not found:
        return None
    names = ("service.peer.name", "service.peer.namespace", "spanloom.peer.pod.name")
    assert found.keys() <= {*names}
    return tuple(found.get(name, "") for name in names)


def filled(*items: dict, **options: int) -> PeerIndex:
    index = PeerIndex(**options)
    for item in items:
        index.change(read_service if item["kind"] == "Service" else read_slice, "ADDED", item)
    return index


CART = make_service("cart", "shop", "10.96.0.7", 80)
CART_PODS = make_endpoint_slice("cart", "shop", {"cart-a": "10.244.1.4", "cart-b": "10.244.2.5"}, 8080)


def test_a_service_and_its_pods_are_named() -> None:
    """The cluster address is the service, an endpoint is the pod behind it; other ports and addresses are nobody."""
    index = filled(CART, CART_PODS)
    assert named(index, "10.96.0.7", 80) == ("cart", "shop", "")
    assert named(index, "10.244.2.5", 8080) == ("cart", "shop", "cart-b")
    assert named(index, "10.96.0.7", 443) is None
    assert named(index, "10.244.2.5", 80) is None
    assert named(index, "10.244.9.9", 8080) is None
    assert index.addresses == 3


def test_a_pod_of_several_services_has_no_service() -> None:
    """A headless and a plain service select the same pods: the pod is known, and which service was meant is not."""
    index = filled(CART_PODS, make_endpoint_slice("cart-headless", "shop", {"cart-a": "10.244.1.4"}, 8080))
    assert named(index, "10.244.1.4", 8080) == ("", "shop", "cart-a")
    assert named(index, "10.244.2.5", 8080) == ("cart", "shop", "cart-b")


def test_an_address_of_several_pods_has_no_name() -> None:
    """Pods in the host's network share its address and, in different slices, may be said to share a port."""
    index = filled(
        make_endpoint_slice("a", "shop", {"a-1": "192.0.2.7"}, 9100),
        make_endpoint_slice("b", "bank", {"b-1": "192.0.2.7"}, 9100),
    )
    assert named(index, "192.0.2.7", 9100) is None


def test_the_address_of_a_service_is_nobody_elses() -> None:
    """An endpoint with the cluster address of a service (an alias) does not take its name away."""
    index = filled(CART, make_endpoint_slice("alias", "bank", {"alias-0": "10.96.0.7"}, 80))
    assert named(index, "10.96.0.7", 80) == ("cart", "shop", "")


def test_changes_and_deletions() -> None:
    """What a slice no longer says is forgotten, and the generation tells that something changed."""
    index = filled(CART_PODS)
    generation = index.generation
    index.change(read_slice, "MODIFIED", CART_PODS)
    assert index.generation == generation, "the same again"
    index.change(read_slice, "MODIFIED", CART_PODS | {"endpoints": CART_PODS["endpoints"][:1]})
    assert index.generation > generation
    assert named(index, "10.244.2.5", 8080) is None
    index.change(read_slice, "DELETED", CART_PODS)
    index.change(read_slice, "DELETED", CART_PODS)
    assert index.addresses == 0


def test_a_list_replaces_its_own_kind() -> None:
    """A list of slices says nothing of services."""
    index = filled(CART, CART_PODS)
    other = make_endpoint_slice("db", "shop", {"db-0": "10.244.3.1"}, 5432)
    index.replace("slice", index.shrink(read_slice, [other]))
    assert named(index, "10.96.0.7", 80) == ("cart", "shop", "")
    assert named(index, "10.244.1.4", 8080) is None
    assert named(index, "10.244.3.1", 5432) == ("db", "shop", "db-0")
    index.replace("service", [])
    assert index.addresses == 1


def test_headless_external_and_odd_objects() -> None:
    """No cluster address, host names, UDP, IPv6: nothing is invented; what is no object at all is counted."""
    headless = make_service("db", "shop", "None", 5432)
    both = make_service("dual", "shop", "10.96.0.9", 80)
    both["spec"] |= {"clusterIPs": ["10.96.0.9", "fd00::9"]}
    both["spec"]["ports"] += [{"port": 53, "protocol": "UDP"}, {"port": "http"}, {"port": 70_000}, None]
    fqdn = make_endpoint_slice("ext", "shop", {"ext": "db.example.com"}, 443)
    unowned = make_endpoint_slice("x", "shop", {"x-0": "10.244.1.9"}, 80)
    unowned["metadata"]["labels"] = None
    index = filled(headless, both, fqdn, unowned)
    assert named(index, "10.96.0.9", 80) == named(index, "fd00::9", 80) == ("dual", "shop", "")
    assert named(index, "10.244.1.9", 80) == ("", "shop", "x-0")
    assert index.addresses == 3
    assert index.malformed == 0
    for odd in ({}, {"metadata": None}, {"metadata": {"name": "x"}}, {"metadata": {"name": "x", "namespace": "y"}}):
        assert index.shrink(read_service, [odd]) == []
    assert index.malformed == 4


def test_the_bound() -> None:
    """Addresses beyond the bound have no name and are counted; what leaves makes room."""
    index = filled(CART, CART_PODS, max_claims=2)
    assert (index.addresses, index.overflowed) == (2, 1)
    index.change(read_service, "DELETED", CART)
    index.change(read_slice, "MODIFIED", CART_PODS)
    assert named(index, "10.244.2.5", 8080) == ("cart", "shop", "cart-b")


_KEYS = ("metadata", "name", "namespace", "labels", "spec", "clusterIPs", "clusterIP", "ports", "port", "protocol")
_KEYS += ("endpoints", "addresses", "targetRef", "kind", "kubernetes.io/service-name")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["10.0.0.1", "TCP", "Pod"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=6),
    max_leaves=30,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "endpoints", "ports"]), json_values))
@pytest.mark.parametrize("read", [read_service, read_slice])
def test_hostile_objects(read, item) -> None:
    """Whatever an object holds, it is read or refused with ValueError."""
    with suppress(ValueError):
        assert type(read(item)) is Claims


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ADDED", "DELETED"]), st.integers(0, 7)), max_size=30)
)
def test_what_is_left_is_what_was_said_last(events) -> None:
    """After any history, the index knows what one that saw only the last word on each object knows."""
    index, last = PeerIndex(), {}
    for name, kind, which in events:
        pods = {f"{name}-{bit}": f"10.0.0.{bit}" for bit in range(3) if which >> bit & 1}
        item = make_endpoint_slice(name, "shop", pods, 80)
        index.change(read_slice, kind, item)
        last[name] = item if kind == "ADDED" else None
    fresh = filled(*filter(None, last.values()))
    assert index.addresses == fresh.addresses
    for bit in range(3):
        assert named(index, f"10.0.0.{bit}", 80) == named(fresh, f"10.0.0.{bit}", 80)
