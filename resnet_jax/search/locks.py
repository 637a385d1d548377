"""Locks that go with the process that holds them, however it ends: the kernel keeps them, for each an open file."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO

from optuna.storages.journal import JournalFileSymlinkLock

from resnet_jax.errors import UserError


def lock(path: Path, wait: bool) -> IO[str] | None:
    """Lock a file, which is made with its folder where it is not there.

    Returns:
        The file, locked until it is closed; None where another process holds it and `wait` is not asked for.

    Raises:
        UserError: where it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): fix this, or give another folder") from error
        stack.pop_all()
        return file


class JournalLock(JournalFileSymlinkLock):
    """Of a journal; Optuna's own, the name of a file, outlives its holder by half a minute.

    Args:
        path: of the journal.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path
        self.held: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and take a line away in which whoever held it was killed."""
        self.held = lock(self.path.with_name(self.path.name + ".lock"), wait=True)
        with self.path.open("rb+") as journal:
            journal.seek(-min(1, journal.seek(0, os.SEEK_END)), os.SEEK_END)
            if journal.read() not in (b"", b"\n"):
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let the next one have it."""
        assert self.held
        self.held.close()
