"""The environment of a run: code, versions, devices, host."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax

from resnet_jax import host
from resnet_jax.kernels import native

_PACKAGES = [
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "clu",
    "ml_collections",
    "numpy",
    "tensorflow-cpu",
    "tensorflow",
    "tensorflow-datasets",
]
_COMPILERS = ("jax", "jaxlib")
# The code that a figure comes from. Results, runs, reports, data, documents and tests may change without changing a figure.
_CODE = (
    *("resnet_jax", "configs", "benchmarks", "reproduction"),
    *("launch.py", "setup.py", "pyproject.toml", "requirements.txt"),
)


def collect() -> dict[str, Any]:
    """The environment of this process, as `environment.json` holds it."""
    versions = {"resnet_jax": host.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "git": _git_state(),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu(),
        "cpu_count": host.usable_cores(),
        "backend": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "native_kernels": not native.unavailable(),
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what differs between two environments and changes the rounding of sums: "cpu_count 2 -> 1", ...

    What an older version did not write into `before` is not compared.
    """
    names = ("cpu", "cpu_count", "backend", "devices", "processes", "xla_flags", "native_kernels")
    was, now_is = (
        {name: env[name] for name in names if name in env} | {name: env["versions"].get(name) for name in _COMPILERS}
        for env in (before, now)
    )
    return [f"{name} {value} -> {now_is[name]}" for name, value in was.items() if value != now_is[name]]


def peak_memory_bytes() -> dict[str, int | None]:
    """The peak memory of this process: {"host": resident, "device": of its first device}; None if the system does not say."""
    device = jax.local_devices()[0].memory_stats() or {}
    status = Path("/proc/self/status")  # getrusage's figure may be that of the process that started this one
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8")) if status.exists() else None
    return {"host": int(peak[1]) * 1024 if peak else None, "device": device.get("peak_bytes_in_use")}


def _cpu() -> str:
    """The processor's name, its family and model, which tell what a cloud's name hides, and the vectors that it has."""
    path = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", path.read_text("utf-8"), re.MULTILINE)) if path.exists() else {}
    if "cpu family" not in fields:
        return platform.processor() or platform.machine()
    flags = fields["flags"].split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "SSE"
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']}, {vectors})"


def _git_state() -> dict[str, Any] | None:
    """The commit, and "dirty": whether it lacks a file of `_CODE`, or holds another version; files that git ignores do not count.

    None unless a git repository holds the package at its root. The repository around a copy, or around the environment that
    the package is installed in, has commits of other code.
    """
    root = host.CHECKOUT

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        # New files count, also for a user whose git does not show them.
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", *_CODE)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
