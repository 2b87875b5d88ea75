#!/usr/bin/env python3
"""Boots a stock Debian kernel in QEMU and runs the probes in it: ``tools/vm.py KERNEL`` (5.10, 6.1, 6.12 or sid).

In: the built BPF objects and the agent's kernel stage. Out: what tests/vm/load.py prints there, and its exit code. With
``--fentry`` the functions of TCP are followed there, too (docs/adr/0017). With ``--counted`` there is one processor,
whose clock counts instructions, and what the backends cost is printed instead. With ``--lockdown`` the kernel forbids
to read its memory (kernel_lockdown(7), confidentiality), and what becomes of the probes is printed.
Kernels and the root file system are made once and kept in a cache (SPANLOOM_CACHE, else ~/.cache/spanloom); nothing of
this machine's packages is changed but for the tools that are missing. TCG emulates the processor: no nested
virtualisation is needed, and a boot takes some seconds.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SPANLOOM_CACHE") or Path.home() / ".cache" / "spanloom") / "vm"
# The root file system's suite, by the version of Python: what the job brings along was built for this machine's.
GUESTS = {(3, 11): "bookworm", (3, 13): "trixie"}
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "sid": "sid"}
TOOLS = "qemu-system-x86 debootstrap e2fsprogs busybox-static cpio kmod zstd xz-utils"
GUEST_PACKAGES = "python3,libbpf1,procps"
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
SECONDS = 300

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module; done
tries=0
until [ -b /dev/vda ] || [ $tries -ge 50 ]; do /bin/busybox sleep 0.1; tries=$((tries + 1)); done
/bin/busybox mount -t ext4 /dev/vda /root || /bin/busybox poweroff -f
exec /bin/busybox switch_root /root /sbin/spanloom-guest
"""
_GUEST = """#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mount -t tracefs tracefs /sys/kernel/tracing; mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up 2>/dev/null || python3 -c 'import fcntl, socket, struct; s = socket.socket()
fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))'
mkdir /tmp/job; tar -xf /dev/vdb -C /tmp/job; cd /tmp/job
echo "== begin"; PYTHONPATH=. python3 tests/vm/load.py; echo "== end $?"
echo o > /proc/sysrq-trigger; sleep 10
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], check=True, **options)


def install_tools() -> None:
    missing = [name for name in TOOLS.split() if run_quietly("dpkg", "-s", name)]
    if missing:
        run("apt-get", "update", "-qq")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=environment, stdout=2)


def run_quietly(*command: str) -> int:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def mirror() -> str:
    """The Debian mirror that this machine uses."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.sources")]
    for source in filter(Path.exists, sources):
        found = re.search(r"https?://\S+?/debian/?(?=\s|$)", source.read_text())
        if found:
            return found[0].rstrip("/")
    raise SystemExit("vm: no Debian mirror in /etc/apt")


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=120) as response:
        return response.read()


def kernel(name: str) -> tuple[Path, Path]:
    """The kernel image and an initial file system that mounts the disk; fetched and made once."""
    directory = CACHE / name
    if not (directory / "ready").exists():
        shutil.rmtree(directory, ignore_errors=True)
        index = lzma.decompress(fetch(f"{mirror()}/dists/{SUITES[name]}/main/binary-amd64/Packages.xz")).decode()
        packages = {}
        for paragraph in index.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.split("\n") if re.match(r"[A-Z][\w-]*: ", line))
            packages[fields.get("Package", "")] = fields
        version = re.search(r"linux-image-(\S+?)[, (]", packages["linux-image-cloud-amd64"]["Depends"] + " ")[1]
        # Newer suites split the package into the image and the modules.
        names = [f"linux-{part}-{version}" for part in ("image", "binary", "modules")]
        for fields in filter(None, map(packages.get, names)):
            package = directory / "package.deb"
            package.parent.mkdir(parents=True, exist_ok=True)
            package.write_bytes(fetch(f"{mirror()}/{fields['Filename']}"))
            run("dpkg", "-x", package, directory)
            package.unlink()
        make_initial(directory)
        (directory / "ready").touch()
    images = [*directory.glob("boot/vmlinuz-*"), *directory.glob("usr/lib/modules/*/vmlinuz")]
    return images[0], directory / "initial"


