"""A run of several processes: how they find each other, and how all of them end when one does."""

import faulthandler
import hashlib
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from resnet_jax.errors import UserError, exit_immediately, report
from resnet_jax.runs.preemption import TrainingInterrupted

_LOST_AFTER_SECONDS = 30  # without a sign of life of another process


def join() -> None:
    """Find the other processes in the environment of SLURM, Open MPI, a TPU pod or Kubernetes (JobSet).

    Raises:
        UserError: where there is no such environment, or the others do not come.
    """
    print("waiting for the other processes, up to 5 minutes", flush=True)
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=_LOST_AFTER_SECONDS, shutdown_timeout_seconds=_LOST_AFTER_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--distributed: the other processes were not found ({error}): start them all with srun, mpirun or a JobSet"
        ) from error
    faulthandler.disable()  # JAX aborts a process whose coordinator died and says so; a dump of every thread hides it


def check_agreement(what: str, value: str) -> None:
    """Refuse to go on where a text is not the same in all processes: each would train a run of its own.

    Raises:
        UserError: in all of them.
    """
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.int32)
        digests = multihost_utils.process_allgather(digest)
        if (digests != digests[0]).any():
            raise UserError(f"the processes of this run have not the same {what}: start all of them alike")


def is_lost_peer(error: Exception) -> bool:
    """Whether an error is what this process sees of another's end: the transport between them gave up."""
    words = re.search("gloo|nccl|coordination|barrier", str(error), re.IGNORECASE)
    return jax.distributed.is_initialized() and words is not None


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """In a run of several processes, end this one at once where the block fails, so that the others end too.

    The usual way out would wait for them, and they for this one. A process alone is left to it.
    """
    try:
        yield
    except TrainingInterrupted:
        raise  # which all raise
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            report(error)
        elif is_lost_peer(error):
            reason = str(error).splitlines()[0][:200]
            report(
                f"process {jax.process_index()} lost another ({reason}), which may say why: the same command, on any "
                "number of processes, goes on from the last checkpoint"
            )
        else:
            traceback.print_exc()
        exit_immediately(2 if isinstance(error, UserError) else 1)
