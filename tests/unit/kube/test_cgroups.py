"""Containers told from cgroup paths: every runtime, driver and layout, what is no container, hostile text."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.kube.cgroups import ContainerRef, container_of

ID = "5eed917563583925ffdbd40a64efb2aaffe58638e57add8becaf460fe74f5b1c"
OTHER = "0f99ad5f45163ed14ab8eaf92ed34bb4a631d007f8755a7d79be614bcb0df0ef"
NODE = "d6701ec289c56e4391acb11d07474b3139466857a305490575508a8b7a9fcf22"
UID = "2ca4a155-3599-498d-bb9d-4446693fa3ea"
UNDERSCORED = UID.replace("-", "_")
OTHER_UID = "91a8fc3a-0ecf-48b4-81bf-78a7275d348c"
HASH = "7a1e3c5f9b2d4068a1c3e5f708192a3b"
IN_POD = ContainerRef(ID, UID)
ALONE = ContainerRef(ID, "")

BURSTABLE = f"kubepods-burstable-pod{UNDERSCORED}.slice"
SYSTEMD = f"/kubepods.slice/kubepods-burstable.slice/{BURSTABLE}"
CGROUPFS = f"/kubepods/burstable/pod{UID}"
KIND = "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"


def v1(path: str, systemd: str | None = None, unified: str | None = None) -> str:
    """The file as a kernel with v1 hierarchies shows it; with ``unified`` it is the hybrid layout."""
    controllers = ("hugetlb", "memory", "cpu,cpuacct", "net_cls,net_prio", "pids", "devices")
    lines = [f"{12 - number}:{name}:{path}" for number, name in enumerate(controllers)]
    lines.append("2:rdma:/")
    lines.append(f"1:name=systemd:{path if systemd is None else systemd}")
    if unified is not None:
        lines.append(f"0::{unified}")
    return "\n".join(lines) + "\n"


def v2(path: str) -> str:
    return f"0::{path}\n"


CONTAINERS = {
    # containerd
    "containerd, systemd driver, v2": (v2(f"{SYSTEMD}/cri-containerd-{ID}.scope"), IN_POD),
    "containerd, systemd driver, v1": (v1(f"{SYSTEMD}/cri-containerd-{ID}.scope"), IN_POD),
    "containerd, systemd driver, hybrid": (v1(f"{SYSTEMD}/cri-containerd-{ID}.scope", unified="/"), IN_POD),
    "containerd, cgroupfs driver, v2": (v2(f"{CGROUPFS}/{ID}"), IN_POD),
    "containerd, cgroupfs driver, v1": (v1(f"{CGROUPFS}/{ID}"), IN_POD),
    "containerd, cgroupfs driver, hybrid, v2 shows the daemon": (
        v1(f"{CGROUPFS}/{ID}", unified="/system.slice/containerd.service"),
        IN_POD,
    ),
    "containerd, drivers mixed up": (v1(f"/{BURSTABLE}:cri-containerd:{ID}"), IN_POD),
    "containerd, drivers mixed up, below the daemon": (
        v1(f"/{BURSTABLE}:cri-containerd:{ID}", f"/system.slice/containerd.service/{BURSTABLE}:cri-containerd:{ID}"),
        IN_POD,
    ),
    "containerd, best effort": (
        v2(f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope"),
        IN_POD,
    ),
    # CRI-O
    "CRI-O, systemd driver": (v2(f"{SYSTEMD}/crio-{ID}.scope"), IN_POD),
    "CRI-O, crun's nested cgroup": (v2(f"{SYSTEMD}/crio-{ID}.scope/container"), IN_POD),
    "CRI-O, cgroupfs driver": (v1(f"{CGROUPFS}/crio-{ID}"), IN_POD),
    "CRI-O, cgroupfs driver, crun's nested cgroup": (v2(f"{CGROUPFS}/crio-{ID}/container"), IN_POD),
    # Docker
    "cri-dockerd, systemd driver": (v2(f"{SYSTEMD}/docker-{ID}.scope"), IN_POD),
    "cri-dockerd, cgroupfs driver": (v1(f"{CGROUPFS}/{ID}"), IN_POD),
    "Docker Desktop": (v1(f"/kubepods{CGROUPFS}/{ID}"), IN_POD),
    # Guaranteed pods have no QoS class in their path
    "guaranteed, systemd driver": (
        v2(f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope"),
        IN_POD,
    ),
    "guaranteed, cgroupfs driver": (v2(f"/kubepods/pod{UID}/{ID}"), IN_POD),
    "guaranteed, drivers mixed up": (v1(f"/kubepods-pod{UNDERSCORED}.slice:cri-containerd:{ID}"), IN_POD),
    # Static pods
    "static pod, systemd driver": (
        v2(f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice/cri-containerd-{ID}.scope"),
        ContainerRef(ID, HASH),
    ),
    "static pod, cgroupfs driver": (v2(f"/kubepods/burstable/pod{HASH}/{ID}"), ContainerRef(ID, HASH)),
    "static pod with a uid of its own": (v2(f"/kubepods/burstable/podlb.node-1/{ID}"), ContainerRef(ID, "lb.node-1")),
    "static pod with a uid of its own, systemd driver": (
        v2(f"/kubepods.slice/kubepods-podlb_node_1.slice/crio-{ID}.scope"),
        ContainerRef(ID, "lb-node-1"),
    ),
    # Distributions
    "k3s, cgroupfs driver": (v2(f"/kubepods/besteffort/pod{UID}/{ID}"), IN_POD),
    "k3s, v1, below its own service": (
        v1(f"{CGROUPFS}/{ID}", f"/system.slice/k3s.service{CGROUPFS}/{ID}", "/system.slice/k3s.service"),
        IN_POD,
    ),
    "k3s, rootless": (
        v2(f"/user.slice/user-1000.slice/user@1000.service/user.slice/k3s-rootless.scope{CGROUPFS}/{ID}"),
        IN_POD,
    ),
    "k3d": (v1(f"/docker/{NODE}{CGROUPFS}/{ID}"), IN_POD),
    "kind, v2, seen from the host": (
        v2(
            f"/system.slice/docker-{NODE}.scope{KIND}/kubelet-kubepods-besteffort-pod{UNDERSCORED}.slice/"
            f"cri-containerd-{ID}.scope"
        ),
        IN_POD,
    ),
    "kind, v2, seen from the node": (
        v2(f"{KIND}/kubelet-kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope"),
        IN_POD,
    ),
    "kind, guaranteed": (
        v2(
            f"/docker/{NODE}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORED}.slice/"
            f"cri-containerd-{ID}.scope"
        ),
        IN_POD,
    ),
    "kind, v1": (v1(f"/docker/{NODE}/kubelet{CGROUPFS}/{ID}"), IN_POD),
    "kind, rootless Podman": (
        v2(
            f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{NODE}.scope/container{KIND}/"
            f"kubelet-kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope"
        ),
        IN_POD,
    ),
    "minikube with CRI-O": (v1(f"/docker/{NODE}{SYSTEMD}/crio-{ID}.scope"), IN_POD),
    "Talos": (v2(f"/kubepods/besteffort/pod{UID}/{ID}"), IN_POD),
    "Talos in Docker": (v2(f"/docker/{NODE}/kubepods/burstable/pod{UID}/{ID}"), IN_POD),
    "node in LXC": (v2(f"/lxc.payload.node-1{SYSTEMD}/cri-containerd-{ID}.scope"), IN_POD),
    "Kata's shim": (v2(f"{CGROUPFS}/kata_{ID}"), IN_POD),
    # Cgroup namespaces
    "namespace, systemd driver, another class": (
        v2(f"/../../../kubepods-burstable.slice/{BURSTABLE}/cri-containerd-{ID}.scope"),
        IN_POD,
    ),
    "namespace, systemd driver, same class": (v2(f"/../../{BURSTABLE}/cri-containerd-{ID}.scope"), IN_POD),
    "namespace, drivers mixed up": (v2(f"/../{BURSTABLE}:cri-containerd:{ID}"), IN_POD),
    "namespace, cgroupfs driver, another class": (v2(f"/../../../burstable/pod{UID}/{ID}"), IN_POD),
    "namespace, cgroupfs driver, same class": (v2(f"/../../pod{UID}/{ID}"), IN_POD),
    "namespace, cgroupfs driver, static pod": (v2(f"/../../pod{HASH}/{ID}"), ContainerRef(ID, HASH)),
    "namespace, same pod, systemd driver": (v2(f"/../cri-containerd-{ID}.scope"), ALONE),
    "namespace, same pod, cgroupfs driver": (v2(f"/../{ID}"), ALONE),
    # What containers make themselves
    "systemd in the container": (v2(f"{CGROUPFS}/{ID}/init.scope"), IN_POD),
    "a service in the container": (v2(f"{SYSTEMD}/cri-containerd-{ID}.scope/system.slice/nginx.service"), IN_POD),
    "Docker in a pod": (v1(f"{CGROUPFS}/{ID}/docker/{OTHER}"), IN_POD),
    "kind in a pod": (v2(f"{CGROUPFS}/{ID}/docker/{NODE}/kubelet/kubepods/burstable/pod{OTHER_UID}/{OTHER}"), IN_POD),
    "a container posing as another pod": (
        v2(f"{SYSTEMD}/crio-{ID}.scope/kubepods.slice/kubepods-pod{OTHER_UID}.slice/crio-{OTHER}.scope"),
        IN_POD,
    ),
    "a container with a cgroup called conmon": (v2(f"{CGROUPFS}/{ID}/crio-conmon-{OTHER}"), IN_POD),
    # Other ids
    "a UUID": (v2(f"{CGROUPFS}/{OTHER_UID}"), ContainerRef(OTHER_UID, UID)),
    "a short id": (v2(f"{CGROUPFS}/5eed91756358"), ContainerRef("5eed91756358", UID)),
    "Fargate": (
        v1(f"/ecs/{HASH}/{HASH}-3054012820"),
        ContainerRef(f"{HASH}-3054012820", ""),
    ),
    "ECS": (v1(f"/ecs/{OTHER_UID}/{ID}"), ALONE),
    # Outside of Kubernetes
    "Docker, v1": (v1(f"/docker/{ID}", unified="/system.slice/containerd.service"), ALONE),
    "Docker, v1, Debian's old form": (v1(f"/{ID}"), ALONE),
    "Docker, v2": (v2(f"/system.slice/docker-{ID}.scope"), ALONE),
    "Docker in Docker": (v2(f"/system.slice/docker-{ID}.scope/docker/{OTHER}"), ALONE),
    "Docker, cgroup parent, drivers mixed up": (v1(f"/system.slice:docker:{ID}"), ALONE),
    "Podman": (v2(f"/machine.slice/libpod-{ID}.scope/container"), ALONE),
    "Podman, rootless": (
        v2(f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope"),
        ALONE,
    ),
    "Podman, cgroupfs driver": (v2(f"/libpod_parent/libpod-{ID}"), ALONE),
    "nerdctl": (v2(f"/system.slice/nerdctl-{ID}.scope"), ALONE),
    "a node's own process in kind": (v2(f"/docker/{ID}/system.slice/containerd.service"), ALONE),
    # The file
    "a cgroup that was removed": (v2(f"{CGROUPFS}/{ID} (deleted)"), IN_POD),
    "no newline at the end": (f"0::{CGROUPFS}/{ID}", IN_POD),
    "a pod in a later line": (f"0::/docker/{OTHER}\n4:memory:/docker/{OTHER}\n3:pids:{CGROUPFS}/{ID}\n", IN_POD),
    "lines that disagree: v2 is asked first": (
        f"4:memory:{CGROUPFS}/{OTHER}\n1:name=systemd:{CGROUPFS}/{OTHER}\n0::{CGROUPFS}/{ID}\n",
        IN_POD,
    ),
    "lines that disagree: systemd is asked before controllers": (
        f"4:memory:{CGROUPFS}/{OTHER}\n1:name=systemd:{CGROUPFS}/{ID}\n0::/\n",
        IN_POD,
    ),
    "broken lines beside a good one": (f"\n::\nx\n0:\n7:cpu\n{'y' * 5000}\n0::{CGROUPFS}/{ID}\n", IN_POD),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_containers_are_found_in_every_layout(text: str, expected: ContainerRef) -> None:
    """The id of the container that the runtime made, and the pod's uid as the API writes it."""
    assert container_of(text) == expected


