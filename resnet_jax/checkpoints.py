"""Checkpoints through Orbax: written in the background, the latest two and the best kept, whole ones alone restored.

Orbax restores a flipped byte in silence, so each checkpoint holds the digest of its state and is checked against it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from resnet_jax import train_state
from resnet_jax.errors import UserError
from resnet_jax.train_state import TrainState


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


class Damaged(UserError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The checkpoints of one run, by step.

    The best is the one of highest validation accuracy; where none was validated, the latest stands for it.
    """

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        # Not max_to_keep with best_fn, which would delete the newest checkpoint in favour of better ones.
        keep = policy.AnyPreservationPolicy(
            [
                policy.LatestN(2),
                policy.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,
            best_mode="max",
            preservation_policy=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._directory = directory.absolute()
        if not read_only:
            self._set_aside_unreadable_metrics()
        with self._readable():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    @contextmanager
    def _readable(self, step: int | None = None) -> Iterator[None]:
        """What a damaged checkpoint makes Orbax raise is of a dozen kinds, and becomes one `Damaged`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            what = self._directory if step is None else self._directory / str(step)
            reason = (str(error).splitlines() or [""])[0][:200]
            raise Damaged(
                f"{what} is damaged ({type(error).__name__}: {reason}): choose another checkpoint or --workdir"
            ) from error

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint, None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any], validation_accuracy: float | None) -> None:
        """Start writing the checkpoint of a state; an error of the write before this one is raised here.

        Args:
            state: its `step` names the checkpoint.
            meta: what JSON can hold, kept beside the state.
            validation_accuracy: 0..1, None where it was not measured.

        Raises:
            RuntimeError: where Orbax declines, as it does for a step that is not later than the latest.
        """
        step = int(state.step)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave(meta | {"state_digest": train_state.digest(state)}),
            ),
            metrics=None if validation_accuracy is None else {"accuracy": validation_accuracy},
        )
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
            with self._readable():
                best = self._manager.best_step()
            return steps[-1] if best is None else best
        if not which.isdecimal():
            raise UserError(f"--checkpoint {which!r} must be best, latest or a step")
        if int(which) not in steps:
            raise UserError(
                f"{self._directory} holds no checkpoint of step {which}: choose one of {', '.join(map(str, steps))}"
            )
        return int(which)

    def restore(
        self, step: int, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint onto the devices of `like`, whatever devices wrote it.

        Args:
            step: which.
            like: a state of the same structure, shapes and shardings; its values are not used.
            check: called with the checkpoint's `meta` before its state is read, to refuse one of another run.

        Returns:
            The state, and the `meta` it was saved with.

        Raises:
            Damaged: where it cannot be read, or its state has not the digest it was saved with.
        """
        with self._readable(step):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            saved_digest = meta["state_digest"]
            check(meta)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        with self._readable(step):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._manager.restore(step, args=arguments)["state"]
            if train_state.digest(state) != saved_digest or int(state.step) != step:
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
            Damaged: where there are checkpoints and none is whole; all are left as they are.
        """
        damaged: dict[int, Damaged] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self.restore(step, like, check)
            except Damaged as error:
                damaged[step] = error
                continue
            if damaged:
                self._set_aside({str(bad): str(why) for bad, why in damaged.items()})
                self._manager.reload()
            return found
        if damaged:
            raise Damaged(f"no checkpoint of {self._directory} is whole; the newest: {next(iter(damaged.values()))}")
        return None

    def _set_aside(self, damaged: dict[str, str]) -> None:
        """Move steps aside, each with the reason that is printed; process 0 does, and all wait for it."""
        if jax.process_index() == 0:
            for step, why in damaged.items():
                place = self._directory.parent / "damaged" / f"{step}-{time.time_ns()}"
                place.parent.mkdir(exist_ok=True)
                (self._directory / step).rename(place)
                print(f"{why}; moved to {place}", file=sys.stderr)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def _set_aside_unreadable_metrics(self) -> None:
        """Orbax reads the metrics of every checkpoint as it starts, and would stop at the first that it cannot."""
        damaged = {}
        for path in sorted(self._directory.glob("*/metrics/metrics")):
            try:
                _accuracy(json.loads(path.read_text()))
            except (KeyError, OSError, TypeError, ValueError) as error:  # OSError: process 0 has moved it already
                step = path.parent.parent.name
                damaged[step] = f"{self._directory / step} is damaged (its metrics: {error})"
        self._set_aside(damaged)

    def wait(self) -> None:
        """Return once everything is written; an error of the last write is raised here."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Finish the writes and free what the manager holds."""
        self._manager.wait_until_finished()
        self._manager.close()
