"""Checkpoints through Orbax: written in the background; the latest two and the best are kept.

Orbax restores a corrupt byte in silence, so each checkpoint holds a digest of each part of its state, and one of its `meta`
with those. A reader checks all that it reads.
"""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from resnet_jax import train_state
from resnet_jax.disk import files
from resnet_jax.errors import UserError, is_out_of_memory
from resnet_jax.runs import processes
from resnet_jax.runs.metrics_log import Validation, best_step, validations
from resnet_jax.train_state import AveragedTrainState, TrainState

T = TypeVar("T")
# Of a checkpoint's `meta`.
_TYPES = {
    "config": dict,
    "fingerprint": str,
    "class_names": list,
    "image_shape": list,
    "seconds": float,
    "digest": str,
}
_ATTEMPTS = 20  # to read a checkpoint of a run that replaces its checkpoints


class CorruptCheckpointError(UserError):
    """A checkpoint cannot be read, or does not hold what was saved.

    Attributes:
        finding: what is corrupt, and how; the message adds what to do.
    """

    def __init__(self, finding: str) -> None:
        super().__init__(f"{finding}: choose another checkpoint or --workdir, or move it away")
        self.finding = finding


def _reason(error: Exception) -> str:
    """The part of an error's first line in which TensorStore names the cause, before it lists its settings."""
    first = (str(error).splitlines() or [""])[0].split(" [", 1)[0]
    return f"{type(error).__name__}: {': '.join(first.split(': ')[-2:])[:200]}"


