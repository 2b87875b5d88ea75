#!/usr/bin/env python3
"""Builds a Kubernetes control plane and Jaeger from their Go modules, and runs tests/real against them.

In: ``go`` (1.26 or later) and its module proxy. Out: what pytest prints, and its exit code; further arguments are
pytest's. The programs are built once and kept in a cache (SPANLOOM_CACHE, else ~/.cache/spanloom); that takes twelve
minutes of one core, and leaves 2 GB of sources and 4 GB of results in Go's own caches. Nothing is installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SPANLOOM_CACHE") or Path.home() / ".cache" / "spanloom") / "real"

KUBERNETES = "1.36.3"
ETCD = "3.6.8"
JAEGER = "1.76.0"
"""Jaeger v2 has module versions of its own: this is the source of 2.13.0."""

_MAJOR, _MINOR, _ = KUBERNETES.split(".")
_VERSION = "k8s.io/component-base/version"
_FLAGS = f"-X {_VERSION}.gitVersion=v{KUBERNETES} -X {_VERSION}.gitMajor={_MAJOR} -X {_VERSION}.gitMinor={_MINOR}"

PROGRAMS = {
    "jaeger": ("jaeger", f"github.com/jaegertracing/jaeger/cmd/jaeger@v{JAEGER}", ""),
    "etcd": ("kubernetes", f"go.etcd.io/etcd/server/v3@v{ETCD}", ""),
    "kube-apiserver": ("kubernetes", f"k8s.io/kubernetes/cmd/kube-apiserver@v{KUBERNETES}", _FLAGS),
    "kube-controller-manager": ("kubernetes", f"k8s.io/kubernetes/cmd/kube-controller-manager@v{KUBERNETES}", _FLAGS),
}
"""Name -> the module that is made for it here, its package, and flags of the linker."""


def go(*arguments: str, directory: Path) -> str:
    done = subprocess.run(["go", *arguments], cwd=directory, capture_output=True, text=True)
    if done.returncode:  # what it says otherwise is hundreds of names of modules
        raise SystemExit(f"real: go {' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def replacements(directory: Path) -> list[str]:
    """Kubernetes names its own libraries by directories of its repository; published they are modules as well."""
    module = json.loads(go("mod", "download", "-json", f"k8s.io/kubernetes@v{KUBERNETES}", directory=directory))
    names = re.findall(r"^\s*(k8s\.io/\S+) => \./staging/", Path(module["GoMod"]).read_text(), re.MULTILINE)
    return [f"{name}={name}@v0.{_MINOR}.{KUBERNETES.split('.')[2]}" for name in names]


def build(directory: Path) -> None:
    """The programs, in a directory that is complete or absent."""
    if shutil.which("go") is None:
        raise SystemExit("real: needs Go 1.26 or later (go)")
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    for module in dict.fromkeys(module for module, _, _ in PROGRAMS.values()):
        sources = work / module
        sources.mkdir(parents=True)
        go("mod", "init", f"spanloom.io/{module}", directory=sources)
        if module == "kubernetes":
            for replacement in replacements(sources):
                go("mod", "edit", f"-replace={replacement}", directory=sources)
        packages = [package for own, package, _ in PROGRAMS.values() if own == module]
        go("get", "-tool", *packages, directory=sources)
    for name, (module, package, flags) in PROGRAMS.items():
        print(f"real: building {name}", file=sys.stderr)
        target = str(work / "bin" / name)
        go("build", "-ldflags", f"-s -w {flags}", "-o", target, package.partition("@")[0], directory=work / module)
    (work / "bin").rename(directory)
    shutil.rmtree(work)


def main(arguments: list[str]) -> int:
    directory = CACHE / f"kubernetes-{KUBERNETES}-etcd-{ETCD}-jaeger-{JAEGER}"
    if not directory.exists():
        build(directory)
    command = [ROOT / ".venv/bin/python", "-m", "pytest", "-q", "tests/real", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "SPANLOOM_REAL": str(directory)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
