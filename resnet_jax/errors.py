"""The exceptions for what a user can fix; `CorruptCheckpointError` and `TrainingInterrupted` are in runs/."""


class UserError(Exception):
    """An error that the user can fix; its message is one line that says how."""


class TrainingDiverged(UserError):
    """A training step was rejected: its loss or gradient is not finite, or the gradient is too large."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or a device ran out of memory."""
    # JAX raises a RuntimeError whose text begins with the status code.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