def make_initial(directory: Path) -> None:
    modules = next(path for path in (directory / "lib/modules", directory / "usr/lib/modules") if path.exists())
    if not (directory / "lib").exists():
        (directory / "lib").symlink_to("usr/lib")
    version = next(modules.iterdir()).name
    run("depmod", "-b", directory, version)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("bin", "dev", "root", "modules"):
            (tree / name).mkdir()
        shutil.copy("/bin/busybox", tree / "bin")
        order: list[str] = []
        for module in MODULES:
            command = ["modprobe", "-d", str(directory), "-S", version, "--show-depends", module]
            shown = subprocess.run(command, capture_output=True, text=True).stdout  # built in: nothing is shown
            for path in map(Path, re.findall(r"^insmod (\S+)", shown, re.MULTILINE)):
                name = path.name.removesuffix(".xz").removesuffix(".zst")
                if name not in order:
                    order.append(name)
                    unpack = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-qdc"]}.get(path.suffix, ["cat"])
                    (tree / "modules" / name).write_bytes(run(*unpack, path, capture_output=True).stdout)
        (tree / "modules" / "order").write_text("\n".join(order))
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        files = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        packed = run("cpio", "-o", "-H", "newc", "--quiet", cwd=tree, input=files.encode(), capture_output=True).stdout
    (directory / "initial").write_bytes(packed)


def disk() -> Path:
    """The root file system, the same for all kernels."""
    suite = GUESTS.get(sys.version_info[:2])
    if suite is None:
        raise SystemExit(f"vm: no Debian suite is known that has Python {sys.version_info[0]}.{sys.version_info[1]}")
    made_of = zlib.crc32(f"{suite}{GUEST_PACKAGES}{_GUEST}".encode())
    image = CACHE / f"root-{made_of:08x}.img"
    if not image.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            tree = Path(folder) / "root"
            packages = f"--include={GUEST_PACKAGES}"
            run("debootstrap", "--variant=minbase", packages, suite, tree, mirror(), stdout=subprocess.DEVNULL)
            guest = tree / "sbin" / "spanloom-guest"
            guest.write_text(_GUEST)
            guest.chmod(0o755)
            unfinished = Path(folder) / "image"
            with unfinished.open("wb") as file:
                file.truncate(2 << 30)
            run("mkfs.ext4", "-q", "-O", "^has_journal", "-d", tree, unfinished)
            unfinished.rename(image)
    return image


def job(path: Path, objects: Path) -> None:
    """What the guest runs: the kernel stage, the objects of a directory, and what they import."""
    site = next((ROOT / ".venv/lib").glob("python3*/site-packages"))
    with tarfile.open(path, "w") as archive:
        for part in ("agent", "tests/vm"):
            archive.add(
                ROOT / part,
                part,
                filter=lambda entry: None if "__pycache__" in entry.name or entry.name.endswith(".bpf.o") else entry,
            )
        for part in objects.glob("*.bpf.o"):
            archive.add(part, f"agent/kernel/{part.name}")
        for part in [site / "cffi", site / "msgspec", *site.glob("_cffi_backend*")]:
            archive.add(part, part.name)
    with path.open("ab") as file:
        file.truncate((path.stat().st_size | 0xFFFFF) + 1)  # a disk of whole sectors


def main(arguments: list[str]) -> int:
    is_counted = "--counted" in arguments
    has_fentry = "--fentry" in arguments
    is_locked = "--lockdown" in arguments
    arguments = [argument for argument in arguments if argument not in ("--counted", "--fentry", "--lockdown")]
    if len(arguments) not in (1, 2) or arguments[0] not in SUITES:
        print(
            f"usage: tools/vm.py {'|'.join(SUITES)} [DIRECTORY OF THE BPF OBJECTS] [--fentry] [--counted] [--lockdown]",
            file=sys.stderr,
        )
        return 2
    objects = Path(arguments[1]) if len(arguments) == 2 else ROOT / "agent/kernel"
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    install_tools()
    image, initial = kernel(arguments[0])
    root = disk()
    with tempfile.TemporaryDirectory() as folder:
        tape, console = Path(folder) / "job.tar", Path(folder) / "console"
        job(tape, objects)
        command = ["qemu-system-x86_64", "-cpu", "max", "-m", "2048"]
        if is_counted:
            command += ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        else:
            command += ["-accel", "tcg,thread=multi", "-smp", "2"]
        command += ["-nodefaults", "-display", "none", "-no-reboot", "-nic", "none", "-serial", f"file:{console}"]
        command += ["-kernel", str(image), "-initrd", str(initial)]
        command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"]
        command[-1] += " spanloom.counted" * is_counted + " spanloom.fentry" * has_fentry
        command[-1] += " lockdown=confidentiality" * is_locked
        command += ["-drive", f"file={root},if=virtio,format=raw,snapshot=on"]
        command += ["-drive", f"file={tape},if=virtio,format=raw,readonly=on"]
        try:
            subprocess.run(command, timeout=SECONDS, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            print(f"vm: not done after {SECONDS} s", file=sys.stderr)
        text = console.read_text(errors="replace").replace("\r", "") if console.exists() else ""
    body, end, status = text.partition("== begin\n")[2].partition("== end ")
    print(body if end else text[-3000:], end="")
    return int(status.split()[0]) if end else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
