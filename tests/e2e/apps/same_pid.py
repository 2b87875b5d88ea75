"""Runs commands one after the other under one and the same process id, each in a cgroup of its own.

``same_pid.py PID COMMANDS``: COMMANDS is a JSON list of ``[cgroup directory, [argument, ...]]``. Each is made with
clone3(2), which can choose the id (``set_tid``) and the cgroup (``CLONE_INTO_CGROUP``). A SIGTERM is passed on to the
command that runs. Root in the initial pid namespace.
"""

import ctypes
import json
import os
import signal
import struct
import sys

SYS_CLONE3 = 435  # on all architectures
CLONE_INTO_CGROUP = 0x200000000

# PyDLL keeps the interpreter's lock over the call: the child has it, too, and has no other thread.
libc = ctypes.PyDLL(None, use_errno=True)


def clone(pid, cgroup_fd):
    """Fork; the child has the id ``pid``. Returns as fork does."""
    wanted = (ctypes.c_int * 1)(pid)
    # struct clone_args of include/uapi/linux/sched.h
    arguments = struct.pack(
        "=11Q", CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, cgroup_fd
    )
    result = libc.syscall(SYS_CLONE3, arguments, ctypes.c_size_t(len(arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"clone3: {os.strerror(ctypes.get_errno())}")
    return result


def main():
    pid, commands = int(sys.argv[1]), json.loads(sys.argv[2])
    for directory, command in commands:
        cgroup_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        if clone(pid, cgroup_fd) == 0:
            try:
                os.execvp(command[0], command)
            finally:
                os._exit(127)
        os.close(cgroup_fd)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
        _, status = os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if status:
            sys.exit(f"{command} ended with status {status}")


if __name__ == "__main__":
    main()