def _check_types(meta: Any) -> None:
    """Raise a ValueError if a `meta` lacks a key, or holds a value of another type than a run saves."""
    for name, kind in _TYPES.items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"its meta has no valid {name}")
    names, shape = meta["class_names"], meta["image_shape"]
    if not all(isinstance(name, str) for name in names) or not 0 < len(set(names)) == len(names):
        raise ValueError("its meta has no valid class_names")
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError("its meta has no valid image_shape")


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved, by name."""
    fields = [field.name for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]
    return {name: getattr(state, name) for name in fields}


def _digests(parts: Mapping[str, Any]) -> dict[str, str]:
    return {name: train_state.digest(part) for name, part in parts.items()}


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


class _KeepBest(policy.PreservationPolicy):
    """Keep the checkpoint with the best validation.

    Attributes:
        validations: by step; replaced for each save, because another thread reads it.
    """

    validations: Mapping[int, Validation] = MappingProxyType({})

    def should_preserve(self, checkpoints: Sequence[Any], *, context: policy.PreservationContext) -> Sequence[bool]:
        best = _best_kept([checkpoint.step for checkpoint in checkpoints], self.validations)
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best_kept(steps: Sequence[int], validations: Mapping[int, Validation]) -> int | None:
    """The step with the best validation; if its checkpoint is not one of `steps`, perhaps damaged, the best of those."""
    best = best_step(validations)
    return best if best in steps else best_step({step: validations[step] for step in steps if step in validations})


class Checkpoints:
    """The checkpoints of one run, by step.

    The best is that of `metrics_log.best_step`; if none was validated, it is the latest. A checkpoint is saved before it is
    validated, so the validations are kept outside Orbax.

    Args:
        directory: of the checkpoints; made if it does not exist.
        validations: by step, of the run so far; it grows after the checkpoints are saved.
        read_only: change nothing.
    """

    def __init__(self, directory: Path, validations: Mapping[int, Validation], read_only: bool = False) -> None:
        self._directory, self._validations = directory.absolute(), validations
        self._keep_best = _KeepBest()
        self._thread, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)
        me = jax.process_index()
        reading = ocp.CheckpointManagerOptions(
            create=False,
            read_only=True,
            # Else Orbax waits after each read for the other processes, for ever if one of them cannot read.
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}),
        )
        writing = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(2), self._keep_best]),
            cleanup_tmp_directories=True,
        )
        with self._readable():
            self._manager = ocp.CheckpointManager(self._directory, options=reading if read_only else writing)
            self._reader = self._manager if read_only else ocp.CheckpointManager(self._directory, options=reading)

    @contextmanager
    def _readable(self, step: int | None = None) -> Iterator[None]:
        """Turn the dozen kinds of exception that Orbax raises for a damaged checkpoint into `CorruptCheckpointError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if processes.is_lost_peer(error):
                raise
            what = self._directory if step is None else self._directory / str(step)
            raise CorruptCheckpointError(f"{what} is damaged ({_reason(error)})") from error

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Turn what Orbax raises for a failed write, at once or at the next save, into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if processes.is_lost_peer(error) or is_out_of_memory(error):
                raise
            self._manager.reload()
            kept = self._manager.latest_step()
            raise UserError(
                f"{self._directory}: a checkpoint cannot be written ({_reason(error)}): fix this and rerun the "
                + ("command" if kept is None else f"command, which resumes from step {kept}")
            ) from error

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint, written or being written; None before the first."""
        wait([self._writing])
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any], check: Callable[[], object] = lambda: None) -> None:
        """Start writing the checkpoint of a state; an error of the previous write is raised here.

        A process alone copies the state on its devices, and another thread does the rest: Orbax spends a tenth of a second
        before it returns, and the digests take as long. Several processes meet at barriers of Orbax that run on the devices,
        so they save in the thread that takes the steps.

        Args:
            state: its `step` names the checkpoint; it may be donated afterwards.
            meta: kept beside the state, as JSON: {"config", "fingerprint", "class_names", "image_shape", "seconds"}.
            check: called right before anything is written; raises a `UserError` if the folder is another one by then.

        Raises:
            UserError: if the previous checkpoint, or this one of several processes, cannot be written.
            ValueError: if the step is not later than the latest.
        """
        self.wait()
        step, latest = int(state.step), self.latest
        if latest is not None and step <= latest:
            raise ValueError(f"the checkpoint of step {step} must be later than the latest, of step {latest}")
        self._keep_best.validations = dict(self._validations)
        if jax.process_count() > 1:
            with self._writable():
                self._write(step, state, meta, check)
        else:
            self._writing = self._thread.submit(self._write, step, _copy(state), meta, check)

    def _write(self, step: int, state: TrainState, meta: dict[str, Any], check: Callable[[], object]) -> None:
        meta = meta | {"digests": _digests(_parts(state))}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(meta | {"digest": files.digest(meta)}),
        )
        check()
        if not self._manager.save(step, args=arguments):
            raise RuntimeError(f"Orbax did not save step {step}")

    def choose(self, which: str) -> int:
        """The step that "best", "latest" or a number names.

        Raises:
            UserError: if there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self._directory} holds no checkpoint: train first, or give the --workdir of a run")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = _best_kept(steps, self._validations)
            return steps[-1] if best is None else best
        if not which.isdecimal():
            raise UserError(f"--checkpoint {which!r} must be best, latest or a step")
        if which not in map(str, steps):
            raise UserError(
                f"{self._directory} holds no checkpoint of step {which}: choose one of {', '.join(map(str, steps))}"
            )
        return int(which)

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` that a checkpoint was saved with.

        Raises:
            CorruptCheckpointError: if it cannot be read, or is not what was saved.
        """
        with self._readable(step):
            for path in (self._directory / str(step)).rglob("*"):
                files.readable(path)  # Orbax would wait for a pipe
            arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta: dict[str, Any] = self._reader.restore(step, args=arguments)["meta"]
            _check_types(meta)
            unsealed = {name: value for name, value in meta.items() if name != "digest"}
            # Up to version 0.2.0, "digest" is of the state alone, and `restore` checks it.
            intact = meta["digest"] == files.digest(unsealed) if "digests" in meta else meta.keys() == _TYPES.keys()
            if not intact:
                raise ValueError("its meta differs from the one that was saved")
        return meta

    def restore(
        self, step: int, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint onto the devices of `like`; any devices may have written it.

        Args:
            step: of the checkpoint.
            like: a state of the same structure, shapes and shardings; its values are not used.
            check: called with the checkpoint's `meta` before the state is read; raises if it belongs to another run.

        Returns:
            The state, and the `meta` it was saved with.

        Raises:
            CorruptCheckpointError: if it cannot be read, or its state does not have the digest it was saved with.
        """
        meta = self.meta(step)
        with self._readable(step):
            check(meta)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        with self._readable(step):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._reader.restore(step, args=arguments)["state"]
            sealed = "digests" in meta
            intact = (
                _digests(_parts(state)) == meta["digests"] if sealed else train_state.digest(state) == meta["digest"]
            )
            if not intact or int(state.step) != step:
                raise ValueError("its state differs from the one that was saved")
        return state, meta

    def restore_variables(self, step: int, like: TrainState) -> Any:
        """Read only the weights that are evaluated, as `TrainState.variables`; arguments and errors are those of `restore`."""
        meta = self.meta(step)
        if "digests" not in meta:  # of version 0.2.0 or earlier
            return self.restore(step, like)[0].variables
        names = ["step", *(["average"] if isinstance(like, AveragedTrainState) else ["params", "batch_stats"])]
        with self._readable(step):
            wanted = {name: getattr(like, name) for name in names}
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            arguments = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
            parts = self._reader.restore(step, args=ocp.args.Composite(state=arguments))["state"]
            if _digests(parts) != {name: meta["digests"][name] for name in names} or int(parts["step"]) != step:
                raise ValueError("its weights differ from those that were saved")
        return like.replace(**parts).variables

    def restore_newest(
        self, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Read the newest intact checkpoint; newer, corrupt ones are moved to `damaged/` beside this folder.

        All processes of a run read the same one: that which the first process sees and none finds corrupt.

        Args:
            like: as in `restore`.
            check: as in `restore`.

        Returns:
            As `restore`; None if there is no checkpoint.

        Raises:
            CorruptCheckpointError: if there are checkpoints and none is intact; they stay where they are.
        """
        damaged: dict[int, CorruptCheckpointError] = {}
        while True:
            latest = max(set(self._manager.all_steps()) - damaged.keys(), default=-1)
            if (step := int(processes.from_first(np.array(latest, np.int32)))) < 0:
                break
            processes.wait_until_shown((self._directory / str(step)).exists)
            try:
                restored = self.restore(step, like, check)
                damage = CorruptCheckpointError(f"{self._directory / str(step)} cannot be read by another process")
            except CorruptCheckpointError as error:
                restored, damage = None, error
            if not processes.all_agree(restored is not None):
                damaged[step] = damage
                continue
            if damaged:
                self._set_aside(damaged)
            self._manager.reload()  # without those set aside, and with what a process did not see before
            return restored
        if damaged:
            newest = next(iter(damaged.values()))
            raise CorruptCheckpointError(f"no checkpoint of {self._directory} is intact; the newest: {newest.finding}")
        return None

    def _set_aside(self, damaged: dict[int, CorruptCheckpointError]) -> None:
        """Move checkpoints aside and print why; process 0 does so, and the others wait for it."""
        if jax.process_index() == 0:
            for step, error in damaged.items():
                place = self._directory.parent / "damaged" / f"{step}-{time.time_ns()}"
                place.parent.mkdir(exist_ok=True)
                shutil.move(self._directory / str(step), place)  # perhaps to another disk
                print(f"{error.finding}; moved to {place}", file=sys.stderr)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def wait(self) -> None:
        """Return once everything is written.

        Raises:
            UserError: if something could not be.
        """
        with self._writable():
            self._writing.result()
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Free the manager. Call `wait` first to learn of a failed write."""
        self._thread.shutdown()
        with suppress(Exception):
            self._manager.close()
            self._reader.close()


def read_chosen(directory: Path, which: str, read: Callable[[Checkpoints, int], T]) -> tuple[T, int]:
    """Choose a checkpoint of a run and read it; choose again if a session that trains in the run deletes it meanwhile.

    Args:
        directory: of the run; nothing in it is changed.
        which: as `Checkpoints.choose` takes it.
        read: called with the checkpoints and the step of the chosen one; may be called several times.

    Returns:
        What `read` returned, and the step.

    Raises:
        CorruptCheckpointError: if a checkpoint that nobody deletes cannot be read.
        UserError: if there is no such checkpoint, or checkpoints are replaced faster than they are read.
    """
    folder = directory / "checkpoints"
    for _ in range(_ATTEMPTS):
        place, before = folder, _listing(folder)
        try:
            validated = validations(directory)
            with closing(Checkpoints(folder, validated, read_only=True)) as checkpoints:
                step = checkpoints.choose(which)
                if which == "best" and validations(directory) != validated:
                    continue  # the best by the old ones may be gone, and another one chosen in its place
                place, before = folder / str(step), _listing(folder / str(step))
                return read(checkpoints, step), step
        except CorruptCheckpointError:
            if place.exists() and _listing(place) == before:
                raise
    raise UserError(
        f"the checkpoints of {folder} are replaced faster than they can be read: rerun the command when the run has ended"
    )


def _listing(folder: Path) -> set[str]:
    """The paths of all files in a folder, which may be deleted meanwhile."""
    return {os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names}
