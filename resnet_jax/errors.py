"""The exceptions for what a user can fix; `CorruptCheckpointError` and `TrainingInterrupted` are in runs/."""


class UserError(Exception):
    """An error that the user can fix; its message is one line that says how."""


class TrainingDiverged(UserError):
    """A training step was rejected: its loss or gradient is not finite, or the gradient is too large."""


def one_line(text: object) -> str:
    """Return a text on one line, with escapes for what does not print: names of files can hold anything, also a terminal's commands."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def reason(error: BaseException) -> str:
    """Return what an exception says, on one line of at most 300 characters, or its type where it says nothing."""
    return one_line(error)[:300] or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or a device ran out of memory, for which JAX raises a RuntimeError that begins with the status code."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
