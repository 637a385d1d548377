"""Locks on open files, which the kernel releases when their process ends, however it ends."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO

from optuna.storages.journal import JournalFileSymlinkLock

from resnet_jax.errors import UserError


def lock(path: Path, wait: bool) -> IO[str] | None:
    """Lock a file; create it and its folder if they do not exist.

    Returns:
        The file, locked until it is closed; None if another process holds the lock and `wait` is False.

    Raises:
        UserError: if the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): fix this, or give another folder") from error
        stack.pop_all()
        return file


class JournalLock(JournalFileSymlinkLock):
    """The lock of a journal. Optuna's own lock stays for half a minute after its process was killed.

    Args:
        path: path of the journal.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path
        self.held: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock; remove the incomplete last line of a process that was killed while writing."""
        self.held = lock(self.path.with_name(self.path.name + ".lock"), wait=True)
        with self.path.open("rb+") as journal:
            journal.seek(-min(1, journal.seek(0, os.SEEK_END)), os.SEEK_END)
            if journal.read() not in (b"", b"\n"):
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        assert self.held
        self.held.close()
