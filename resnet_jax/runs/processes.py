"""A run of several processes: how they find each other, and how all end when one fails."""

import faulthandler
import hashlib
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from resnet_jax.errors import UserError
from resnet_jax.runs.exits import exit_immediately, report
from resnet_jax.runs.preemption import TrainingInterrupted

_LOST_AFTER_SECONDS = 30  # without a sign of life of another process
_SHOWN_WITHIN_SECONDS = 60  # a host may remember the old state of a folder on NFS for so long


def join() -> None:
    """Find the other processes in the environment of SLURM, Open MPI, a TPU pod or Kubernetes (JobSet).

    Raises:
        UserError: if there is no such environment, or the others do not connect.
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
    """Check that a text is the same in all processes; otherwise each would train another run.

    Raises:
        UserError: in all of them, if it differs.
    """
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.int32)
        digests = multihost_utils.process_allgather(digest)
        if (digests != digests[0]).any():
            raise UserError(f"the processes of this run differ in their {what}: start all of them with the same")


def from_first(array: np.ndarray) -> np.ndarray:
    """Return the array of the first process: rounding differs among processors."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


def all_agree(holds: bool) -> bool:
    """Whether something holds in all processes."""
    return holds if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(holds)).all())


def wait_until_shown(holds: Callable[[], bool]) -> bool:
    """Wait until what another host wrote in a shared folder shows here, and return whether it does within a minute."""
    end = time.monotonic() + _SHOWN_WITHIN_SECONDS
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@contextmanager
def in_turn() -> Iterator[None]:
    """Run a block in the first process, then in the first one of every other host, then in all others.

    What the first writes, such as a download, the others find, whether the hosts share their folders or not.
    """
    turns, turn = 1, 0
    if jax.process_count() > 1:
        name = np.frombuffer(hashlib.sha256(platform.node().encode()).digest(), np.int32)
        hosts = [host.tobytes() for host in multihost_utils.process_allgather(name)]
        me = jax.process_index()
        turns, turn = 3, 0 if me == 0 else 1 if me == hosts.index(hosts[me]) else 2
    for earlier in range(turn):
        multihost_utils.sync_global_devices(f"turn {earlier} is over")
    yield
    for over in range(turn, turns - 1):
        multihost_utils.sync_global_devices(f"turn {over} is over")


def is_lost_peer(error: Exception) -> bool:
    """Whether an error means that another process ended. JAX has no type for it: the transport's name is in the text."""
    words = re.search("gloo|nccl|coordination|barrier", str(error), re.IGNORECASE)
    return jax.distributed.is_initialized() and words is not None


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """In a run of several processes, exit at once if the block fails, so that the others end too.

    A normal exit would wait for them while they wait for this one. A single process exits normally.
    """
    try:
        yield
    except TrainingInterrupted:
        raise  # in all of them
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            report(error)
        elif is_lost_peer(error):
            reason = str(error).splitlines()[0][:200]
            report(
                f"process {jax.process_index()} lost another ({reason}), which may say why: rerun the command, on any "
                "number of processes, to resume from the last checkpoint"
            )
        else:
            traceback.print_exc()
        exit_immediately(2 if isinstance(error, UserError) else 1)
