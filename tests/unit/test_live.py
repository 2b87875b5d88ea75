"""Live configuration: what a changing file does to a running agent, with the kubelet's layout on a real file system."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import live
from agent.config import MAX_FILE_BYTES, load
from agent.config_schema import Config, Section, fields_of, is_section, leaves
from agent.errors import ConfigError
from agent.live import FIXED_AT_START, ConfigFile, Loaded, Refused, changed_keys, restart_needed, restart_reason

GOOD = "sampling: {ratio: 0.5}\n"
OTHER = "sampling: {ratio: 0.25}\n"
BAD = "sampling: {ratio: 7}\n"
BAD_REASON = "sampling.ratio: must be a number from 0 to 1, not 7"


class ConfigMapMount:
    """A mounted ConfigMap as kept by kubelets: ``<name> -> ..data/<name>``, ``..data -> <a directory per version>``."""

    def __init__(self, directory: Path, text: str | bytes) -> None:
        self.directory = directory
        self.path = directory / "config.yaml"
        self._numbers = itertools.count(1)
        self.update(text)
        self.path.symlink_to("..data/config.yaml")

    def update(self, text: str | bytes | None) -> None:
        """Put the next version in place atomically; None: the ConfigMap has lost the key."""
        stamp = self.directory / f"..2030_01_31_18_00_00.{next(self._numbers):010}"
        stamp.mkdir()
        if text is not None:
            (stamp / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        data = self.directory / "..data"
        before = os.readlink(data) if data.is_symlink() else None
        link = self.directory / "..data_tmp"
        link.symlink_to(stamp.name)
        link.rename(data)
        if before is not None:
            shutil.rmtree(self.directory / before)


@pytest.fixture
def mount(tmp_path):
    return ConfigMapMount(tmp_path, GOOD)


def watch(path: Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> ConfigFile:
    return ConfigFile(path, overrides, environ or {})


def replace(path: Path, text: str | bytes) -> None:
    """Put a file in place as careful editors do."""
    new = path.with_name("new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    new.rename(path)


def counts(file: ConfigFile) -> tuple[int, int, int]:
    return file.reloads["applied"], file.reloads["refused"], file.reloads["unchanged"]


# ---- The start -------------------------------------------------------------------------------------------------------


def test_the_start_loads_and_then_nothing_is_new(mount):
    """The first configuration is that of ``load``, and a file that stays as it is gives nothing, ever."""
    before = time.time()
    file = watch(mount.path)
    assert file.config == load(mount.path, [], {})
    assert [file.poll() for _ in range(5)] == [None] * 5
    assert file.last_reload_successful
    assert before <= file.last_reload_success_unix <= time.time()
    assert dict(file.reloads) == {"applied": 0, "refused": 0, "unchanged": 0}, "metrics begin with zero, not absent"


@pytest.mark.parametrize("text", [BAD, "{", "\0", "x" * (MAX_FILE_BYTES + 1)])
def test_a_bad_file_at_the_start_is_an_error(tmp_path, text):
    """There is no last good configuration yet: the agent does not start, with the message of ``load``."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as expected:
        load(path, [], {})
    with pytest.raises(ConfigError) as caught:
        watch(path)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("name", ["absent", "absent/config.yaml", "nul\0", "."])
def test_an_unreadable_file_at_the_start_is_an_error(tmp_path, name):
    """So it is with a file that is not there, or is none."""
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        watch(tmp_path / name)


def test_a_pipe_is_read_once_and_not_polled():
    """``--config <(...)`` works, and what can be read only once is neither looked at again nor reported as gone."""
    reader, writer = os.pipe()
    os.write(writer, GOOD.encode())
    os.close(writer)
    file = watch(Path(f"/dev/fd/{reader}"))
    os.close(reader)
    assert file.config.sampling.ratio == 0.5
    assert file.poll() is None
    assert file.last_reload_successful


# ---- Changes ---------------------------------------------------------------------------------------------------------


