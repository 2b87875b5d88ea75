"""agent.kube.directory: what is known of a container's pod, by its cgroup's text or number."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.kube.cgroups import ContainerRef
from agent.kube.directory import PodDirectory, cgroup_roots
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


def test_a_cgroup_is_found_by_its_number(tmp_path: Path):
    """The number of a cgroup is that of its directory; one that is not there, or no container, is nothing."""
    container = tmp_path / SLICE / f"cri-containerd-{ID}.scope"
    container.mkdir(parents=True)
    other = tmp_path / "system.slice" / "ssh.service"
    other.mkdir(parents=True)
    pods = directory(roots=lambda: (str(tmp_path / "absent"), str(tmp_path)))
    assert pods.container_of_id(container.stat().st_ino) == REF
    assert pods.container_of_id(other.stat().st_ino) is None
    gone = container.stat().st_ino
    container.rmdir()
    assert pods.container_of_id(gone) is None


def test_a_cgroup_is_told_from_another_by_its_number(tmp_path: Path):
    """Of what is not there, or stands elsewhere as seen from another cgroup namespace, nothing is said."""
    container = tmp_path / SLICE / f"cri-containerd-{ID}.scope"
    container.mkdir(parents=True)
    number = container.stat().st_ino
    pods = directory(roots=lambda: (str(tmp_path / "absent"), str(tmp_path)))
    assert pods.is_id_of(number, CGROUP) is True
    assert pods.is_id_of(number + 1, CGROUP) is False
    assert pods.is_id_of(tmp_path.stat().st_ino, b"0::/\n") is True
    assert pods.is_id_of(number, f"0::/../{tmp_path.name}/x/{SLICE}\n".encode()) is None
    assert pods.is_id_of(number, b"0::/gone\xff\0\n") is None
    assert directory(roots=lambda: ()).is_id_of(number, CGROUP) is None


def test_a_container_in_a_rootless_node_is_found(tmp_path: Path):
    """Rootless Podman, in it a node of kind, in it a container that crun made: nothing nests deeper."""
    above = "user.slice/user-1000.slice/user@1000.service/user.slice/libpod-1.scope/container/kubelet.slice"
    container = tmp_path / above / SLICE / f"crio-{ID}.scope" / "container"
    container.mkdir(parents=True)
    assert directory(roots=lambda: (str(tmp_path),)).container_of_id(container.stat().st_ino) == REF


def test_a_search_for_a_cgroup_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However many directories there are, and however deep, the search is bounded."""
    container = tmp_path / "a" / "b" / "c" / SLICE / f"cri-containerd-{ID}.scope"
    container.mkdir(parents=True)
    pods = directory(roots=lambda: (str(tmp_path),))
    assert pods.container_of_id(container.stat().st_ino) == REF
    monkeypatch.setattr("agent.kube.directory._CGROUPS", 3)
    assert pods.container_of_id(container.stat().st_ino) is None
    monkeypatch.undo()
    deep = tmp_path.joinpath(*"abcdefghijklmn", SLICE, f"cri-containerd-{ID}.scope")
    deep.mkdir(parents=True)
    assert pods.container_of_id(deep.stat().st_ino) is None


def test_only_the_unified_hierarchy_has_the_kernels_numbers(tmp_path: Path):
    """Mounts of cgroup v2 count, as the host's first process and this one see them; those of v1 do not."""
    for process in ("1", "self"):
        (tmp_path / process).mkdir()
    (tmp_path / "1" / "mounts").write_text(
        "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nproc /proc proc rw 0 0\n\nodd\n"
    )
    (tmp_path / "self" / "mounts").write_text("cgroup2 /sys/fs/cgroup cgroup2 ro 0 0\n")
    assert cgroup_roots(str(tmp_path)) == [f"{tmp_path}/1/root/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
    assert cgroup_roots(str(tmp_path / "absent")) == []


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
