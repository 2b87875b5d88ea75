"""Which file a descriptor leads to, as probes see it: two that share an ``Identity`` are one file to the kernel.

In: an open descriptor. Out: a tuple that stays the same while the file exists, whatever becomes of its names, and that
no later file has. Never: reads the file, closes the descriptor.
"""

from __future__ import annotations

import ctypes
import os
import struct

Identity = tuple[object, ...]

_OVERLAYFS = 0x794C7630  # OVERLAYFS_SUPER_MAGIC, linux/magic.h
_STATFS_TYPE = struct.Struct("@l")  # f_type comes first
_STATFS_BYTES = 256  # more than any has
# statx(2), linux/stat.h: stx_mask, and stx_btime as seconds and nanoseconds.
_STATX_BYTES = 256
_STATX_MASK = struct.Struct("@I")
_STATX_BTIME = struct.Struct("@qI")
_STATX_BTIME_OFFSET = 80
_BTIME_WANTED = 0x800
_AT_EMPTY_PATH = 0x1000
_INODE_BITS = (1 << 32) - 1

_libc = ctypes.CDLL(None)
_statx = getattr(_libc, "statx", None)  # glibc 2.28


def identity_of(fd: int) -> Identity:
    """Raises OSError for what is no open file.

    The containers of an image have overlay file systems of their own over the same layers, and each shows a file under
    a device number of its own; probes, however, are put on the file in the layer (d_real_inode() in
    kernel/trace/trace_uprobe.c). That one has one number, of which an overlay may use the upper half for itself, and
    one time of birth. One that was copied up keeps the number and has a time of its own. The time also tells a file
    from an earlier one that had its number.
    """
    status = os.fstat(fd)
    born_ns = _born_ns(fd)
    if _kind_of_file_system(fd) == _OVERLAYFS:
        return "overlay", status.st_ino & _INODE_BITS, born_ns or status.st_mtime_ns
    return status.st_dev, status.st_ino, born_ns


def _born_ns(fd: int) -> int:
    """0 where the file system or the kernel does not tell."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if _statx is None or _statx(fd, b"", _AT_EMPTY_PATH, _BTIME_WANTED, found):
        return 0
    if not _STATX_MASK.unpack_from(found)[0] & _BTIME_WANTED:
        return 0
    seconds, nanoseconds = _STATX_BTIME.unpack_from(found, _STATX_BTIME_OFFSET)
    return seconds * 1_000_000_000 + nanoseconds


def _kind_of_file_system(fd: int) -> int:
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    return 0 if _libc.fstatfs(fd, found) else _STATFS_TYPE.unpack_from(found)[0]
