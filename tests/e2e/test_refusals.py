"""What users see where tracing is impossible: for each way of refusing that can be had for real, one line and a code.

The refusals are the kernel's own: capabilities are dropped, files are covered in a mount namespace of the test, a
seccomp filter answers system calls as a container runtime's does. What cannot be had here (lockdown, other kernels) is
in tests/unit/kernel/test_refusals.py.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import pty
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agent.errors import KernelUnsupportedError, SpanloomError
from agent.kernel.capture import Capture, CaptureSettings, object_path
from tests.e2e.harness import REPOSITORY, clean_environment

SPANLOOM = (sys.executable, "-m", "agent")
BTF = Path("/sys/kernel/btf/vmlinux")

# include/uapi/linux/bpf.h
BPF_MAP_CREATE, BPF_PROG_LOAD, BPF_RAW_TRACEPOINT_OPEN, BPF_LINK_CREATE = 0, 5, 17, 28
BPF_CALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
BPF_LD_W_ABS, BPF_JMP_JEQ_K, BPF_RET_K = 0x20, 0x15, 0x06


def answer_bpf_calls(code: int, commands: Sequence[int] = ()) -> Callable[[], None]:
    """A ``preexec_fn``: bpf(2) fails with ``code`` from here on, for these commands only where some are given."""

    def instruction(operation: int, on_true: int, on_false: int, value: int) -> bytes:
        return struct.pack("<HBBI", operation, on_true, on_false, value)

    refuse = [instruction(BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO | code)]
    if commands:  # the low half of the first argument, at offset 16 of struct seccomp_data
        allow = instruction(BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW)
        jumps = [
            instruction(BPF_JMP_JEQ_K, len(commands) - index, 0, command) for index, command in enumerate(commands)
        ]
        refuse = [instruction(BPF_LD_W_ABS, 0, 0, 16), *jumps, allow, *refuse]
    program = [
        instruction(BPF_LD_W_ABS, 0, 0, 0),
        instruction(BPF_JMP_JEQ_K, 1, 0, BPF_CALL),
        instruction(BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW),
        *refuse,
    ]
    libc = ctypes.CDLL(None, use_errno=True)

    def install() -> None:
        instructions = ctypes.create_string_buffer(b"".join(program))
        header = struct.pack("@HP", len(program), ctypes.addressof(instructions))
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
            raise OSError(ctypes.get_errno(), "no seccomp filter")

    return install


def in_namespace(shell: str, command: Sequence[str]) -> list[str]:
    """The command in a mount namespace of its own, after ``shell`` has changed it."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{shell}; exec {shlex.join(command)}"]


def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def run_on_terminal(command: Sequence[str], **options: object) -> tuple[int, str]:
    """Exit code and everything a user sees, with a terminal for input, output and errors."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=clean_environment(), stdin=theirs, stdout=theirs, stderr=theirs, **options
        )
    finally:
        os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError as error:
        if error.errno != errno.EIO:  # the last one who had the other side open has closed it
            raise
    finally:
        os.close(ours)
    return process.wait(60), seen.decode()


def assert_refused(command: Sequence[str], code: int, words: Sequence[str], **options: object) -> None:
    """It ends with the code and one line that has the words, and nothing else is seen, on a terminal and elsewhere."""
    piped = run(command, **options)
    assert (piped.returncode, piped.stdout) == (code, ""), piped
    terminal_code, seen = run_on_terminal(command, **options)
    assert terminal_code == code, seen
    for text in (piped.stderr, seen):
        lines = text.splitlines()
        assert len(lines) == 1, text
        assert lines[0].startswith("spanloom: ")
        for word in words:
            assert word in lines[0]


def run_command(*overrides: str) -> list[str]:
    command = [*SPANLOOM, "run"]
    for override in ("telemetry.listen=null", *overrides):
        command += ["--set", override]
    return command


def test_root_without_capabilities():
    """A container's root with no capability: exit code 3 and how to get them."""
    assert_refused(["setpriv", "--bounding-set", "-all", *run_command()], 3, ("CAP_BPF", "CAP_PERFMON", "sudo"))


def test_root_with_too_few_capabilities():
    """CAP_BPF alone does not do."""
    assert_refused(["setpriv", "--bounding-set", "-all,+bpf", *run_command()], 3, ("CAP_PERFMON",))


def test_no_btf():
    """A kernel that shows no BTF: exit code 4 and the option it was built without."""
    hidden = in_namespace(f"mount -t tmpfs none {BTF.parent}", run_command())
    assert_refused(hidden, 4, ("BTF", "CONFIG_DEBUG_INFO_BTF=y"))


@pytest.fixture
def btf_without_sockets(tmp_path: Path) -> str:
    """A shell command that gives this kernel a BTF without the youngest tracepoint of the socket backend."""
    name = b"\0btf_trace_tcp_sendmsg_locked\0"
    btf = BTF.read_bytes()
    if btf.count(name) != 1:
        pytest.skip("this kernel has not the tracepoint that the test hides")
    changed = tmp_path / "vmlinux"
    changed.write_bytes(btf.replace(name, name.replace(b"locked", b"absent")))
    return f"mount --bind {changed} {BTF}"


