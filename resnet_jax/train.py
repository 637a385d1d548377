"""The training loop: from a config and a folder to `result.json`, from wherever the folder's run was left."""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import input_pipeline, optim, preemption, steps, train_state, workdir
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.errors import UserError
from resnet_jax.evaluate import evaluate
from resnet_jax.progress import Progress
from resnet_jax.setup import Setup, setup


def train(
    config: ConfigDict, directory: Path, started: float | None = None, max_seconds: float | None = None
) -> dict[str, Any]:
    """Train, or go on training, the run of a folder, and evaluate its best checkpoint on the test split.

    Args:
        config: validated by `config.validate`.
        directory: the workdir, made where it is not there.
        started: the `time.monotonic()` from which the run's seconds count; from this call if not given.
        max_seconds: stop, with the state saved, at the first step that ends later than this after `started`.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: where the config, the data or the folder does not allow the run.
        preemption.Interrupted: after a signal or `max_seconds`, with the state saved.
    """
    started = time.monotonic() if started is None else started
    workdir.check(directory, config)
    if (directory / "result.json").exists():
        result = workdir.read_json(directory / "result.json", _SUMMARISED)
        if jax.process_index() == 0:
            print(f"{directory} is complete: {_summary(result)}")
        return result
    stop_request = preemption.StopRequest(None if max_seconds is None else started + max_seconds)
    with stop_request.noted():
        start = setup(config)
        if code := stop_request.exit_code(0, 1):
            raise preemption.Interrupted(code, f"stopped by {preemption.reason(code)} before the first step")
        with (
            workdir.opened(directory, config),
            closing(Checkpoints(directory / "checkpoints")) as checkpoints,
            closing(Run(config, directory, start, started, checkpoints)) as run,
        ):
            run.loop(stop_request)
            return run.finish()


def evaluates_after(step: int, total_steps: int, batch_size: int, num_examples: int, every_epochs: int) -> bool:
    """Whether a run evaluates and saves after a step: as each whole `every_epochs` ends, and at the last step."""
    period = num_examples * every_epochs  # images
    return step == total_steps or step * batch_size // period > (step - 1) * batch_size // period


