"""The image, really built: from a base made by debootstrap, with buildah, and run with this kernel below it.

In: the source tree, the mirror that apt uses here, and the package index that pip uses here. Out: what is in the image
and what it does. Never: a base image from a registry, anything left in the storage of the user's own containers, or a
silent skip: only SPANLOOM_SKIP_IMAGE=1 skips.

Both builds work on copies of the tree. The second copy has other modes and times and no history, which must not show.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import __version__
from tests.chart.engine import Engine
from tests.chart.manifests import agent_of, objects_of
from tests.collector import Collector
from tests.e2e.harness import Process, free_port, wait_until
from tests.e2e.test_capabilities import mask

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = "opt/spanloom"
BUILD_SECONDS = 1200
COMMIT_TIME_SECONDS = 1_600_000_000
"""Of the copy's only commit, and so of the image; no file of the machine is that old by chance."""
BUILDAH_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_BIND_SERVICE"),
    *("SYS_CHROOT", "SETFCAP", "AUDIT_WRITE", "MKNOD", "NET_RAW"),
)
"""What buildah gives by itself, some of them in older versions."""
MAX_BYTES = 200_000_000
"""Of the image unpacked; it was 147 MB with a base of 80 MB. A compiler would add several hundred."""

TOOLS = re.compile(
    r"(?:.*/)?(?:"
    r"(?:[a-z0-9_]+-linux-gnu-)?(?:gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|ld|as|make|llc|lld|strip)(?:[-.0-9]+)?"
    r"|cc1|cc1plus|collect2|libclang.*|libLLVM.*|[^/]*\.(?:h|hpp|a)"
    r"|pip[0-9.]*|pip-[^/]*|ensurepip|setuptools|_distutils_hack"
    r")"
)
"""Paths of compilers, linkers, installers and headers. /usr/share/gcc is a directory of libgcc's and no compiler."""
NO_TOOLS = {"usr/share/gcc"}

