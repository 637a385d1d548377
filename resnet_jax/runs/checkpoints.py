"""Checkpoints through Orbax: written in the background, the latest two and the best kept, whole ones alone restored.

Orbax restores a flipped byte in silence, so each checkpoint holds the digest of its state and is checked against it.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from resnet_jax import train_state
from resnet_jax.errors import UserError
from resnet_jax.runs import processes
from resnet_jax.train_state import TrainState


class CorruptCheckpointError(UserError):
    """A checkpoint that cannot be read, or does not hold what was saved.

    Attributes:
        finding: what is damaged, and how; the message adds what a person can do.
    """

    def __init__(self, finding: str) -> None:
        super().__init__(f"{finding}: choose another checkpoint or --workdir, or move it away")
        self.finding = finding


def _reason(error: Exception) -> str:
    """The end of the first line of an error, where TensorStore says what the matter is, before it lists its settings."""
    first = (str(error).splitlines() or [""])[0].split(" [", 1)[0]
    return f"{type(error).__name__}: {': '.join(first.split(': ')[-2:])[:200]}"


class _Best(policy.PreservationPolicy):
    """Keep the checkpoint of highest validation accuracy."""

    def __init__(self, accuracies: Mapping[int, float]) -> None:
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: policy.PreservationContext) -> Sequence[bool]:
        best = _best((checkpoint.step for checkpoint in checkpoints), self._accuracies)
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best(steps: Iterable[int], accuracies: Mapping[int, float]) -> int | None:
    """The step of highest accuracy, the latest among equals; None where none has one."""
    return max((s for s in steps if s in accuracies), key=lambda s: (accuracies[s], s), default=None)


class Checkpoints:
    """The checkpoints of one run, by step.

    The best is the one of highest validation accuracy; where none was validated, the latest stands for it. A checkpoint
    is saved before it is validated, so accuracies are not Orbax's to know.

    Args:
        directory: made where it is not there.
        accuracies: step -> validation accuracy, of the run so far; a checkpoint may be saved before its own is added.
        read_only: change nothing.
    """

    def __init__(self, directory: Path, accuracies: Mapping[int, float], read_only: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(2), _Best(accuracies)]),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._directory, self._accuracies = directory.absolute(), accuracies
        with self._readable():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    @contextmanager
    def _readable(self, step: int | None = None) -> Iterator[None]:
        """What a damaged checkpoint makes Orbax raise is of a dozen kinds, and becomes one `CorruptCheckpointError`."""
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
        """What a write that fails makes Orbax raise, at once or at the next save, becomes one line."""
        try:
            yield
        except Exception as error:
            if processes.is_lost_peer(error):
                raise
            kept = max(self._manager.all_steps(read=True), default=None)
            raise UserError(
                f"{self._directory}: a checkpoint cannot be written ({_reason(error)}): mend that, and "
                + ("start the run again" if kept is None else f"the same command goes on from step {kept}")
            ) from error

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint, None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start writing the checkpoint of a state; an error of the write before this one is raised here.

        Args:
            state: its `step` names the checkpoint.
            meta: what JSON can hold, kept beside the state.

        Raises:
            UserError: where this checkpoint or the one before it cannot be written.
            RuntimeError: where Orbax declines, as it does for a step that is not later than the latest.
        """
        step = int(state.step)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(meta | {"digest": train_state.digest(state)}),
        )
        with self._writable():
            saved = self._manager.save(step, args=arguments)
        if not saved:
            raise RuntimeError(f"Orbax did not save step {step}; the latest is {self.latest}")

    def choose(self, which: str) -> int:
        """The step that "best", "latest" or a number names.

        Raises:
            UserError: where there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self._directory} holds no checkpoint: train first, or give the --workdir of a run")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = _best(steps, self._accuracies)
            return steps[-1] if best is None else best
        if not which.isdecimal():
            raise UserError(f"--checkpoint {which!r} must be best, latest or a step")
        if int(which) not in steps:
            raise UserError(
                f"{self._directory} holds no checkpoint of step {which}: choose one of {', '.join(map(str, steps))}"
            )
        return int(which)

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` that a checkpoint was saved with.

        Raises:
            CorruptCheckpointError: where it cannot be read.
        """
        with self._readable(step):
            meta: dict[str, Any] = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]
            _ = meta["digest"]
        return meta

    def restore(
        self, step: int, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint onto the devices of `like`, whatever devices wrote it.

        Args:
            step: which.
            like: a state of the same structure, shapes and shardings; its values are not used.
            check: called with the checkpoint's `meta` before its state is read, to refuse one of another run.

        Returns:
            The state, and the `meta` it was saved with.

        Raises:
            CorruptCheckpointError: where it cannot be read, or its state has not the digest it was saved with.
        """
        meta = self.meta(step)
        with self._readable(step):
            check(meta)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        with self._readable(step):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._manager.restore(step, args=arguments)["state"]
            if train_state.digest(state) != meta["digest"] or int(state.step) != step:
                raise ValueError("its state is not the one that was saved")
        return state, meta

    def restore_newest(
        self, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Read the newest checkpoint that is whole, and move newer, damaged ones aside, to `damaged/` beside this folder.

        Args:
            like: as in `restore`.
            check: as in `restore`.

        Returns:
            As `restore`, or None where there is no checkpoint at all.

        Raises:
            CorruptCheckpointError: where there are checkpoints and none is whole; all are left as they are.
        """
        damaged: dict[int, CorruptCheckpointError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self.restore(step, like, check)
            except CorruptCheckpointError as error:
                damaged[step] = error
                continue
            if damaged:
                self._set_aside(damaged)
                self._manager.reload()
            return found
        if damaged:
            newest = next(iter(damaged.values()))
            raise CorruptCheckpointError(f"no checkpoint of {self._directory} is whole; the newest: {newest.finding}")
        return None

    def _set_aside(self, damaged: dict[int, CorruptCheckpointError]) -> None:
        """Move steps aside, each with the reason that is printed; process 0 does, and all wait for it."""
        if jax.process_index() == 0:
            for step, why in damaged.items():
                place = self._directory.parent / "damaged" / f"{step}-{time.time_ns()}"
                place.parent.mkdir(exist_ok=True)
                shutil.move(self._directory / str(step), place)  # perhaps to another disk
                print(f"{why.finding}; moved to {place}", file=sys.stderr)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def wait(self) -> None:
        """Return once everything is written.

        Raises:
            UserError: where it could not be.
        """
        with self._writable():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Free what the manager holds. A write that fails only now follows another error: `wait` comes first otherwise."""
        with suppress(Exception):
            self._manager.close()
