"""Checkpoints through Orbax: written in the background, the latest two and the best kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from resnet_jax.errors import UserError
from resnet_jax.train_state import TrainState


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


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
        with self._readable():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    @contextmanager
    def _readable(self, step: int | None = None) -> Iterator[None]:
        """What a damaged checkpoint makes Orbax raise is of a dozen kinds, and becomes one `UserError`."""
        try:
            yield
        except Exception as error:
            what = self._directory if step is None else self._directory / str(step)
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"{what} cannot be read, for it is damaged or of another model ({type(error).__name__}: {reason}): move it "
                "away to go on from an earlier checkpoint, or choose another --workdir"
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
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
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

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint onto the devices of `like`, whatever devices wrote it.

        Args:
            step: which.
            like: a state of the same structure, shapes and shardings; its values are not used.

        Returns:
            The state, and the `meta` it was saved with.

        Raises:
            UserError: where the checkpoint is damaged or of another model.
        """
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        with self._readable(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
            )
            state, meta = restored["state"], restored["meta"]
            if not isinstance(meta, dict):
                raise TypeError("its meta is no object")
        return state, meta

    def wait(self) -> None:
        """Return once everything is written; an error of the last write is raised here."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Finish the writes and free what the manager holds."""
        self._manager.wait_until_finished()
        self._manager.close()
