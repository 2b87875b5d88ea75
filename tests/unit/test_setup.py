"""tools/setup.sh installs what the tests start: they also pass where nobody installed anything by hand."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = {"required", "important"}
"""Priorities of packages that every Debian has: what debootstrap installs."""
COMES_WITH = {"java": "javac", "cc": "gcc", "nm": "gcc", "strip": "gcc"}
"""Commands of packages that another command's depends on."""


def started() -> dict[str, str]:
    """What stands first in a list of words, or is unpacked into one, in the tests and is a command here -> where."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            words = node.value if isinstance(node, ast.Starred) else node if isinstance(node, ast.List) else None
            if (
                isinstance(words, ast.List | ast.Tuple)
                and len(words.elts) > 1
                and isinstance(words.elts[0], ast.Constant)
            ):
                word = words.elts[0].value
                if isinstance(word, str) and re.fullmatch(r"[a-z][a-z0-9_.+-]*", word) and shutil.which(word):
                    found.setdefault(word, f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def package_of(command: str) -> str:
    """The package that brings a command, or nothing."""
    path = Path(shutil.which(command))
    for place in map(str, (path.resolve(), path)):
        for name in (place, place.removeprefix("/usr")):  # packages may know it by its place before /usr was merged
            done = subprocess.run(["dpkg", "-S", name], capture_output=True, text=True, check=False)
            owners = [line for line in done.stdout.splitlines() if not line.startswith("diversion ")]
            if owners:
                return owners[0].partition(":")[0]
    return ""


def test_what_the_tests_start_is_installed_by_the_set_up():
    """By the name of the command; else its package is one that every Debian has. Images are tested with more."""
    script = "".join((ROOT / "tools" / name).read_text() for name in ("setup.sh", "image_test.sh"))
    named = set(re.findall(r"need_command (\S+) \S+", script))
    commands = started()
    assert {"nghttpx", "nghttpd", "wrk", "wget"} <= commands.keys()
    missing = {}
    for command, place in commands.items():
        if COMES_WITH.get(command, command) in named:
            continue
        package = package_of(command)
        if not package:
            continue  # a toolchain from elsewhere: its tests are skipped where it is missing
        query = ["dpkg-query", "-W", "-f=${Priority} ${Essential}", package]
        priority, _, essential = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition(
            " "
        )
        if not (priority in BASE or essential == "yes" or re.search(rf"\b{re.escape(package)}\b", script)):
            missing[command] = (place, package, priority)
    assert not missing