NO_CONTAINERS = {
    "empty": "",
    "root": v2("/"),
    "root, v1": v1("/", unified="/"),
    "init": v2("/init.scope"),
    "a service": v2("/system.slice/nginx.service"),
    "a session": v2("/user.slice/user-1000.slice/session-3.scope"),
    "a session with a long number": v2("/user.slice/user-1000.slice/session-123456789012.scope"),
    "systemd-run": v2(f"/system.slice/run-r{HASH}.scope"),
    "kubelet": v2("/system.slice/kubelet.service"),
    "containerd and its shims": v2("/system.slice/containerd.service"),
    "the agent itself": v2("/"),
    "a neighbour without a name": v2("/.."),
    "conmon, in the pod": v2(f"{SYSTEMD}/crio-conmon-{ID}.scope"),
    "conmon, in the pod, cgroupfs driver": v1(f"{CGROUPFS}/crio-conmon-{ID}"),
    "conmon, outside of the pod": v2(f"/system.slice/crio-conmon-{ID}.scope"),
    "conmon, in a slice of its own": v2(f"/conmon.slice/crio-conmon-{ID}.scope"),
    "conmon, drivers mixed up": v1(f"/{BURSTABLE}:crio-conmon:{ID}"),
    "conmon of Podman": v2(f"/machine.slice/libpod-conmon-{ID}.scope"),
    "the pod itself, systemd driver": v2(SYSTEMD),
    "the pod itself, cgroupfs driver": v2(CGROUPFS),
    "all pods": v2("/kubepods/burstable"),
    "Talos: runtime": v2("/podruntime/runtime"),
    "Talos: kubelet": v2("/podruntime/kubelet"),
    "Talos: a service": v2("/system/apid"),
    "Podman's service": v2("/system.slice/podman.service"),
    "Podman's pod": v2(f"/machine.slice/machine-libpod_pod_{ID}.slice"),
    "pod in a name": v2("/system.slice/podinfo.service/pods/podcast"),
    "pod and a number": v2("/system.slice/pod1234/5eed91756358"),
    "kubepods in a name": v2("/system.slice/mykubepods-exporter.service"),
    "LXC": v2("/lxc.payload.web/system.slice/nginx.service"),
    "ctr": v2("/default/web"),
    "id one digit short": v2(f"/docker/{ID[1:]}"),
    "id one digit long": v2(f"/docker/{ID}0"),
    "id in upper case": v2(f"/docker/{ID.upper()}"),
    "not a cgroup file": f"{CGROUPFS}/{ID}",
    "a path that does not begin at the root": f"0::kubepods/burstable/pod{UID}/{ID}",
    "spaces": v2(f"/docker/ {ID}"),
}