def test_the_kubelets_swap_is_applied(mount):
    """A new version behind ``..data`` is loaded at the next poll, with the keys that changed, once."""
    file = watch(mount.path)
    mount.update("sampling: {ratio: 0.25}\nroutes: {guess: true}\ncapture: {request_head_bytes: 1024}\n")
    started = time.time()
    result = file.poll()
    assert isinstance(result, Loaded)
    assert result.changed == ("sampling.ratio", "routes.guess"), "in the order of the reference, without what is equal"
    assert result.config is file.config
    assert file.config.routes.guess
    assert file.poll() is None
    assert counts(file) == (1, 0, 0)
    assert file.last_reload_success_unix >= started


def test_thirty_swaps_are_thirty_changes(mount):
    """No version is missed when each is polled for, however the file system reuses inodes and times."""
    file = watch(mount.path)
    for number in range(1, 31):
        mount.update(f"sampling: {{ratio: 0.{number:02}}}\n")
        result = file.poll()
        assert isinstance(result, Loaded)
        assert file.config.sampling.ratio == pytest.approx(number / 100)
    assert counts(file) == (30, 0, 0)


def test_a_swap_is_seen_by_the_link_alone(mount):
    """Even if stat says the same of the new file (reused inode, equal size and time), the other ``..data`` tells."""
    file = watch(mount.path)
    real = mount.path.resolve()
    os.rename(real.parent, real.parent.with_name("..moved"))
    (mount.directory / "..data_tmp").symlink_to("..moved")
    (mount.directory / "..data_tmp").rename(mount.directory / "..data")
    with open(mount.path, "r+b") as content:  # the same inode, size and time
        times = os.fstat(content.fileno())
        content.write(b"sampling: {ratio: 0.7}")
    os.utime(mount.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert isinstance(file.poll(), Loaded)
    assert file.config.sampling.ratio == 0.7


@pytest.mark.parametrize("write", [replace, Path.write_text], ids=["renamed", "in place"])
def test_a_plain_file_is_watched_too(tmp_path, write):
    """Outside of Kubernetes the file is edited: by renaming a new one over it, or in place."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    file = watch(path)
    write(path, OTHER)
    result = file.poll()
    assert isinstance(result, Loaded)
    assert result.changed == ("sampling.ratio",)


def test_the_same_bytes_are_no_change(mount):
    """A touched file, and an update of the ConfigMap that changed another key of it, are read and counted, no more."""
    file = watch(mount.path)
    success = file.last_reload_success_unix
    os.utime(mount.path, (1, 1))
    assert file.poll() is None
    mount.update(GOOD)
    assert file.poll() is None
    assert file.poll() is None
    assert counts(file) == (0, 0, 2)
    assert file.last_reload_success_unix == success


def test_another_text_with_the_same_meaning_changes_nothing(mount):
    """A comment or another order is loaded, and no key has changed."""
    file = watch(mount.path)
    mount.update(f"# half of them\n{GOOD}")
    assert file.poll() == Loaded(load(mount.path, [], {}), ())


def test_only_effective_values_count(mount):
    """What ``--set`` overrides does not change with the file; what the environment gave shows when it is silent."""
    environ = {"OTEL_EXPORTER_OTLP_TIMEOUT": "2500"}
    mount.update("export: {otlp: {timeout_seconds: 3}}\n")
    file = watch(mount.path, ["sampling.ratio=0.125"], environ)
    environ.clear()  # the variables of the start count
    mount.update("sampling: {ratio: 1}\n")
    result = file.poll()
    assert isinstance(result, Loaded)
    assert result.changed == ("export.otlp.timeout_seconds",)
    assert (file.config.sampling.ratio, file.config.export.otlp.timeout_seconds) == (0.125, 2.5)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The module's clock, which stands still until a test moves ``now``."""
    clock = SimpleNamespace(**vars(time), now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(live, "time", clock)
    return clock


def test_a_write_that_stat_cannot_tell_is_found(tmp_path, clock):
    """Two writes within one tick of the file clock look alike; the second one is read a moment later, and that once."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    file = watch(path)
    times = path.stat()
    path.write_text("sampling: {ratio: 0.9}\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    clock.now += live.CONFIRM_SECONDS - 0.01
    assert file.poll() is None
    clock.now += 0.02
    assert isinstance(file.poll(), Loaded)
    assert file.config.sampling.ratio == 0.9
    assert counts(file) == (1, 0, 0)
    path.write_text(GOOD)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    clock.now += 1000.0
    assert file.poll() is None, "confirmed once: an old file is not read again and again"


def test_so_is_one_behind_a_change_that_was_seen(tmp_path, clock):
    """The same after a change as after the start."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    file = watch(path)
    clock.now += 1000.0
    replace(path, OTHER)
    assert isinstance(file.poll(), Loaded)
    times = path.stat()
    path.write_text("sampling: {ratio: 0.75}\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    clock.now += live.CONFIRM_SECONDS - 0.01
    assert file.poll() is None
    clock.now += 0.02
    assert isinstance(file.poll(), Loaded)
    assert file.config.sampling.ratio == 0.75


def test_the_confirming_read_counts_nothing(mount, monkeypatch):
    """That second look at a file is not one more unchanged file."""
    monkeypatch.setattr(live, "CONFIRM_SECONDS", 0.0)
    file = watch(mount.path)
    mount.update(OTHER)
    assert isinstance(file.poll(), Loaded)
    assert [file.poll() for _ in range(3)] == [None] * 3
    assert counts(file) == (1, 0, 0)


def test_an_idle_poll_reads_nothing(mount, monkeypatch):
    """As long as nothing changes, the file is not read; a change is."""
    monkeypatch.setattr(live, "CONFIRM_SECONDS", 1e9)
    reads: list[None] = []
    read = live.ConfigFile._read
    monkeypatch.setattr(live.ConfigFile, "_read", lambda self: (reads.append(None), read(self))[1])
    file = watch(mount.path)
    reads.clear()
    for _ in range(100):
        assert file.poll() is None
    assert not reads
    os.utime(mount.path.resolve(), ns=(1, 1))
    file.poll()
    assert reads


def test_what_loaded_shows_in_a_log_is_no_secret(mount):
    """A logged result names keys; the values may be credentials of the collector."""
    file = watch(mount.path)
    mount.update("export: {otlp: {headers: {authorization: hunter2}}}\n")
    result = file.poll()
    assert isinstance(result, Loaded)
    assert "export.otlp.headers" in repr(result)
    assert "hunter2" not in repr(result)


# ---- Refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    (BAD, f": {BAD_REASON}"),
    ("sampling: {ratoi: 1}\n", ": sampling.ratoi: unknown key; did you mean sampling.ratio?"),
    ("sampling:\n  ratio: [0.5", ":2:14: not valid YAML: "),
    ("sampling: {ratio: 0.5", ":1:22: not valid YAML: "),
    (b"a: \xff\n", ":1:4: not UTF-8 text"),
    ("a: &a 1\n", ":1:4: anchors (&) and aliases (*) are not supported"),
    ("export: {batch: {max_spans: 100}, queue_spans: 10}\n", ": export.batch.max_spans: must be at most"),
    ("#" * (MAX_FILE_BYTES + 1), f": the configuration file is larger than {MAX_FILE_BYTES} bytes"),
    ("[" * 100_000, ":1:17: nested more than 16 levels deep"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_a_bad_file_is_refused_once(mount, text, reason):
    """File, key or line, and reason in one line; the last good configuration stays; a repair is applied."""
    file = watch(mount.path)
    good, success = file.config, file.last_reload_success_unix
    mount.update(text)
    result = file.poll()
    assert isinstance(result, Refused)
    assert result.message.startswith(f"{mount.path}{reason}")
    assert result.message.isprintable()
    assert result.message.count(str(mount.path)) == 1
    assert [file.poll() for _ in range(3)] == [None] * 3
    assert file.config is good
    assert not file.last_reload_successful
    assert file.last_reload_success_unix == success
    assert counts(file) == (0, 1, 0)
    mount.update(OTHER)
    assert isinstance(file.poll(), Loaded)
    assert file.last_reload_successful
    assert counts(file) == (1, 1, 0)


def test_the_largest_file_is_read(mount):
    """The bound is inclusive, and a change of the very last byte is a change."""
    file = watch(mount.path)
    mount.update(OTHER + "#" * (MAX_FILE_BYTES - len(OTHER)))
    assert isinstance(file.poll(), Loaded)
    mount.update(OTHER + "#" * (MAX_FILE_BYTES - len(OTHER) - 1) + "\0")
    assert isinstance(file.poll(), Refused)


def test_ten_bad_versions_change_nothing(mount):
    """Each bad content is reported, the same one again is not, and the configuration is the same object throughout."""
    file = watch(mount.path)
    good = file.config
    for number in range(10):
        mount.update(f"sampling: {{ratio: {number + 2}}}\n")
        assert isinstance(file.poll(), Refused)
        mount.update(f"sampling: {{ratio: {number + 2}}}\n")
        assert file.poll() is None
    assert file.config is good
    assert counts(file) == (0, 10, 10)
    assert not file.last_reload_successful


def test_bad_contents_with_one_message_are_each_reported(mount):
    """Another edit that makes the same mistake is a new answer to whoever made it."""
    file = watch(mount.path)
    for text in (BAD, BAD + "# really\n"):
        mount.update(text)
        assert file.poll() == Refused(f"{mount.path}: {BAD_REASON}")


def test_back_to_the_last_good_one(mount):
    """Undoing a bad edit is a successful reload in which no key changed."""
    file = watch(mount.path)
    mount.update(BAD)
    assert isinstance(file.poll(), Refused)
    mount.update(GOOD)
    assert file.poll() == Loaded(file.config, ())
    assert file.last_reload_successful
    mount.update(BAD)
    assert isinstance(file.poll(), Refused), "the same mistake again, after it was right, is reported again"


def test_a_half_written_file_is_looked_at_again(tmp_path):
    """A writer that is slow gets a refusal for what it has written so far, and then its change is applied."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    file = watch(path)
    with open(path, "w") as writer:
        writer.write("sampling: {ratio: ")
        writer.flush()
        assert isinstance(file.poll(), Refused)
        assert file.poll() is None
        writer.write("0.25}\n")
    assert isinstance(file.poll(), Loaded)
    assert file.config.sampling.ratio == 0.25


def test_after_a_refusal_changes_are_told_from_the_last_good_one(mount):
    """What a refused version would have changed plays no part."""
    file = watch(mount.path)
    mount.update("routes: {guess: true}\nsampling: {ratio: 7}\n")
    assert isinstance(file.poll(), Refused)
    mount.update(GOOD + "propagation: {formats: [b3]}\n")
    result = file.poll()
    assert isinstance(result, Loaded)
    assert result.changed == ("propagation.formats",)


# ---- Gone and unreadable ---------------------------------------------------------------------------------------------


def gone_file(mount: ConfigMapMount) -> None:
    mount.path.unlink()


def gone_key(mount: ConfigMapMount) -> None:
    mount.update(None)


def gone_data(mount: ConfigMapMount) -> None:
    (mount.directory / "..data").unlink()


def gone_directory(mount: ConfigMapMount) -> None:
    shutil.rmtree(mount.directory)


def directory_that_is_a_file(mount: ConfigMapMount) -> None:
    shutil.rmtree(mount.directory)
    mount.directory.write_text("")


@pytest.mark.parametrize("vanish", [gone_file, gone_key, gone_data, gone_directory, directory_that_is_a_file])
@pytest.mark.parametrize(("text", "changed"), [(GOOD, ()), (OTHER, ("sampling.ratio",))])
def test_a_file_that_vanishes_is_reported_once_and_comes_back(tmp_path, vanish, text, changed):
    """The last good configuration stays while it is gone; back with the same or another content it is loaded."""
    directory = tmp_path / "mount"
    directory.mkdir()
    mount = ConfigMapMount(directory, GOOD)
    file = watch(mount.path)
    good = file.config
    vanish(mount)
    assert file.poll() == Refused(f"{mount.path}: the configuration file is gone")
    assert [file.poll() for _ in range(3)] == [None] * 3
    assert file.config is good
    assert not file.last_reload_successful
    assert counts(file) == (0, 1, 0)
    if directory.is_dir():
        shutil.rmtree(directory)
    else:
        directory.unlink(missing_ok=True)
    directory.mkdir()
    ConfigMapMount(directory, text)
    result = file.poll()
    assert isinstance(result, Loaded)
    assert result.changed == changed
    assert file.last_reload_successful
    assert file.poll() is None
    mount.path.unlink()
    assert isinstance(file.poll(), Refused), "gone again is reported again"


def test_a_file_that_is_moved_away_and_back_is_loaded(tmp_path):
    """Nothing that stat says of it has changed, and still it is the end of a refusal."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    file = watch(path)
    path.rename(tmp_path / "away")
    assert isinstance(file.poll(), Refused)
    (tmp_path / "away").rename(path)
    assert file.poll() == Loaded(file.config, ())
    assert file.last_reload_successful


def test_gone_and_back_with_a_bad_content(mount):
    """The log ends with what is wrong now, not with what was."""
    file = watch(mount.path)
    for _ in range(2):
        mount.update(BAD)
        assert file.poll() == Refused(f"{mount.path}: {BAD_REASON}")
        mount.update(None)
        assert file.poll() == Refused(f"{mount.path}: the configuration file is gone")
    mount.update(OTHER)
    assert isinstance(file.poll(), Loaded)


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)], ids=["dir", "fifo", "loop"]
)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    """A directory, a pipe that would block its reader, or a link to itself in place of the file: reported once."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    file = watch(path)
    path.unlink()
    make(path)
    result = file.poll()
    assert isinstance(result, Refused)
    assert result.message.startswith(f"{path}: cannot read the configuration file: ")
    assert file.poll() is None
    assert counts(file) == (0, 1, 0)
    replace_anything(path, GOOD)
    assert file.poll() == Loaded(file.config, ())


def replace_anything(path: Path, text: str) -> None:
    path.rmdir() if path.is_dir() else path.unlink()
    path.write_text(text)


@contextmanager
def _unprivileged():
    """As root, another user: nothing is forbidden to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_permission_that_is_given_back_is_noticed():
    """What stat shows stays the same when only the mode changes: an unreadable file is tried until it can be read."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path = Path(name) / "config.yaml"
        path.write_text(GOOD)
        path.chmod(0o644)
        file = watch(path)
        path.write_text(OTHER)
        path.chmod(0o000)
        with _unprivileged():
            assert file.poll() == Refused(f"{path}: cannot read the configuration file: Permission denied")
            assert file.poll() is None
        path.chmod(0o644)
        with _unprivileged():
            result = file.poll()
    assert isinstance(result, Loaded)
    assert result.changed == ("sampling.ratio",)


# ---- Under fire ------------------------------------------------------------------------------------------------------


def test_swaps_during_polls_never_mix(mount):
    """While versions are swapped as fast as it goes, every result is one version, whole, and the last one arrives."""
    file = watch(mount.path)
    done = threading.Event()

    def swap() -> None:
        for number in range(1, 151):
            mount.update(f"stitching: {{hold_spans: {number}}}\nlimits: {{processes: {number + 100}}}\n")
        done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    seen = []
    try:
        while True:
            is_last = done.is_set()
            result = file.poll()
            # Removing the old directory under a reader may look as if the file were gone: it is the only refusal.
            assert not isinstance(result, Refused) or result.message.endswith("is gone")
            if isinstance(result, Loaded):
                seen.append((result.config.stitching.hold_spans, result.config.limits.processes))
            if is_last and result is None:
                break
    finally:
        thread.join()
    assert all(processes == spans + 100 for spans, processes in seen)
    assert [spans for spans, _ in seen] == sorted({spans for spans, _ in seen}), "in order, none of them twice"
    assert seen[-1][0] == 150
    assert file.last_reload_successful


def test_a_change_during_the_read_is_left_to_the_next_poll(mount, monkeypatch):
    """A content that was replaced while it was read is not believed, neither as good nor as bad."""
    file = watch(mount.path)
    for during, then in ((BAD, "0.125"), (OTHER, "0.75")):

        def load_late(*arguments: object, text: str = then) -> Config:
            mount.update(f"sampling: {{ratio: {text}}}\n")
            return load(*arguments)  # type: ignore[arg-type]

        mount.update(during)
        with monkeypatch.context() as patch:
            patch.setattr(live, "load", load_late)  # the real one, after a swap at the worst moment
            assert file.poll() is None
        result = file.poll()
        assert isinstance(result, Loaded)
        assert result.config.sampling.ratio == float(then)
    assert counts(file) == (2, 0, 0)


def test_a_version_that_is_removed_while_it_is_looked_up_is_not_gone(mount, monkeypatch):
    """A look that ends in the directory which the kubelet has just replaced is no alarm; the next one finds the new."""
    file = watch(mount.path)

    def look_into_the_old_directory() -> tuple[object, ...]:
        old = mount.path.resolve()
        mount.update(OTHER)
        os.stat(old)
        raise AssertionError("the old version is still there")

    with monkeypatch.context() as patch:
        patch.setattr(file, "_look", look_into_the_old_directory)
        assert file.poll() is None
    assert isinstance(file.poll(), Loaded)
    assert counts(file) == (1, 0, 0)


def test_a_change_during_the_start_is_not_missed(mount, monkeypatch):
    """A version that arrives while the first one is loaded is found at the first poll."""

    def load_early(*arguments: object) -> Config:
        config = load(*arguments)  # type: ignore[arg-type]
        mount.update(OTHER)
        return config

    with monkeypatch.context() as patch:
        patch.setattr(live, "load", load_early)
        file = watch(mount.path)
    assert file.config.sampling.ratio == 0.5
    assert isinstance(file.poll(), Loaded)
    assert file.config.sampling.ratio == 0.25


YAML_LIKE = st.text(st.sampled_from(list("ab:-[]{}?,&*!|>'\"%@#~<=\n\t 01.x_é\u2028\0")), max_size=60).map(str.encode)
SETTINGS = st.builds(
    lambda key, value: f"{key.replace('.', ': {', 1)}: {value}}}\n".encode(),
    st.sampled_from([key for key, _ in leaves() if key.count(".") == 1]),
    st.sampled_from(["1", "0", "-1", "true", "[]", "{}", "[a]", "null", "x", "'y'", "1e9", ".nan"]),
)


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=80) | YAML_LIKE | SETTINGS | st.sampled_from([GOOD.encode(), None]), max_size=5))
def test_any_bytes_never_raise_and_the_last_good_one_stays(tmp_path, contents):
    """Whatever is in the file, one after the other: what ``load`` accepts is applied, all else is refused, once."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        mount = ConfigMapMount(Path(name), GOOD)
        file = watch(mount.path)
        previous: bytes | None = GOOD.encode()
        for content in contents:
            good = file.config
            mount.update(content)
            result = file.poll()
            assert file.poll() is None
            if content == previous:
                assert result is None
                continue
            previous = content
            try:
                expected = load(mount.path, [], {})
            except ConfigError:
                assert isinstance(result, Refused)
                assert result.message.startswith(str(mount.path))
                assert result.message.isprintable()
                assert file.config is good
            else:
                assert result == Loaded(expected, changed_keys(good, expected))
                assert file.config is result.config
            assert file.last_reload_successful == isinstance(result, Loaded)


# ---- What needs a restart --------------------------------------------------------------------------------------------

LIVE = (
    "select.executables.include",
    "select.ports.include",
    "select.ports.exclude",
    "capture.request_headers",
    "capture.response_headers",
    "capture.dangerously_allow_secret_headers",
    "capture.announce_open_seconds",
    "propagation.formats",
    "sampling.ratio",
    "sampling.parent_based",
    "routes.patterns",
    "routes.guess",
    "redaction.query_keys",
    "export.otlp.endpoint",
    "export.otlp.headers",
    "export.otlp.compression",
    "export.batch.max_spans",
    "export.batch.max_delay_seconds",
    "export.console",
    "stitching.hold_seconds",
    "stitching.hold_spans",
    "resource.attributes",
    "telemetry.log_level",
    "telemetry.log_format",
)
FIXED = (
    "kernel.backend",
    "kernel.ring_buffer_bytes",
    "kernel.poll_seconds",
    "kernel.sweep_seconds",
    "limits.connections",
    "limits.processes",
    "limits.exchange_timeout_seconds",
    "telemetry.listen",
    "limits.request_head_bytes",
    "limits.response_head_bytes",
)


def test_what_cannot_be_put_into_effect_is_refused(mount):
    """The last good one stays the last good one, until a file comes that can; each is tried once."""
    file = ConfigFile(mount.path, (), {})
    tried: list[float] = []

    def apply(config: Config) -> None:
        tried.append(config.sampling.ratio)
        if config.sampling.ratio == 0.25:
            raise ConfigError("export.otlp.certificate /ca.pem: No such file or directory")

    mount.update(OTHER)
    result = file.poll(apply)
    assert isinstance(result, Refused)
    assert "config.yaml: export.otlp.certificate /ca.pem: No such file" in result.message
    assert file.config.sampling.ratio == 0.5
    assert not file.last_reload_successful
    assert dict(file.reloads) == {"applied": 0, "refused": 1, "unchanged": 0}
    assert file.poll(apply) is None
    mount.update(GOOD)
    assert file.poll(apply) == Loaded(file.config, ())
    assert file.last_reload_successful
    mount.update("sampling: {ratio: 0.75}\n")
    result = file.poll(apply)
    assert isinstance(result, Loaded)
    assert result.changed == ("sampling.ratio",)
    assert tried == [0.25, 0.75]


def test_what_could_not_be_put_into_effect_is_tried_again(mount, clock):
    """The volume with the certificate may be renewed after the one with the configuration; each reason is told once."""
    file = ConfigFile(mount.path, (), {})
    problems = ["no certificate", "no certificate", "no key", ""]

    def apply(config: Config) -> None:
        if problem := problems.pop(0):
            raise ConfigError(problem)

    mount.update(OTHER)
    assert isinstance(file.poll(apply), Refused)
    clock.now += live.RETRY_SECONDS - 0.1
    assert file.poll(apply) is None
    assert len(problems) == 3
    clock.now += 0.1
    assert file.poll(apply) is None, "the reason is the same"
    assert len(problems) == 2
    clock.now += live.RETRY_SECONDS
    assert "no key" in file.poll(apply).message
    assert not file.last_reload_successful
    clock.now += live.RETRY_SECONDS
    assert file.poll(apply) == Loaded(file.config, ("sampling.ratio",))
    assert (file.config.sampling.ratio, file.last_reload_successful, problems) == (0.25, True, [])
    clock.now += 2 * live.RETRY_SECONDS
    assert file.poll(apply) is None


@pytest.mark.parametrize(("keys", "is_live"), [(LIVE, True), (FIXED, False)], ids=["live", "fixed"])
def test_which_settings_are_live(keys, is_live):
    """The promise of the documentation, key by key."""
    known = dict(leaves())
    for key in keys:
        assert key in known
        assert (restart_reason(key) is None) is is_live, key


def test_the_table_names_settings_and_sections_that_exist():
    """A setting that was renamed would silently become live."""
    sections = {key.rpartition(".")[0] for key, _ in leaves()}
    for entry, reason in FIXED_AT_START.items():
        assert entry in sections or entry in dict(leaves()), entry
        assert reason


@pytest.mark.parametrize(
    "key", ["kernels.backend", "new", "new.setting", "limits", "limits.request_head_bytes_more", ""]
)
def test_what_the_table_does_not_name_is_live(key):
    """A new section or setting is applied live unless somebody says otherwise; a similar name is not the same name."""
    assert restart_reason(key) is None


def test_restart_needed_names_the_changed_fixed_settings():
    """Of what changed, exactly what cannot be applied live, in the order of the reference."""
    old = load(None, [], {})
    new = load(None, ["kernel.poll_seconds=0.25", "sampling.ratio=0.5", "limits.processes=99", "telemetry.listen="], {})
    assert restart_needed(old, new) == ("limits.processes", "kernel.poll_seconds", "telemetry.listen")
    assert restart_needed(new, new) == ()
    assert restart_needed(old, load(None, ["sampling.ratio=0.5"], {})) == ()


@pytest.mark.parametrize(
    ("old", "new", "fixed"),
    [
        ([], ["capture.request_head_bytes=512"], ()),
        ([], ["capture.request_head_bytes=2048"], ("capture.request_head_bytes",)),
        (["limits.request_head_bytes=4096"], ["capture.request_head_bytes=4096"], ()),
        (["limits.request_head_bytes=4096"], ["capture.request_head_bytes=4097"], ("capture.request_head_bytes",)),
        (["limits.request_head_bytes=512"], ["capture.request_head_bytes=1000"], ()),
        (["limits.response_head_bytes=2048"], ["capture.response_head_bytes=2048"], ()),
        ([], ["capture.response_head_bytes=257"], ("capture.response_head_bytes",)),
    ],
)
def test_heads_grow_as_far_as_there_is_room(old, new, fixed):
    """Shorter heads are live, and longer ones up to the room that the agent was started with."""
    assert restart_needed(load(None, old, {}), load(None, old + new, {})) == fixed


def altered(section: Section) -> Section:
    """The section with another value, whether or not it is sensible, in every setting."""
    return msgspec.structs.replace(
        section,
        **{
            name: altered(getattr(section, name)) if is_section(annotation) else ("altered", getattr(section, name))
            for name, annotation in fields_of(type(section)).items()
        },
    )


def test_every_setting_is_compared():
    """A change of any setting is seen, those of sections that do not exist yet included."""
    changed = changed_keys(Config(), altered(Config()))
    assert changed == tuple(key for key, _ in leaves())
    assert set(FIXED) <= {key for key in changed if restart_reason(key)}


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("{a: 1, b: 2}", "{b: 2, a: 1}", False),
        ("{a: 1}", "{a: 1.0}", True),
        ("{a: 1}", "{a: true}", True),
        ("{a: 1}", "{a: '1'}", True),
        ("{a: 1}", "{b: 1}", True),
        ("{a: 1}", "{a: 1, b: 1}", True),
        ("{}", "{}", False),
    ],
)
def test_attributes_of_equal_number_and_other_type_differ(old, new, differs):
    """Python says 1 == 1.0 == True; a backend shows three different attributes."""
    configs = [load(None, [f"resource.attributes={text}"], {}) for text in (old, new)]
    assert changed_keys(*configs) == (("resource.attributes",) if differs else ())
