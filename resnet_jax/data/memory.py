"""The free memory of the host, and what does not fit in it."""

from pathlib import Path

import psutil

from resnet_jax.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")


class TooLargeError(UserError):
    """Images do not fit in the memory of the host."""


def free() -> int:
    """Return the bytes that this process may still use: those that the host has free, within the limit of its container."""
    available: int = psutil.virtual_memory().available
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # without control groups, or "max": no limit
        return available
    return min(available, max(0, limit - used + int(statistics["inactive_file"])))  # which the kernel can give back


def check(what: str, num_bytes: int, remedy: str) -> None:
    """Check that the host has memory for arrays, before they are read or decoded.

    Raises:
        TooLargeError: if not; the message says how much they need, how much is free, and the remedy.
    """
    if num_bytes > (available := free()):
        raise TooLargeError(
            f"{what} take {num_bytes / 1e9:,.1f} GB in memory, and {available / 1e9:,.1f} GB are free: {remedy}"
        )
