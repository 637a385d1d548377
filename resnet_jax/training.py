"""The training loop: from a config and a folder to `result.json`, from wherever the folder's run was left."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_jax import diagnose, optim, steps, train_state
from resnet_jax.data import datasets, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.data.feed import make_feed
from resnet_jax.errors import TrainingDiverged, UserError, exit_immediately
from resnet_jax.evaluate import evaluate
from resnet_jax.runs import environment, files, preemption, processes, profiling, workdir
from resnet_jax.runs.checkpoints import Checkpoints
from resnet_jax.runs.progress import Progress
from resnet_jax.setup import Setup, check_meta, make_meta, setup


def train(
    config: ConfigDict,
    directory: Path,
    started: float | None = None,
    max_seconds: float | None = None,
    profile: profiling.Profile | None = None,
    on_validation: Callable[[int, float], None] | None = None,
    test: bool = True,
    stop_request: preemption.StopRequest | None = None,
) -> dict[str, Any]:
    """Train, or go on training, the run of a folder, and evaluate its best checkpoint on the test split.

    Args:
        config: validated by `config.validate`.
        directory: the workdir, made where it is not there.
        started: the `time.monotonic()` from which the run's seconds count; from this call if not given.
        max_seconds: stop, with the state saved, at the first step that ends later than this after `started`.
        profile: of some of the steps to come.
        on_validation: called with the step and the accuracy of each validation, those of earlier sessions first; what it
            raises ends the session, with all that came before saved.
        test: evaluate on the test split; without it the result's test figures are None.
        stop_request: of a caller that goes on after this run, and looks at it then; with it, `max_seconds` is not heeded.

    Returns:
        What `result.json` holds.

    Raises:
        TrainingDiverged: where a step cannot be taken.
        UserError: where the config, the data or the folder does not allow the run.
        preemption.TrainingInterrupted: after a signal or `max_seconds`, with the state saved.
    """
    started = time.monotonic() if started is None else started
    workdir.check(directory, config)
    if (directory / "result.json").exists():
        if profile:
            raise UserError(f"--profile: {directory} is complete, and takes no more steps: choose another --workdir")
        result = files.read_json(directory / "result.json", _SUMMARISED)
        try:
            summary = _summary(result)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{directory / 'result.json'} cannot be used ({error}): choose another --workdir"
            ) from error
        if jax.process_index() == 0:
            print(f"{directory} is complete: {summary}")
        return result
    stop_request = stop_request or preemption.StopRequest(None if max_seconds is None else started + max_seconds)
    with stop_request.capture_signals():
        start = setup(config)
        if config.pipeline == "device":
            pipelines.check_fits(start.train, start.mesh)
        if profile:
            profile.check(0, start.total_steps)
        if code := stop_request.exit_code():
            raise preemption.TrainingInterrupted(code, f"stopped by {preemption.reason(code)} before the first step")
        with workdir.open_workdir(
            directory, config, 4 * train_state.num_bytes(start.state)
        ) as check_lock:  # 3 kept, 1 new
            accuracies = workdir.validation_accuracies(directory)
            with (
                closing(Checkpoints(directory / "checkpoints", accuracies)) as checkpoints,
                closing(
                    Run(
                        config,
                        directory,
                        start,
                        started,
                        stop_request,
                        check_lock,
                        checkpoints,
                        accuracies,
                        profile,
                        on_validation,
                    )
                ) as run,
                processes.abort_all_on_error(),  # before anything is closed, for closing waits for the others
            ):
                run.loop()
                return run.finish(test)


_GRACE_SECONDS = 2.0  # that an evaluation has to end after a signal, all being saved: a compilation can take minutes


def evaluates_after(step: int, total_steps: int, batch_size: int, num_examples: int, every_epochs: int) -> bool:
    """Whether a run evaluates and saves after a step: as each whole `every_epochs` ends, and at the last step."""
    period = num_examples * every_epochs  # images
    return step == total_steps or step * batch_size // period > (step - 1) * batch_size // period


class Run:
    """A run under way: its state, and everything that it writes to.

    Args:
        config: of the run.
        directory: of the run.
        start: what it starts from.
        started: the `time.monotonic()` from which this session's seconds count.
        stop_request: asked after each step and each batch of evaluation.
        check_lock: from `workdir.open_workdir`.
        checkpoints: of the run; the newest is restored.
        accuracies: step -> validation accuracy, shared with `checkpoints`; validations to come are added.
        profile: of some of the steps to come.
        on_validation: as `train` takes it.
    """

    def __init__(
        self,
        config: ConfigDict,
        directory: Path,
        start: Setup,
        started: float,
        stop_request: preemption.StopRequest,
        check_lock: Callable[[], None],
        checkpoints: Checkpoints,
        accuracies: dict[int, float],
        profile: profiling.Profile | None = None,
        on_validation: Callable[[int, float], None] | None = None,
    ) -> None:
        self.config, self.directory, self.start, self.started = config, directory, start, started
        self.stop_request, self.check_lock = stop_request, check_lock
        self.checkpoints, self.accuracies, self.profile = checkpoints, accuracies, profile
        self.on_validation = on_validation
        self.state = start.state
        self.seconds_before = 0.0  # of earlier sessions of this run
        self.is_of_this_run = partial(check_meta, directory, config, start.dataset)
        if found := checkpoints.restore_newest(start.state, self.is_of_this_run):
            self.state, meta = found
            self.seconds_before = meta["seconds"]
        self.first_step = int(self.state.step)
        if profile:
            profile.check(self.first_step, start.total_steps)
        for step in [step for step in accuracies if step > self.first_step]:
            del accuracies[step]  # it comes again
        for step, accuracy in sorted(accuracies.items()):
            self.tell(step, accuracy)
        self.schedule = optim.make_schedule(config, start.steps_per_epoch)
        self.eval_step = steps.jit_eval_step(config, start.mesh)
        self.log = workdir.MetricsLog(directory, self.first_step)
        self.progress = Progress(start.total_steps, config.num_epochs, config.batch_size, jax.process_index() > 0)
        self.startup_seconds: float | None = None
        if self.first_step:
            self.progress.note(f"resuming {directory} at step {self.first_step} of {start.total_steps}")

    def seconds(self) -> float:
        """Wall time spent on this run, earlier sessions up to their last checkpoint included."""
        return self.seconds_before + time.monotonic() - self.started

    def loop(self) -> None:
        """Take the steps that are left, logging, saving and evaluating on the way.

        The metrics of a call are fetched once the next call is dispatched, so the device does not wait for them, and a
        signal never finds more than two calls under way.
        """
        config, total = self.config, self.start.total_steps
        if self.first_step and self.evaluates_after(self.first_step) and self.first_step not in self.accuracies:
            self.validate(self.first_step)  # for the session before ended between the save and the evaluation's end
        step = self.first_step
        if step == total:
            return
        pending: tuple[int, int, train_state.TrainMetrics] | None = None
        feed = make_feed(config, self.start.train, self.start.mesh, self.state, step, total)
        while step < total:
            count = self.call_length(step, feed.steps_per_call)
            if self.profile:
                self.profile.before(step + count, self.state, self.directory)
            self.state, metrics = feed.take(self.state, step, count)
            step += count
            if self.profile and (report := self.profile.after(step, metrics, self.directory)):
                self.progress.note(report)
                self.progress.restart_clock(step)
            if self.startup_seconds is None:
                self.startup_seconds = time.monotonic() - self.started
                self.progress.note(f"first step dispatched {self.startup_seconds:.1f} s after the start")
                jax.block_until_ready(metrics)
                self.progress.restart_clock(step)
                self.stop_request.start_clock()
            if pending:
                self.end_call(*pending)
            pending = step, count, metrics
            stop = self.stop_request.exit_code(agree=self.logs_in(step, count))
            if stop or self.saves_after(step):
                self.end_call(*pending)
                pending = None
                self.save()
                if stop:
                    if self.profile and (report := self.profile.end(step, self.directory)):
                        self.progress.note(report)
                    self.stop(stop, step)
                if self.evaluates_after(step):
                    self.validate(step)
                self.progress.restart_clock(step)

    def call_length(self, step: int, steps_per_call: int) -> int:
        """How many steps to take after a step in one call: as many as a call takes, or 1 where a save comes before.

        So a call never goes past a save, only two lengths are compiled, and the steps that follow a save are cut into
        calls as in the run that was not stopped there.
        """
        return 1 if any(map(self.saves_after, range(step + 1, step + steps_per_call))) else steps_per_call

    def logs_in(self, step: int, count: int) -> bool:
        """Whether the last `count` steps up to this one have one after which every run logs a row."""
        return step // self.config.log_every_steps > (step - count) // self.config.log_every_steps

    def saves_after(self, step: int) -> bool:
        """Whether the run saves after a step, to evaluate or in between."""
        every = self.config.checkpoint_every_steps
        return self.evaluates_after(step) or (every > 0 and step % every == 0)

    def evaluates_after(self, step: int) -> bool:
        """Whether the run evaluates after a step."""
        config = self.config
        return evaluates_after(
            step, self.start.total_steps, config.batch_size, len(self.start.train.labels), config.eval_every_epochs
        )

    def stop(self, exit_code: int, step: int) -> NoReturn:
        """End this session, once all that it saved is written."""
        self.checkpoints.wait()
        raise preemption.TrainingInterrupted(
            exit_code,
            f"stopped by {preemption.reason(exit_code)} at step {step} of {self.start.total_steps}, saved in "
            f"{self.directory}: the same command goes on",
        )

    def row(self, step: int, split: str, figures: Mapping[str, float | None]) -> dict[str, Any]:
        """A row of `metrics.jsonl`."""
        return {"step": step, "epoch": round(step / self.start.steps_per_epoch, 6), "split": split, **figures}

    def write(self, row: dict[str, Any]) -> None:
        """Write a row of `metrics.jsonl`."""
        self.check_lock()
        self.log.write(row)

    def end_call(self, last_step: int, count: int, metrics: train_state.TrainMetrics) -> None:
        """Wait for a call, log the means since the last row where a step ends one, and stop at a step that was not taken."""
        metrics = jax.device_get(metrics)
        speed = self.progress.images_per_second(last_step) if self.logs_in(last_step, count) else None
        for i, step in enumerate(range(last_step - count + 1, last_step + 1)):
            of_step = jax.tree.map(lambda leaf, i=i: leaf.reshape(count)[i], metrics)
            figures = {name: float(value) for name, value in of_step.compute().items()}
            if math.isnan(figures["loss"]):
                self.fail(step)
            if step % self.config.log_every_steps and step < self.start.total_steps:
                continue
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
            self.write(row)
            self.progress.show(row)

    def fail(self, step: int) -> NoReturn:
        """Stop a run at a step that was not taken: save the state before it and describe the step in a file."""
        self.state = self.state.replace(failed=jnp.zeros_like(self.state.failed))
        if step - 1 > (self.checkpoints.latest or 0):
            self.save()
        self.checkpoints.wait()
        report = diagnose.diagnose_step(self.config, self.start, self.state)
        path = self.directory / "failed_step.json"
        if jax.process_index() == 0:
            self.check_lock()
            files.write_json(path, report)
        limit = self.config.abort_grad_norm
        raise TrainingDiverged(
            f"step {step} has loss {report['loss']} and gradient norm {report['grad_norm']}"
            + (f" (config.abort_grad_norm allows {limit:g})" if limit else "")
            + f", see {path}; "
            + (f"the state before it is checkpoint {step - 1}" if step > 1 else "there is no checkpoint before it")
            + ": lower config.optim.learning_rate, set config.optim.max_grad_norm, or look at the images"
        )

    def validate(self, step: int) -> None:
        """Evaluate on the validation split, where there is one."""
        if not len(self.start.validation.labels):
            return
        result = self.evaluate(self.state, self.start.validation, step)
        self.write(self.row(step, "validation", {"loss": result["loss"], "accuracy": result["accuracy"]}))
        self.accuracies[step] = result["accuracy"]
        self.progress.note(
            f"step {step}  validation loss {result['loss']:.4f}  validation accuracy {result['accuracy']:.2%}"
        )
        self.tell(step, result["accuracy"])

    def tell(self, step: int, accuracy: float) -> None:
        """Tell the caller of a validation."""
        if self.on_validation:
            self.on_validation(step, accuracy)

    def evaluate(self, state: train_state.TrainState, split: Split, step: int) -> dict[str, Any]:
        """Evaluate a state on a split, or stop if asked to; all steps up to `step` are saved."""

        def stop_if_asked() -> None:
            if stop := self.stop_request.exit_code():
                self.stop(stop, step)

        def end_at_once(exit_code: int) -> None:
            try:
                self.stop(exit_code, step)
            except (preemption.TrainingInterrupted, UserError) as stop:
                print(stop, file=sys.stderr)
                exit_immediately(exit_code)

        batch_size, mesh = self.config.eval_batch_size, self.start.mesh
        with self.stop_request.exit_within(_GRACE_SECONDS, end_at_once):
            return evaluate(self.eval_step, state, split, batch_size, mesh, before_batch=stop_if_asked)

    def save(self) -> None:
        """Start saving the state."""
        self.check_lock()
        self.checkpoints.save(self.state, make_meta(self.config, self.start.dataset, self.seconds()))

    def finish(self, test: bool = True) -> dict[str, Any]:
        """Evaluate the best checkpoint on the test split, if asked to, and write `result.json`."""
        self.checkpoints.wait()
        last_digest = train_state.digest(train_state.trained(self.state))
        best = self.checkpoints.choose("best")
        state, _ = self.checkpoints.restore(best, self.state, self.is_of_this_run)
        tested: dict[str, Any] = {"loss": None, "accuracy": None}
        if test:
            tested = self.evaluate(state, self.start.dataset.test, self.start.total_steps)
            self.write(self.row(best, "test", {"loss": tested["loss"], "accuracy": tested["accuracy"]}))
        result = {
            "test_accuracy": tested["accuracy"],
            "test_loss": tested["loss"],
            "validation_accuracy": self.accuracies.get(best),
            "num_params": train_state.num_params(state.params),
            "checkpoint_step": best,
            "steps": self.start.total_steps,
            "state_digest": last_digest,
            "seconds": self.seconds(),
            "startup_seconds": self.startup_seconds,
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "initial_weights": workdir.initial_weights(self.directory),
            "dataset": datasets.describe(self.start.dataset, self.start.train, self.start.validation),
            "environment": environment.collect(),
        }
        if jax.process_index() == 0:
            self.check_lock()
            files.write_json(self.directory / "result.json", result)
            self.progress.note(f"{self.directory} is complete: {_summary(result)}")
        return result

    def close(self) -> None:
        """Flush the log."""
        self.log.close()


_SUMMARISED = ("test_accuracy", "validation_accuracy", "checkpoint_step", "steps", "seconds")


def _summary(result: dict[str, Any]) -> str:
    test, validation = result["test_accuracy"], result["validation_accuracy"]
    return (
        ("" if test is None else f"test accuracy {test:.2%}, ")
        + ("" if validation is None else f"validation accuracy {validation:.2%}, ")
        + f"checkpoint of step {result['checkpoint_step']} of {result['steps']}, {result['seconds']:.0f} s"
    )