@pytest.mark.parametrize("text", NO_CONTAINERS.values(), ids=NO_CONTAINERS.keys())
def test_everything_else_is_no_container(text: str) -> None:
    """Host and system processes, a runtime's own helpers, and names that only look alike."""
    assert container_of(text) is None


def test_what_is_behind_the_bound_is_as_if_absent() -> None:
    """64 KiB of text and 64 lines are looked at."""
    line = f"0::{CGROUPFS}/{ID}\n"
    assert container_of("1:cpu:/a\n" * 63 + line) == IN_POD
    assert container_of("1:cpu:/a\n" * 64 + line) is None
    assert container_of(f"1:cpu:/{'a' * 64 * 1024}\n{line}") is None


PIECES = st.sampled_from(
    ("/", "..", ":", "-", "_", "0::", "1:name=systemd:", "\n", "kubepods", "kubepods.slice", "burstable", "pod",
     ".slice", ".scope", "cri-containerd", "crio-conmon", "docker", "ecs", "container", " (deleted)", ID, UID,
     UNDERSCORED, HASH, "kubepods-pod", "/kubepods/", "é", "\0")
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join)))
@example("0::/" + "-" * 60_000)
@example("0::/" + "kubepods-" * 7_000)
@example("0::/" + "a" * 60_000 + ".scope")
@example("0::/kubepods/" + "pod" * 20_000)
@example("0::/kubepods-pod" + "a_" * 30_000 + ".slice")
@example("0::" + "/pod" * 16_000)
def test_any_text_is_safe(text: str) -> None:
    """Nothing raises; what comes out has the shape of an id and of a uid."""
    ref = container_of(text)
    if ref is not None:
        assert re.fullmatch(r"[0-9a-f-]{12,128}", ref.container_id)
        assert re.fullmatch(r"[0-9A-Za-z.-]{0,128}", ref.pod_uid)
