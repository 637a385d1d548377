"""The free memory of the host, and what does not fit in it."""

from pathlib import Path

import psutil

from resnet_jax.errors import UserError

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


class TooLargeError(UserError):
    """Images do not fit in the memory of the host."""


def free() -> int:
    """Return the bytes that this process may still use: those that the host has free, within the limits of its control groups.

    Containers, SLURM and systemd set such limits. Those of cgroup v2 are read.
    """
    available: int = psutil.virtual_memory().available
    for group in _groups():
        try:
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # a group without a limit
            continue
        reclaimable = sum(int(statistics.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
        available = min(available, max(0, limit - used + reclaimable))
    return available


def _groups() -> list[Path]:
    """Return the folders of this process's control group and those above it."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return []
    own = [_GROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [group for path in own for group in (path, *path.parents) if group.is_relative_to(_GROUPS)]


def check(what: str, num_bytes: int, remedy: str) -> None:
    """Check that the host has memory for arrays, before they are read or decoded.

    Raises:
        TooLargeError: if not; the message says how much they need, how much is free, and the remedy.
    """
    if num_bytes > (available := free()):
        raise TooLargeError(
            f"{what} take {num_bytes / 1e9:,.1f} GB in memory, and {available / 1e9:,.1f} GB are free: {remedy}"
        )