class Run:
    """A run under way: its state, and everything that it writes to."""

    def __init__(
        self, config: ConfigDict, directory: Path, start: Setup, started: float, checkpoints: Checkpoints
    ) -> None:
        self.config, self.directory, self.start, self.started = config, directory, start, started
        self.checkpoints = checkpoints
        self.state = start.state
        self.seconds_before = 0.0  # of earlier sessions of this run
        self.is_of_this_run = partial(workdir.check_meta, directory, config, start.dataset)
        if found := checkpoints.restore_newest(start.state, self.is_of_this_run):
            self.state, meta = found
            self.seconds_before = meta["seconds"]
        self.first_step = int(self.state.step)
        self.schedule = optim.make_schedule(config, start.steps_per_epoch)
        self.train_step = steps.jit_train_step(config, start.mesh)
        self.eval_step = steps.jit_eval_step(config, start.mesh)
        self.log = workdir.MetricsLog(directory, self.first_step)
        self.progress = Progress(start.total_steps, config.num_epochs, config.batch_size, jax.process_index() > 0)
        self.startup_seconds: float | None = None
        if self.first_step:
            self.progress.note(f"resuming {directory} at step {self.first_step} of {start.total_steps}")

    def seconds(self) -> float:
        """Wall time spent on this run, earlier sessions up to their last checkpoint included."""
        return self.seconds_before + time.monotonic() - self.started

    def loop(self, stop_request: preemption.StopRequest) -> None:
        """Take the steps that are left, logging, evaluating and saving on the way.

        The metrics of a logged step are fetched once the next step is dispatched, so the device never waits for them.
        """
        config, total, examples = self.config, self.start.total_steps, len(self.start.train.labels)
        batches = input_pipeline.train_batches(
            self.start.train, config, self.first_step, total, jax.process_index(), jax.process_count()
        )
        pending: tuple[int, train_state.TrainMetrics] | None = None
        for step, batch in enumerate(batches, start=self.first_step + 1):
            self.state, metrics = self.train_step(self.state, steps.shard_batch(batch, self.start.mesh))
            if self.startup_seconds is None:
                self.startup_seconds = time.monotonic() - self.started
                self.progress.note(f"first step dispatched {self.startup_seconds:.1f} s after the start")
                jax.block_until_ready(metrics)
                self.progress.restart_clock(step)
            if pending:
                self.log_row(*pending)
                pending = None
            if step % config.log_every_steps == 0 or step == total:
                pending = step, metrics
            stop = stop_request.exit_code(step, config.log_every_steps)
            save = config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0
            evaluates = evaluates_after(step, total, config.batch_size, examples, config.eval_every_epochs)
            if stop or save or evaluates:
                if pending:
                    self.log_row(*pending)
                    pending = None
                else:
                    self.fetch(step, metrics)
                self.save(self.validate(step) if evaluates else None)
                self.progress.restart_clock(step)
            if stop and step < total:
                self.checkpoints.wait()
                raise preemption.Interrupted(
                    stop,
                    f"stopped by {preemption.reason(stop)} at step {step} of {total}, saved in {self.directory}: "
                    "the same command goes on",
                )

    def row(self, step: int, split: str, figures: Mapping[str, float | None]) -> dict[str, Any]:
        """A row of `metrics.jsonl`."""
        return {"step": step, "epoch": round(step / self.start.steps_per_epoch, 6), "split": split, **figures}

    def log_row(self, step: int, metrics: train_state.TrainMetrics) -> None:
        """Log the means of the steps since the last row."""
        figures = self.fetch(step, metrics)
        speed = self.progress.images_per_second(step)
        row = self.row(
            step,
            "train",
            {
                "loss": figures["loss"],
                "accuracy": figures["accuracy"],
                "learning_rate": float(self.schedule(step - 1)),
                "grad_norm": figures["grad_norm"],
                # Too few steps to measure, at the end of a run whose steps log_every_steps does not divide:
                "images_per_second": None if step % self.config.log_every_steps else speed,
            },
        )
        self.log.write(row)
        self.progress.show(row)

    def fetch(self, step: int, metrics: train_state.TrainMetrics) -> dict[str, float]:
        """Wait for the metrics of a step, and stop a run whose loss or gradient is no longer a number."""
        figures = {name: float(value) for name, value in metrics.compute().items()}
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(figures[name])]
        if broken:
            first = (step - 1) // self.config.log_every_steps * self.config.log_every_steps + 1
            self.checkpoints.wait()
            kept = self.checkpoints.latest
            raise UserError(
                f"{' and '.join(broken)} became non-finite between step {first} and step {step}; "
                + (f"the checkpoint of step {kept} is kept" if kept else "there is no checkpoint yet")
                + ": lower config.optim.learning_rate, set config.optim.max_grad_norm, or look at the data"
            )
        return figures

    def validate(self, step: int) -> dict[str, float] | None:
        """Evaluate on the validation split, where there is one: {"loss", "accuracy"}."""
        if not len(self.start.validation.labels):
            return None
        result = evaluate(
            self.eval_step, self.state, self.start.validation, self.config.eval_batch_size, self.start.mesh
        )
        validation = {"loss": result["loss"], "accuracy": result["accuracy"]}
        self.log.write(self.row(step, "validation", validation))
        self.progress.note(
            f"step {step}  validation loss {result['loss']:.4f}  validation accuracy {result['accuracy']:.2%}"
        )
        return validation

    def save(self, validation: dict[str, float] | None) -> None:
        """Save the state, with what validation gave for it, if it was validated."""
        meta = {
            "config": config_lib.to_json(self.config),
            "fingerprint": self.start.dataset.fingerprint,
            "seconds": self.seconds(),
            "validation": validation,
        }
        self.checkpoints.save(self.state, meta, validation["accuracy"] if validation else None)

    def finish(self) -> dict[str, Any]:
        """Evaluate the best checkpoint on the test split and write `result.json`."""
        self.checkpoints.wait()
        last_digest = train_state.digest(self.state)
        best = self.checkpoints.choose("best")
        state, meta = self.checkpoints.restore(best, self.state, self.is_of_this_run)
        test = evaluate(self.eval_step, state, self.start.dataset.test, self.config.eval_batch_size, self.start.mesh)
        self.log.write(self.row(best, "test", {"loss": test["loss"], "accuracy": test["accuracy"]}))
        result = {
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "validation_accuracy": meta["validation"]["accuracy"] if meta["validation"] else None,
            "num_params": train_state.num_params(state.params),
            "checkpoint_step": best,
            "steps": self.start.total_steps,
            "state_digest": last_digest,
            "seconds": self.seconds(),
            "startup_seconds": self.startup_seconds,
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "dataset": workdir.describe(self.start.dataset, self.start.train, self.start.validation),
            "environment": workdir.environment(),
        }
        if jax.process_index() == 0:
            workdir.write_json(self.directory / "result.json", result)
            self.progress.note(f"{self.directory} is complete: {_summary(result)}")
        return result

    def close(self) -> None:
        """Flush the log."""
        self.log.close()


_SUMMARISED = ("test_accuracy", "validation_accuracy", "checkpoint_step", "steps", "seconds")


def _summary(result: dict[str, Any]) -> str:
    validation = result["validation_accuracy"]
    return (
        f"test accuracy {result['test_accuracy']:.2%}, "
        + ("" if validation is None else f"validation accuracy {validation:.2%}, ")
        + f"checkpoint of step {result['checkpoint_step']} of {result['steps']}, {result['seconds']:.0f} s"
    )