def test_a_backend_that_the_kernel_lacks(btf_without_sockets: str):
    """kernel.backend=sockets before Linux 6.16: exit code 4, what is missing, and the setting that works."""
    command = in_namespace(btf_without_sockets, run_command("kernel.backend=sockets"))
    assert_refused(command, 4, ("tcp_sendmsg_locked", "Linux 6.16", "set kernel.backend to auto"))


@pytest.mark.parametrize(
    ("answer", "commands", "code", "words"),
    [
        (errno.EPERM, (), 5, ("refuses to load", "seccomp", "spanloom check")),
        (errno.EACCES, (BPF_PROG_LOAD,), 5, ("refuses to load", "spanloom check")),
        (errno.EPERM, (BPF_RAW_TRACEPOINT_OPEN, BPF_LINK_CREATE), 5, ("refuses to attach", "spanloom check")),
        (errno.ENOSYS, (), 4, ("cannot load", "not implemented", "spanloom check")),
        (errno.ENOMEM, (BPF_MAP_CREATE,), 1, ("memory limit", "cgroup", "limits.connections")),
    ],
)
def test_bpf_is_refused(answer: int, commands: tuple[int, ...], code: int, words: tuple[str, ...]):
    """The kernel answers bpf(2) with an error, as under a runtime's seccomp profile: the code says of which kind."""
    assert_refused(run_command(), code, words, preexec_fn=answer_bpf_calls(answer, commands))


def test_an_agent_that_cannot_listen_says_one_line():
    """The probes are loaded by then, but nothing was captured: no event tells of books that are empty."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert_refused(run_command(f"telemetry.listen={address}"), 2, ("telemetry.listen", address))


def compile_capture(directory: Path, addition: str) -> Path:
    """The capture programs and one more, as the Makefile builds them."""
    source, compiled = directory / "capture.bpf.c", directory / "capture.bpf.o"
    source.write_text((REPOSITORY / "bpf" / "capture.bpf.c").read_text() + addition)
    architecture = {"x86_64": "x86", "aarch64": "arm64"}[platform.machine()]
    subprocess.run(
        [
            *("clang", "-O2", "-g", "-mcpu=v3", "-target", "bpf", f"-D__TARGET_ARCH_{architecture}"),
            *("-I", REPOSITORY / "bpf", "-I", f"/usr/include/{platform.machine()}-linux-gnu"),
            *("-c", source, "-o", compiled),
        ],
        check=True,
        timeout=120,
    )
    return compiled


@pytest.mark.parametrize("rounds", [1, 2000])
def test_a_program_that_the_verifier_rejects(tmp_path: Path, rounds: int):
    """The verifier says EACCES, as a policy does: it is a matter of the kernel, and its reason is in the message.

    With many rounds its log is far longer than what is kept: the end has the reason.
    """
    addition = f"""
SEC("tp_btf/sched_process_exit")
int rejected(__u64 *context)
{{
	__u32 sum = 0;

	for (__u32 i = 0; i < {rounds}; i++) {{
		asm volatile("" : "+r"(sum));
		sum += bpf_get_prandom_u32() & 1;
	}}
	return sum + *(volatile int *)(context[0] + 0x10000000);
}}
"""
    with pytest.raises(KernelUnsupportedError) as caught:
        Capture(CaptureSettings(), compile_capture(tmp_path, addition))
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "verifier" in message
    assert "Permission denied" in message
    assert "268435456" in message, "the offset that it objects to"
    assert "run `spanloom check`" in message
    assert "\n" not in message


def test_a_damaged_object_is_no_fault_of_the_kernel(tmp_path: Path):
    """Exit code 1 and how to make it anew."""
    damaged = tmp_path / "capture.bpf.o"
    damaged.write_bytes(object_path().read_bytes()[:5000])
    with pytest.raises(SpanloomError, match="make build") as caught:
        Capture(CaptureSettings(), damaged)
    assert caught.value.exit_code == 1


def check(shell: str) -> dict:
    done = run(in_namespace(shell, [*SPANLOOM, "check", "--json"]))
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_check_without_btf():
    """The table foretells what ``run`` does there."""
    document = check(f"mount -t tmpfs none {BTF.parent}")
    assert document["exit_code"] == 4
    assert document["checks"]["btf"]["state"] == "no"
    assert "CONFIG_DEBUG_INFO_BTF" in document["checks"]["btf"]["remedy"]


def test_check_without_the_tracepoints_of_sockets(btf_without_sockets: str):
    """The row says which is missing and what it costs; ``run`` works all the same, by what comes next."""
    document = check(btf_without_sockets)
    row = document["checks"]["socket_tracepoints"]
    assert row["state"] == "no"
    assert row["detail"].startswith("tcp_sendmsg_locked: ")
    assert "6.16" in row["remedy"]
    detail = document["checks"]["capture"]["detail"]
    assert detail.startswith(
        "backend syscalls by system calls, because this kernel has no tracepoint tcp_sendmsg_locked (Linux 6.16)"
    )
    assert document["exit_code"] == 0
