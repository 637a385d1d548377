"""What a figure depends on besides config and data: code, versions, devices, host."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from resnet_jax import host

_PACKAGES = [
    "resnet_jax",
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


def collect() -> dict[str, Any]:
    """What a figure depends on besides config and data: code, versions, devices, host."""
    versions = {}
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
        "cpu_count": host.usable_cores(),
        "backend": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def peak_memory_bytes() -> dict[str, int | None]:
    """The most memory that this process has held: "host", resident, and "device", of its first; None where not told."""
    device = jax.local_devices()[0].memory_stats() or {}
    return {"host": host.peak_resident_bytes(), "device": device.get("peak_bytes_in_use")}


def _git_state() -> dict[str, Any] | None:
    """Commit of the code and whether its files differ from it; None where the code is not in a git repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
