"""The training loop: from a config and a folder to `result.json`, from wherever the folder's run stands.

Read it from the top: `train` prepares a run, `take_steps` is the loop, and below it is what the loop does between steps.
`runs/plan.py` decides after which step, `steps.py` holds the step itself, `runs/workdir.py` what is kept.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import kernels, optim, steps, train_state
from resnet_jax.data import datasets, feed, pipelines
from resnet_jax.errors import TrainingDiverged, UserError
from resnet_jax.evaluate import Evaluation, evaluate
from resnet_jax.runs import environment, model_size, processes, stored_config, workdir
from resnet_jax.runs.diagnose import as_line, diagnose_step
from resnet_jax.runs.exits import exit_immediately, report
from resnet_jax.runs.hooks import Hook
from resnet_jax.runs.metrics_log import best_step
from resnet_jax.runs.plan import Call
from resnet_jax.runs.preemption import StopRequest, TrainingInterrupted, stopped_by
from resnet_jax.runs.progress import Progress
from resnet_jax.runs.result import RunResult
from resnet_jax.setup import Setup, setup
from resnet_jax.steps import StepMetrics
from resnet_jax.train_state import TrainState

_COMPILE_SECONDS = 30  # of the report's network on two cores; a few with the compilation cache
_GRACE_SECONDS = 2.0  # for a setup or an evaluation to end after a signal, when all is saved: either can take minutes


def train(
    config: ConfigDict,
    directory: Path,
    started: float | None = None,
    hooks: Sequence[Hook] = (),
    test: bool = True,
    stop_request: StopRequest | None = None,
    initialise: Callable[[ConfigDict, Setup], tuple[TrainState, dict[str, Any]]] | None = None,
) -> RunResult:
    """Train the run of a folder, or resume it, and evaluate its best checkpoint on the test split.

    Args:
        config: validated by `config.validate`.
        directory: the workdir; made if it does not exist.
        started: the `time.monotonic()` from which the run's seconds count; now if None.
        hooks: watch the run.
        test: evaluate on the test split; without it the result's test figures are None.
        stop_request: when to stop before the end; at a signal only, if None.
        initialise: reads `config.init_from`, for a run without a checkpoint: the state of step 0, and its origin.

    Raises:
        TrainingDiverged: if a step is rejected.
        UserError: if the config, the data or the folder does not allow the run.
        preemption.TrainingInterrupted: once `stop_request` stops the run, with the state saved.
    """
    started = time.monotonic() if started is None else started
    config = workdir.check(directory, config)
    if workdir.is_complete(directory, config):
        return _complete(directory, config, hooks)
    stop_request = stop_request or StopRequest()
    with stop_request.capture_signals():
        with stop_request.exit_before_first_step(_GRACE_SECONDS):
            start, origin = setup(config), None
        config = start.config
        if config.init_from and not workdir.has_checkpoint(directory):
            assert initialise, "config.init_from needs a function that reads it"
            initial, origin = initialise(config, start)
        pipelines.check(config, start.train, start.mesh)
        for hook in hooks:
            hook.check(0, start.plan.total_steps)
        if jax.process_count() == 1 and (code := stop_request.exit_code()):  # several agree, after the first step
            raise TrainingInterrupted(code, f"stopped by {stopped_by(code)} before the first step: rerun the command")
        needed = 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(start.state))  # three are kept, one is being written
        with (
            workdir.open_workdir(directory, config, start.meta, needed) as folder,
            processes.abort_all_on_error(),  # before the folder is closed, because that waits for the other processes
        ):
            if origin and folder.latest_step is None:
                folder.start_from(initial, origin)
            state, seconds_before = folder.restore(start.state)
            run = Run(start, folder, stop_request, started, seconds_before, hooks)
            with closing(run.progress):
                _begin(run, state)
                state = take_steps(run, state)
                return _finish(run, state, test)


@dataclasses.dataclass
class Run:
    """What the functions below share.

    Attributes:
        start: what the run starts from, with its config and its plan.
        folder: its workdir.
        stop_request: read after each call and before each batch of evaluation.
        started: the `time.monotonic()` from which this session's seconds count.
        seconds_before: of earlier sessions, up to the checkpoint from which this one resumes.
        hooks: called around each call, at validations and at a stop.
        startup_seconds: from `started` to the dispatch of this session's first step.
        compiled: the lengths of the calls so far; each is a program.
        config, plan, progress, schedule, eval_step: made from `start`.
    """

    start: Setup
    folder: workdir.Workdir
    stop_request: StopRequest
    started: float
    seconds_before: float
    hooks: Sequence[Hook] = ()
    startup_seconds: float | None = None
    compiled: set[int] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        """Make what is made from `start`."""
        config, plan = self.start.config, self.start.plan
        self.config, self.plan = config, plan
        self.progress = Progress(plan.total_steps, config.num_epochs, config.batch_size, jax.process_index() > 0)
        self.schedule = optim.make_schedule(config, plan.steps_per_epoch)
        self.eval_step = steps.jit_eval_step(config, self.start.mesh)

    def seconds(self) -> float:
        """Wall time spent on the run."""
        return self.seconds_before + time.monotonic() - self.started

    def row(self, step: int, split: str, **values: float | None) -> dict[str, Any]:
        """A row of `metrics.jsonl`."""
        epoch, seconds = round(step / self.plan.steps_per_epoch, 6), round(self.seconds(), 3)
        return {"step": step, "epoch": epoch, "split": split, "seconds": seconds, **values}


def _begin(run: Run, state: TrainState) -> None:
    """Say where the run stands, tell the hooks, and repeat a validation that the session before did not finish."""
    step, total = int(state.step), run.plan.total_steps
    run.progress.note(model_size.describe(state.params, run.config.model.max_params, table=step == 0))
    run.progress.note(f"computing in {run.config.model.dtype}, pipeline {run.config.pipeline}")
    for text in filter(None, [kernels.why_slow(run.start.mesh, run.config.model), *run.plan.warnings()]):
        run.progress.note(text)
    if step:
        run.progress.note(f"resuming {run.folder.path} at step {step} of {total}")
    for hook in run.hooks:
        hook.check(step, total)
        hook.begin(run.folder.path)
        for validated, validation in sorted(run.folder.validations.items()):
            hook.on_validation(validated, validation.accuracy)
    if step and run.plan.evaluates_after(step) and step not in run.folder.validations:
        _validate(run, state, step)


def take_steps(run: Run, state: TrainState, make_step: feed.MakeStep | None = None) -> TrainState:
    """Take the steps that remain, by `feed.make_step` or another; log, save and evaluate; return the state after the last.

    The metrics of a call are fetched after the next call is dispatched, so the device never waits for them.
    """
    config, start, plan = run.config, run.start, run.plan
    first_step = int(state.step)
    if first_step == plan.total_steps:
        return state
    run.progress.waiting("compiling the training step", _COMPILE_SECONDS if jax.default_backend() == "cpu" else None)
    make_step = make_step or feed.make_step
    step_fn, most_steps = make_step(config, start.train, start.mesh, state, first_step, plan.total_steps)
    pending: tuple[Call, StepMetrics] | None = None
    for call in plan.calls(first_step, most_steps):
        if pending and call.count not in run.compiled:  # so that its speed leaves out the compilation
            _log(run, state, *pending)
            pending = None
        for hook in run.hooks:
            hook.before_call(call, state)
        state, metrics = step_fn(state, call.start, call.count)
        _after_dispatch(run, call, metrics)
        if pending:
            _log(run, state, *pending)
        pending = call, metrics
        planned = plan.saves_after(call.end)
        exit_code, due = run.stop_request.agreed(start.mesh, not planned and run.folder.save_is_due())
        if planned or due:
            _log(run, state, *pending)
            pending = None
            run.folder.save(state, run.seconds())
            if exit_code:
                _stop(run, exit_code, call.end)
            if plan.evaluates_after(call.end):
                _validate(run, state, call.end)
            run.progress.restart_clock(call.end)
    return state


def _after_dispatch(run: Run, call: Call, metrics: StepMetrics) -> None:
    """Tell the hooks of a call, and wait for the first of its length: it compiles."""
    for hook in run.hooks:
        if text := hook.after_dispatch(call, metrics):
            run.progress.note(text)
            run.progress.restart_clock(call.end)
    if call.count not in run.compiled:
        run.compiled.add(call.count)
        if run.startup_seconds is None:
            run.startup_seconds = time.monotonic() - run.started
            run.progress.note(f"first step dispatched {run.startup_seconds:.1f} s after the start")
        jax.block_until_ready(metrics)
        run.progress.restart_clock(call.end)
        run.stop_request.start_clock()


def _log(run: Run, state: TrainState, call: Call, metrics: StepMetrics) -> None:
    """Wait for a call and log its rows; `state` is that of the newest call. Stop the run if a step was rejected."""
    metrics = jax.tree.map(np.atleast_1d, jax.device_get(metrics))
    speed = run.progress.images_per_second(call.end) if run.plan.measures_speed(call) else None
    for i, step in enumerate(range(call.start + 1, call.end + 1)):
        of_step = jax.tree.map(lambda leaf, i=i: leaf[i], metrics)
        if of_step.rejected:
            _reject(run, state, step)
        if not run.plan.logs_after(step):
            continue
        means = {name: float(value) for name, value in of_step.means.compute().items()}
        row = run.row(
            step,
            "train",
            loss=means["loss"],
            accuracy=means["accuracy"],
            learning_rate=float(np.float32(run.schedule(step - 1))),
            grad_norm=means["grad_norm"],
            # None at the end of a run that log_every_steps does not divide: too few steps to measure.
            images_per_second=None if step % run.config.log_every_steps else speed,
        )
        run.folder.log(row)
        run.progress.show(row)
    for hook in run.hooks:
        hook.after_call(call)


def _reject(run: Run, state: TrainState, step: int) -> NoReturn:
    """Stop a run at a rejected step: save the state before it, and describe the step in `failed_step.json`."""
    state = state.replace(failed=jnp.zeros_like(state.failed))
    if step - 1 > (run.folder.latest_step or 0):
        run.folder.save(state, run.seconds())
    run.folder.wait()
    batch, examples = feed.batch_of_step(run.config, run.start.train, run.start.mesh, step - 1)
    diagnosis = {
        "step": step,
        "epoch": step / run.plan.steps_per_epoch,
        "checkpoint_step": run.folder.latest_step,
        "examples": datasets.source_positions(run.start.dataset, run.config.data, examples).tolist(),
        "labels": run.start.train.labels[examples].tolist(),
        **diagnose_step(run.config, state, batch),
    }
    run.folder.write_json("failed_step.json", diagnosis)
    raise TrainingDiverged(as_line(diagnosis, run.config.abort_grad_norm, run.folder.path / "failed_step.json"))


def _validate(run: Run, state: TrainState, step: int) -> None:
    """Evaluate on the validation split, if there is one."""
    if not len(run.start.validation.labels):
        run.progress.epoch_ended(step, step / run.plan.steps_per_epoch)
        return
    run.progress.waiting("evaluating the validation split")
    result = _evaluate(run, state, run.start.validation, step)
    row = run.row(step, "validation", loss=result.loss, accuracy=result.accuracy, standard_error=result.standard_error)
    run.folder.log(row)
    run.progress.validated(row, is_best=best_step(run.folder.validations) == step)
    for hook in run.hooks:
        hook.on_validation(step, result.accuracy)


def _evaluate(run: Run, state: TrainState, split: datasets.Split, step: int) -> Evaluation:
    """Evaluate a state on a split, or stop if asked to; every step up to `step` is saved."""

    def stop_if_asked() -> None:
        if exit_code := run.stop_request.agreed(run.start.mesh, rarely=True)[0]:
            _stop(run, exit_code, step)

    def end_process(exit_code: int) -> None:
        try:
            _stop(run, exit_code, step)
        except TrainingInterrupted as stop:
            run.progress.close()
            print(stop, file=sys.stderr)
        except UserError as error:
            report(error)
            exit_code = 2
        exit_immediately(exit_code)

    with run.stop_request.exit_within(_GRACE_SECONDS, end_process):
        return evaluate(run.eval_step, state, split, run.config.eval_batch_size, run.start.mesh, stop_if_asked)


def _stop(run: Run, exit_code: int, step: int) -> NoReturn:
    """End this session once everything is written."""
    for hook in run.hooks:
        if text := hook.on_stop(step):
            run.progress.note(text)
    run.folder.wait()
    raise TrainingInterrupted(
        exit_code,
        f"stopped by {stopped_by(exit_code)} at step {step} of {run.plan.total_steps}, saved in {run.folder.path}: rerun the command to resume",
    )


def _finish(run: Run, state: TrainState, test: bool) -> RunResult:
    """Evaluate the best checkpoint on the test split, if asked to, and write `result.json`."""
    run.folder.wait()
    best_state, chosen = run.folder.restore_best(state)
    tested = None
    if test:
        run.progress.waiting("evaluating the test split")
        tested = _evaluate(run, best_state, run.start.dataset.test, run.plan.total_steps)
        run.folder.log(run.row(chosen, "test", loss=tested.loss, accuracy=tested.accuracy))
    result = RunResult(
        test_accuracy=tested and tested.accuracy,
        test_loss=tested and tested.loss,
        validation_accuracy=run.folder.validations[chosen].accuracy if chosen in run.folder.validations else None,
        num_params=train_state.num_params(state.params),
        checkpoint_step=chosen,
        steps=run.plan.total_steps,
        state_digest=train_state.digest(train_state.trained(state)),
        seconds=run.seconds(),
        startup_seconds=run.startup_seconds,
        peak_memory_bytes=environment.peak_memory_bytes(),
        config=stored_config.to_json(run.config),
        seed=run.config.seed,
        initial_weights=workdir.initial_weights(run.folder.path),
        dataset=datasets.describe(run.start.dataset, run.start.train, run.start.validation),
        environment=environment.collect(),
    )
    run.folder.write_result(result)
    run.progress.note(f"{run.folder.path} is complete: {result.summary()}")
    return result


def _complete(directory: Path, config: ConfigDict, hooks: Sequence[Hook]) -> RunResult:
    """The result of a folder whose run is complete."""
    result = RunResult.read(directory)
    if config.data.name != result.dataset["name"]:
        workdir.check_data(config.data.name, datasets.load(config.data).fingerprint, result.dataset["fingerprint"])
    for hook in hooks:
        hook.check(result.steps, result.steps)
    if jax.process_index() == 0:
        print(f"{directory} is complete: {result.summary()}")
    return result
