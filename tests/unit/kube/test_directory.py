"""agent.kube.directory: what is known of a container's pod, by its cgroup's text."""

from __future__ import annotations

from agent.kube.cgroups import ContainerRef
from agent.kube.directory import PodDirectory
from agent.kube.select import PodRules
from tests.apiserver import make_pod

UID = "0f0d2c1e-6f0a-4b8e-9c55-2f5f3c0b6a11"
ID = "ab" * 32
SLICE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice"
CGROUP = f"0::/{SLICE}/cri-containerd-{ID}.scope\n".encode()
REF = ContainerRef(ID, UID)


def directory(**settings) -> PodDirectory:
    return PodDirectory(PodRules(), node_name="node-a", **settings)


def pod(**fields):
    return make_pod("cart", "shop", "node-a", {"app": ID}, uid=UID, **fields)


def test_a_container_before_its_pod_is_known():
    """It is captured, and says of itself what its cgroup tells."""
    placement = directory().place(REF, {})
    assert (placement.known, placement.selected) == (False, True)
    assert dict(placement.attributes) == {"k8s.node.name": "node-a", "k8s.pod.uid": UID, "container.id": ID}


def test_a_pod_comes_changes_and_goes():
    """Each change is another generation; what is gone is still known for a while."""
    pods = directory()
    seen = [pods.generation]
    pods.change("ADDED", pod())
    seen.append(pods.generation)
    placement = pods.place(REF, {})
    assert placement.known
    assert dict(placement.attributes)["k8s.pod.name"] == "cart"
    assert dict(placement.facts) == {"namespace": "shop", "pod": "cart", "container": "app"}
    pods.change("MODIFIED", pod(annotations={"spanloom.io/trace": "false"}))
    seen.append(pods.generation)
    assert not pods.place(REF, {}).selected
    pods.change("DELETED", pod())
    assert pods.pods == 0
    assert pods.place(REF, {}).known
    pods.configure(PodRules(), cluster_name="c", use_labels=False)
    seen.append(pods.generation)
    assert len(set(seen)) == len(seen)
    assert dict(pods.place(REF, {}).attributes)["k8s.cluster.name"] == "c"


def test_a_list_replaces_everything():
    """And what is no pod is counted, without harm to the others."""
    pods = directory()
    pods.replace([{"kind": "Pod"}, pod(), {}])
    assert (pods.pods, pods.malformed) == (1, 2)
    pods.replace([])
    assert pods.pods == 0


def test_a_container_that_is_not_of_kubernetes():
    """Plain Docker is a program of the host."""
    assert directory().container_of(b"0::/system.slice/docker-" + b"cd" * 32 + b".scope\n") is None
    assert directory().container_of(CGROUP) == REF
    assert directory().container_of(b"0::/user.slice\n") is None
    assert directory().container_of(b"\xff\xfe") is None


def test_an_unknown_static_pod_has_no_uid():
    """The path of a static pod has the hash of its manifest; that is not shown as the pod's uid."""
    attributes = dict(directory().place(ContainerRef(ID, "d4" * 16), {}).attributes)
    assert "k8s.pod.uid" not in attributes
    assert attributes["container.id"] == ID


def test_a_placement_is_current_until_something_of_it_changes():
    """Other pods' changes do not make it outdated; its own pod's, and those of the rules, do."""
    pods = directory()
    unknown = pods.place(REF, {})
    pods.change("ADDED", make_pod("other", "shop", "node-a", {"app": "cd" * 32}, uid=UID.replace("0", "1")))
    assert pods.is_current(unknown)
    pods.change("ADDED", pod())
    assert not pods.is_current(unknown)
    placed = pods.place(REF, {})
    pods.change("MODIFIED", pod())
    assert pods.is_current(placed)
    pods.change("MODIFIED", pod(annotations={"spanloom.io/trace": "false"}))
    assert not pods.is_current(placed)
    placed = pods.place(REF, {})
    pods.configure(PodRules(), cluster_name="", use_labels=False)
    assert not pods.is_current(placed)