pytestmark = [
    pytest.mark.skipif(os.environ.get("SPANLOOM_SKIP_IMAGE") == "1", reason="SPANLOOM_SKIP_IMAGE=1"),
    pytest.mark.timeout(BUILD_SECONDS),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One path of the image. ``content`` is the hash of a file, the target of a link, empty for anything else."""

    mode: int
    user: int
    group: int
    size: int
    content: str


class Storage:
    """buildah with its own images, containers and settings, below one directory that ``close`` removes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        configuration = directory / "storage.conf"
        configuration.write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{directory}/root"\nrunroot = "{directory}/run"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(configuration),
            "BUILDAH_ISOLATION": "chroot",
            "IMAGE_BUILDER": "buildah",
            # The base must be the one made here.
            "IMAGE_BUILD_FLAGS": "--pull=never --no-cache",
            **pip_settings(),
        }
        self.environment.pop("SOURCE_DATE_EPOCH", None)

    def call(self, *command: str | Path, **variables: str) -> str:
        """Run a command that must succeed and return its output; the end of what it said is in the failure."""
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{said}", pytrace=False)
        return done.stdout

    def container(self, image: str) -> str:
        """A new container of an image. buildah's own seccomp profile refuses bpf(2) without CAP_SYS_ADMIN."""
        return self.call(
            *("buildah", "from", "--pull-never", "--security-opt", "seccomp=unconfined"),
            *limits(),
            f"localhost/{image}",
        ).strip()

    def mount(self, container: str) -> Path:
        return Path(self.call("buildah", "mount", container).strip())

    def close(self) -> None:
        for command in (("umount", "--all"), ("rm", "--all"), ("rmi", "--all", "--force")):
            subprocess.run(("buildah", *command), env=self.environment, capture_output=True, timeout=120, check=False)
        shutil.rmtree(self.directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A built image with one container of it.

    ``build_seconds`` is the time of the build alone. ``capabilities`` are those of a run with privileges.
    """

    storage: Storage
    name: str
    container: str
    root: Path
    build_seconds: float
    capabilities: tuple[str, ...]

    def description(self) -> dict:
        return json.loads(self.storage.call("buildah", "inspect", "--type", "image", f"localhost/{self.name}"))

    def command(self, *arguments: str, privileged: bool = True, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The command line that runs the image's entry point with ``arguments``, or its CMD without any."""
        settings = self.description()["OCIv1"]["config"]
        return self.inside(*settings["Entrypoint"], *(arguments or settings["Cmd"]), privileged=privileged, flags=flags)

    def inside(self, *command: str, privileged: bool = True, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The command line that runs a command in the container, privileged with the chart's capabilities and no
        others."""
        changed = [f"--cap-add=CAP_{name}" for name in self.capabilities]
        changed += [f"--cap-drop=CAP_{name}" for name in BUILDAH_CAPABILITIES]
        return (
            *("buildah", "run", "--isolation", "chroot", *(changed if privileged else ()), *flags),
            *(self.container, "--", *command),
        )

    def run(
        self, *arguments: str, privileged: bool = True, flags: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, privileged=privileged, flags=flags),
            env=self.storage.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def limits() -> tuple[str, ...]:
    """Options of buildah to keep the limits as they are here: from 1.35 on it raises them, which not every root may."""
    version = subprocess.run(("buildah", "--version"), capture_output=True, text=True, timeout=60, check=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (1, 35):
        return ()
    kept = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    return tuple("--ulimit={}={}:{}".format(name, *resource.getrlimit(number)) for name, number in kept.items())


def pip_settings() -> dict[str, str]:
    """How pip reaches its index here, for tools/image.sh: nothing where the defaults hold."""
    settings = {}
    for variable, option in (("PIP_INDEX_URL", "index-url"), ("PIP_CERT", "cert")):
        value = os.environ.get(variable)
        for section in ("install", "global"):
            if not value:
                asked = (sys.executable, "-m", "pip", "config", "get", f"{section}.{option}")
                value = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
        if not value and variable == "PIP_CERT":
            value = next(filter(None, map(os.environ.get, ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"))), "")
        if value:
            settings[variable] = value
    return settings


def copy_source(origin: Path, target: Path) -> Path:
    """A copy of the tree with what a developer has lying around: stale objects, bytecode, secrets."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        top = {".git", ".venv", ".hypothesis", "build"} if Path(directory) == origin else set()
        return [name for name in names if name in top or name == "__pycache__" or name.endswith((".o", ".so"))]

    shutil.copytree(origin, target, ignore=left_out, symlinks=True)
    for name in ("agent/kernel/stale.x86_64.bpf.o", "agent/__pycache__/stale.cpython-313.pyc", ".env", "agent/a.so"):
        path = target / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not for the image")
    return target


def tree(root: Path) -> dict[str, Entry]:
    """Every path below ``root``, relative to it."""
    entries = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(directory, name)
            status = path.lstat()
            content = ""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[str(path.relative_to(root))] = Entry(
                mode=status.st_mode,
                user=status.st_uid,
                group=status.st_gid,
                size=status.st_size if stat.S_ISREG(status.st_mode) else 0,
                content=content,
            )
    return entries


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    if os.getuid() != 0:
        pytest.fail("the image test must run as root; SPANLOOM_SKIP_IMAGE=1 skips it", pytrace=False)
    storage = Storage(tmp_path_factory.mktemp("storage"))
    try:
        storage.call(REPOSITORY / "tools/image_test.sh")
        storage.environment["IMAGE_BUILD_FLAGS"] += "".join(f" {option}" for option in limits())
        yield storage
    finally:
        storage.close()


def build(storage: Storage, source: Path, name: str, **variables: str) -> Image:
    start = time.monotonic()
    storage.call(source / "tools/image.sh", name, **variables)
    seconds = time.monotonic() - start
    container = storage.container(name)
    return Image(
        storage=storage,
        name=name,
        container=container,
        root=storage.mount(container),
        build_seconds=seconds,
        capabilities=chart_capabilities(),
    )


@functools.cache
def chart_capabilities() -> tuple[str, ...]:
    """What the chart gives the agent that is not privileged."""
    engine = Engine()
    try:
        objects = objects_of(engine.render({"securityContext": {"mode": "capabilities"}}))
    finally:
        engine.close()
    return tuple(agent_of(objects)["securityContext"]["capabilities"]["add"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with one commit."""
    copy = copy_source(REPOSITORY, tmp_path_factory.mktemp("first") / "source")
    when = {"GIT_AUTHOR_DATE": f"{COMMIT_TIME_SECONDS} +0000", "GIT_COMMITTER_DATE": f"{COMMIT_TIME_SECONDS} +0000"}
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "--all"), ("commit", "-q", "-m", "test")):
        subprocess.run((*git, *command), cwd=copy, env={**os.environ, **when}, timeout=60, check=True)
    return copy


@pytest.fixture(scope="module")
def image(storage: Storage, source: Path) -> Image:
    return build(storage, source, "spanloom-image-test:first")


@pytest.fixture(scope="module")
def first_tree(image: Image) -> dict[str, Entry]:
    """The image's files before anything ran in it."""
    return tree(image.root)


def test_check_works_in_the_image(image, first_tree):
    """``spanloom check`` finds everything that ``run`` requires, with the chart's capabilities and nothing more."""
    done = image.run("check", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["exit_code"]) == (0, 0), document["verdict"]
    assert document["verdict"] == "works here"
    assert document["version"] == __version__
    assert document["kernel"] == os.uname().release


def test_the_image_works_on_the_oldest_kernel(image, first_tree):
    """Its probes come from another compiler than those of this machine: the verifier of Linux 5.10 takes them, too."""
    [path] = [path for path in first_tree if path.endswith("/capture.x86_64.bpf.o")]
    objects = (image.root / path).parent
    command = [sys.executable, REPOSITORY / "tools/vm.py", "5.10", objects]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "syscalls: 58 exchanges" in done.stdout


def test_no_capabilities_but_the_charts(image, first_tree):
    """The tests around this one mean something: the container has what the chart gives, to the bit."""
    lines = image.storage.call(*image.inside("grep", "-E", "^Cap(Prm|Eff|Bnd)", "/proc/self/status")).splitlines()
    assert {int(line.split()[1], 16) for line in lines} == {mask(image.capabilities)}


def test_the_table_ends_with_works_here(image, first_tree):
    """What a person sees says the same."""
    done = image.run("check")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].strip() == "spanloom run: works here"


@pytest.mark.parametrize("user", ["0:0", "65534:65534"])
def test_without_capabilities_the_image_says_so(image, first_tree, user):
    """Neither a container's root nor another user gets a traceback: every file is readable, the answer is the same."""
    done = image.run("check", "--json", privileged=False, flags=("--user", user))
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert document["uid"] == int(user.partition(":")[0])
    assert document["exit_code"] == 3
    assert "CAP_BPF and CAP_PERFMON" in document["verdict"]


def test_the_version_of_the_image(image, first_tree):
    """``spanloom --version`` works for everybody."""
    done = image.run("--version", privileged=False, flags=("--user", "65534:65534"))
    assert (done.returncode, done.stdout) == (0, f"spanloom {__version__}\n")


def test_a_mounted_configuration_is_read(image, first_tree, tmp_path):
    """The place that the image documents for the settings takes a mounted file."""
    assert stat.S_ISDIR(first_tree["etc/spanloom"].mode)
    file = tmp_path / "spanloom.yaml"
    file.write_text("sampling:\n  ratio: 0.125\n")
    inside = "/etc/spanloom/spanloom.yaml"
    done = image.run("run", "--config", inside, "--print-config", flags=("--volume", f"{file}:{inside}:ro"))
    assert done.returncode == 0, done.stderr
    assert "ratio: 0.125" in done.stdout


def agents_below(pid: int) -> list[int]:
    """The agent among the processes below one of ours: buildah puts its own in between."""
    found = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            if Path(f"/proc/{parent}/comm").read_text().strip() == "spanloom":
                found.append(parent)
            for task in Path(f"/proc/{parent}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return found


def fetch(url: str) -> int:
    """The status of a GET past any proxy; 0 without an answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_image_traces_a_request_and_ends_at_sigterm(image, first_tree, tmp_path):
    """Entry point and command as they are: a request of this host arrives at a collector, SIGTERM ends with 0."""
    served, telemetry = free_port(), free_port()
    settings, inside = tmp_path / "spanloom.yaml", "/etc/spanloom/spanloom.yaml"
    settings.write_text(f'select:\n  ports:\n    include: [{served}]\ntelemetry:\n  listen: "127.0.0.1:{telemetry}"\n')
    serve = (sys.executable, "-m", "http.server", str(served), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    (command,) = image.description()["OCIv1"]["config"]["Cmd"]
    with Collector() as collector, Process(serve, log=tmp_path / "server.log") as server:
        server.wait_for_port(served)
        flags = (f"--volume={settings}:{inside}:ro", f"--env=OTEL_EXPORTER_OTLP_ENDPOINT={collector.endpoint}")
        run = image.command(command, "--config", inside, flags=flags)
        with Process(run, log=tmp_path / "agent.log", env=image.storage.environment) as runner:
            try:

                def ready() -> bool:
                    runner.check_alive()
                    return fetch(f"http://127.0.0.1:{telemetry}/readyz") == 200

                wait_until(ready, lambda: f"the agent is ready:\n{runner.output()}", 30)
                assert fetch(f"http://127.0.0.1:{served}/spanloom.yaml") == 200
                assert collector.wait_for(
                    lambda spans: (
                        {span.kind for span in spans if "/spanloom.yaml" in str(span.attributes)}
                        == {"SERVER", "CLIENT"}
                    ),
                    30,
                ), runner.output()
                (agent,) = agents_below(runner.pid)
                os.kill(agent, signal.SIGTERM)
                assert runner.popen.wait(30) == 0, runner.output()
            finally:
                # buildah does not take the agent with it when it is stopped.
                for pid in agents_below(runner.pid):
                    os.kill(pid, signal.SIGKILL)


def test_running_writes_nothing(image, first_tree):
    """A read-only root file system loses nothing: no bytecode, no cache, no log appears in the image's own files."""
    assert image.run("check", "--json").returncode == 0
    now = tree(image.root / PREFIX)
    before = {
        path.removeprefix(f"{PREFIX}/"): entry for path, entry in first_tree.items() if path.startswith(PREFIX + "/")
    }
    assert now == before
    assert set(tree(image.root / "var")) == {path[4:] for path in first_tree if path.startswith("var/")}


@pytest.mark.parametrize(
    ("path", "is_tool"),
    [
        ("usr/bin/gcc-14", True),
        ("usr/bin/x86_64-linux-gnu-gcc", True),
        ("usr/bin/cc", True),
        ("usr/lib/llvm-19/bin/clang-19", True),
        ("usr/lib/llvm-19/bin/clang", True),
        ("usr/lib/x86_64-linux-gnu/libLLVM.so.19.1", True),
        ("usr/bin/pip3.13", True),
        ("opt/spanloom/lib/python3.13/site-packages/pip", True),
        ("usr/lib/python3.13/ensurepip", True),
        ("usr/include/bpf/libbpf.h", True),
        ("usr/bin/ld", True),
        ("usr/bin/make", True),
        ("opt/spanloom/lib/python3.13/site-packages/agent/pipeline.py", False),
        ("usr/bin/python3.13", False),
        ("usr/lib/x86_64-linux-gnu/libbpf.so.1.5.0", False),
        ("usr/lib/x86_64-linux-gnu/perl-base/IO/Pipe.pm", False),
        ("usr/bin/ldd", False),
    ],
)
def test_what_counts_as_a_build_tool(path, is_tool):
    """The next test means something: names of real tools are found, similar ones are not."""
    assert bool(TOOLS.fullmatch(path)) == is_tool


def test_no_build_tools_in_the_image(image, first_tree):
    """No compiler, linker, installer or header, as a file or as a package."""
    assert [path for path in first_tree if TOOLS.fullmatch(path) and path not in NO_TOOLS] == []
    status = (image.root / "var/lib/dpkg/status").read_text()
    packages = set(re.findall(r"^Package: (.*)$", status, re.MULTILINE))
    assert {"libbpf1", "python3"} <= packages
    assert [
        name for name in packages if re.search(r"-dev$|^(gcc|g\+\+|clang|llvm|binutils|make)([-0-9]*)$|pip", name)
    ] == []


def test_the_files_belong_to_root_and_are_readable_by_all(first_tree):
    """Nobody but root can change what root runs, and other users can run it."""
    wrong = []
    for path, entry in first_tree.items():
        if not path.startswith((PREFIX, "etc/spanloom")) or stat.S_ISLNK(entry.mode):
            continue
        needed = 0o555 if stat.S_ISDIR(entry.mode) else 0o444
        if (entry.user, entry.group) != (0, 0) or entry.mode & 0o6022 or entry.mode & needed != needed:
            wrong.append((path, entry))
    assert wrong == []


def test_only_the_source_is_in_the_image(first_tree):
    """.dockerignore keeps away what lies around: stale objects would load into the kernel otherwise."""
    assert [path for path in first_tree if "stale" in path or path.endswith(("/.env", "agent/a.so"))] == []
    objects = {Path(path).name for path in first_tree if path.endswith(".bpf.o")}
    assert objects == {f"{name}.{os.uname().machine}.bpf.o" for name in ("capture", "check")}


def test_the_whole_package_is_in_the_image(first_tree, source):
    """pyproject.toml lists the packages: a directory that is missing there is missing in the image."""
    (site,) = {path for path in first_tree if path.endswith("/site-packages")}
    modules = {str(path.relative_to(source)) for path in (source / "agent").rglob("*.py")}
    missing = sorted(module for module in modules if f"{site}/{module}" not in first_tree)
    assert missing == [], "add their packages to [tool.setuptools] packages in pyproject.toml"


def test_the_python_packages_are_those_of_the_lock(first_tree, source):
    """Each is in requirements.lock, in that version, and everything that is there was installed."""
    found = {Path(path).name for path in first_tree if path.endswith(".dist-info")}
    pairs = {tuple(name.removesuffix(".dist-info").split("-")) for name in found}
    installed = {(name.lower().replace("_", "-").replace(".", "-"), version) for name, version in pairs}
    locked = set(re.findall(r"^([a-z0-9-]+)==(\S+)", (source / "requirements.lock").read_text(), re.MULTILINE))
    assert installed == {*locked, ("spanloom", __version__)}


def test_every_module_has_bytecode_that_is_checked_by_hash(image, first_tree):
    """Nothing is compiled at start, and no time of a file decides whether bytecode is used (PEP 552: flags 3)."""
    sources = [path for path in first_tree if path.startswith(f"{PREFIX}/lib/") and path.endswith(".py")]
    assert any(path.endswith("/agent/pipeline.py") for path in sources)
    wrong = {}
    for path in sources:
        file = image.root / path
        (compiled,) = [*file.parent.glob(f"__pycache__/{file.stem}.cpython-*.pyc")] or [None]
        if compiled is None or compiled.read_bytes()[4:8] != b"\3\0\0\0":
            wrong[path] = compiled
    assert wrong == {}


def test_the_description_of_the_image(image, source):
    """Labels, entry point, stop signal and user; nothing of the build's secrets."""
    description = image.description()
    settings = description["OCIv1"]["config"]
    assert (settings["Entrypoint"], settings["Cmd"]) == (["spanloom"], ["run"])
    assert (settings["User"], settings["StopSignal"]) == ("0:0", "SIGTERM")
    created = datetime.datetime.fromtimestamp(COMMIT_TIME_SECONDS, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    head = subprocess.run(("git", "rev-parse", "HEAD"), cwd=source, capture_output=True, text=True, check=True)
    labels = {
        "title": "spanloom",
        "licenses": "Apache-2.0",
        "version": __version__,
        "revision": head.stdout.strip(),
        "created": created,
        "base.name": "debian:trixie-slim",
    }
    prefix = "org.opencontainers.image."
    assert {key: settings["Labels"].get(prefix + key) for key in labels} == labels
    assert description["OCIv1"]["created"] == created
    text = json.dumps(description)
    for name, value in pip_settings().items():
        assert value not in text, f"{name} is in the image's description"


def test_the_size_of_the_image(image, first_tree, capsys):
    """Small enough to be pulled by every node; the number is printed."""
    size = sum(entry.size for entry in first_tree.values())
    agent = sum(entry.size for path, entry in first_tree.items() if path.startswith(PREFIX))
    with capsys.disabled():
        print(
            f"\nimage: {size / 1e6:.1f} MB unpacked, {agent / 1e6:.1f} MB of it the agent and its packages; "
            f"built in {image.build_seconds:.0f} s"
        )
    assert size <= MAX_BYTES


def packages(entries: Mapping[str, Entry]) -> set[object]:
    """What tells one set of packages from another: dpkg's status, and the versions of the Python packages."""
    return {entries["var/lib/dpkg/status"]} | {path for path in entries if path.endswith(".dist-info")}


def test_debian_packages_of_a_time_that_cannot_be_had(storage, source):
    """A snapshot of Debian's archive is taken or nothing: the build does not go on with what the archive has now."""
    done = subprocess.run(
        (source / "tools/image.sh", "spanloom-image-test:none"),
        env={**storage.environment, "APT_SNAPSHOT": "19700101T000000Z"},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert done.returncode != 0
    assert "19700101T000000Z/dists/trixie/InRelease" in done.stdout + done.stderr


def test_two_builds_of_the_same_source_have_the_same_files(storage, image, source, first_tree, tmp_path):
    """Another copy with other modes and times, without history, gives the same files of the agent and of all Python
    packages, bit for bit; and the same layers, unless Debian's packages have changed in between."""
    copy = copy_source(source, tmp_path / "another" / "copy")
    for directory, _, files in os.walk(copy):
        Path(directory).chmod(0o700)
        for name in files:
            path = Path(directory, name)
            path.chmod(0o700 if path.stat().st_mode & 0o100 else 0o600)
            os.utime(path, (1_700_000_000, 1_700_000_000))
    second = build(storage, copy, "spanloom-image-test:second", SOURCE_DATE_EPOCH=str(COMMIT_TIME_SECONDS))
    second_tree = tree(second.root)

    def own(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {path: entry for path, entry in entries.items() if path.startswith(PREFIX)}

    assert any(path.endswith(".so") for path in own(first_tree))
    assert any(path.endswith(".bpf.o") for path in own(first_tree))
    different = {
        path
        for path in own(first_tree).keys() | own(second_tree).keys()
        if first_tree.get(path) != second_tree.get(path)
    }
    assert different == set()
    first_description, description = image.description()["OCIv1"], second.description()["OCIv1"]
    labels = description["config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == "unknown"
    # The mirror may have changed between the builds; when it has not, the rest is the same too.
    if packages(first_tree) == packages(second_tree):
        everything = first_tree.keys() | second_tree.keys()
        assert [path for path in sorted(everything) if first_tree.get(path) != second_tree.get(path)] == []
        assert first_description["rootfs"]["diff_ids"] == description["rootfs"]["diff_ids"]


def commands(directory: Path, **scripts: str) -> str:
    """A PATH with the few commands that tools/image.sh needs to come to its decision, and these scripts."""
    directory.mkdir()
    for name in ("date", "dirname", "env", "git", "sed", "sh"):
        (directory / name).symlink_to(shutil.which(name))
    for name, text in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    return str(directory)


def image_sh(path: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("/bin/sh", REPOSITORY / "tools/image.sh", *arguments),
        env={"PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "neither a docker engine nor buildah is here: apt-get install buildah"),
        ({"IMAGE_BUILDER": "kaniko"}, "IMAGE_BUILDER=kaniko: must be docker or buildah"),
        ({"IMAGE_BUILDER": "buildah", "PIP_CERT": "/nonexistent"}, "PIP_CERT=/nonexistent: no such file"),
        ({"IMAGE_BUILDER": "buildah", "SOURCE_DATE_EPOCH": "now"}, "SOURCE_DATE_EPOCH=now: must be seconds since 1970"),
    ],
)
def test_what_image_sh_refuses(variables, message, tmp_path):
    """A wrong setting is one clear line, before anything is built. A docker client without an engine is no builder."""
    done = image_sh(commands(tmp_path / "bin", docker="exit 1"), **variables)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"image: {message}"


def test_image_sh_with_a_docker_engine(tmp_path):
    """No engine runs in CI: this is only what docker would be asked. Proxies go by name, so that no value is kept."""
    docker = '[ "$1" = info ] || { echo "buildkit=$DOCKER_BUILDKIT"; for word; do echo "$word"; done; }'
    done = image_sh(
        commands(tmp_path / "bin", docker=docker, buildah="exit 1"),
        "example:1",
        https_proxy="http://secret@proxy",
        SOURCE_DATE_EPOCH="1600000000",
        IMAGE_BUILD_FLAGS="--no-cache --quiet",
        PIP_CERT="/dev/null",
    )
    assert done.returncode == 0, done.stderr
    buildkit, *words = done.stdout.splitlines()
    assert (buildkit, words[0], words[-1]) == ("buildkit=1", "build", ".")
    pairs = list(itertools.pairwise(words))
    for pair in (
        ("--tag", "example:1"),
        ("--build-arg", "https_proxy"),
        ("--build-arg", "CREATED=2020-09-13T12:26:40Z"),
        ("--build-arg", f"VERSION={__version__}"),
        ("--secret", "id=ca_certificates,src=/dev/null"),
        ("--no-cache", "--quiet"),
    ):
        assert pair in pairs
    assert "secret@proxy" not in done.stdout + done.stderr
