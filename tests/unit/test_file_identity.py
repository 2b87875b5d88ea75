"""agent.file_identity: files made here -> which of them are one. Overlays are in tests/e2e/test_tls_churn.py."""

from __future__ import annotations

import os
from pathlib import Path

from agent.file_identity import Identity, identity_of


def identity(path: Path) -> Identity:
    with path.open("rb") as opened:
        return identity_of(opened.fileno())


def test_a_file_is_the_same_whatever_its_names_are(tmp_path: Path):
    """Links, other names, no name, other bytes, another owner's rights."""
    path = tmp_path / "library"
    path.write_bytes(b"one")
    with path.open("rb") as opened:
        first = identity_of(opened.fileno())
        os.link(path, tmp_path / "link")
        assert identity(tmp_path / "link") == first
        path.rename(tmp_path / "renamed")
        (tmp_path / "renamed").write_bytes(b"two")
        (tmp_path / "link").chmod(0o600)
        os.utime(tmp_path / "link", (1, 1))
        assert identity(tmp_path / "renamed") == first
        (tmp_path / "renamed").unlink()
        (tmp_path / "link").unlink()
        assert identity_of(opened.fileno()) == first


def test_a_file_is_not_taken_for_an_earlier_one(tmp_path: Path):
    """Inode numbers are used again as soon as a file is gone."""
    path = tmp_path / "library"
    found = []
    for _ in range(20):
        path.write_bytes(b"one")
        found.append(identity(path))
        path.unlink()
    assert len(set(found)) == len(found)


def test_no_descriptor_is_left(tmp_path: Path):
    """That of the file itself is its owner's."""
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "library").open("wb") as opened:
        identity_of(opened.fileno())
        assert len(os.listdir("/proc/self/fd")) == before + 1
