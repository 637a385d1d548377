"""One worker of a search: it claims trials, trains them and records how they ended, until its stages are done.

Workers coordinate by locking files in the shared folder of the search: `.claim` while a worker claims a trial, and
`.worker` in a trial's folder while a worker trains it. A lock is released when its process ends. So a running trial
without a lock was left by a worker that ended, and another worker resumes it.
"""

import contextlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
import optuna
from ml_collections import ConfigDict
from optuna.trial import TrialState

from resnet_jax import training
from resnet_jax.data import datasets
from resnet_jax.errors import TrainingDiverged, UserError, is_out_of_memory
from resnet_jax.runs import environment, metrics_log, plan, preemption, stored_config
from resnet_jax.runs.hooks import Hook
from resnet_jax.runs.result import RunResult
from resnet_jax.search import check_folder, cost, space, stages, studies
from resnet_jax.search.locks import lock

_POLL_SECONDS = 1.0
_MOST_INFEASIBLE = 50  # for each trial of refinement, which ends if nearly no candidate is within the budget


class _Pruned(Exception):
    """The trial was pruned."""


class _WatchTrial(Hook):
    """Reports the validations of a trial to Optuna, and ends the trial if Optuna prunes it.

    Args:
        trial: the running trial.
        say: prints a line.
        what: a description of the trial.
        reported: numbers of the validations that Optuna already has, from 1; None if trials are not pruned.
    """

    def __init__(self, trial: optuna.Trial, say: Callable[[str], None], what: str, reported: set[int] | None) -> None:
        self._trial, self._say, self._what, self._reported = trial, say, what, reported
        self.count = 0

    def on_validation(self, step: int, accuracy: float) -> None:
        """Count and report an accuracy."""
        self.count += 1
        self._say(f"{self._what}: {accuracy:.2%} at step {step}")
        if self._reported is not None:
            if self.count not in self._reported:
                self._trial.report(accuracy, self.count)
            if self._trial.should_prune():
                raise _Pruned


class Early(NamedTuple):
    """The reason why a trial has no result.

    Attributes:
        how: "infeasible", "pruned", "diverged" or "out_of_memory".
        why: the details.
    """

    how: str
    why: str


class Claim(NamedTuple):
    """A trial that this worker has claimed.

    Attributes:
        trial: the running trial.
        fields: its candidate.
        folder: the folder of its run.
        lock: its lock, held until the trial has ended.
    """

    trial: optuna.Trial
    fields: space.Fields
    folder: Path
    lock: IO[str]


class Worker:
    """One worker of a search.

    Args:
        config: the search's config, validated.
        name: name of the search.
        storage: its storage.
        root: folder of the trials' runs, shared by all workers.
    """

    def __init__(self, config: ConfigDict, name: str, storage: studies.Storage, root: Path) -> None:
        self.config, self.name, self.storage, self.root = config, name, storage, root
        self.terminal = sys.stdout  # the output of runs goes into files
        self.stop_request = preemption.StopRequest()
        dataset = datasets.load(config.data)
        train_split, _ = datasets.validation_split(dataset, config.data)
        self.num_classes, self.image_shape = len(dataset.class_names), train_split.images.shape[1:]
        self.num_examples = len(train_split.labels)
        self.num_steps = plan.total_steps(config, self.num_examples)
        if self.num_steps < 2:
            raise UserError("a trial has only one step: raise config.num_epochs, or lower config.batch_size")
        if config.log_every_steps >= self.num_steps:
            raise UserError(
                f"config.log_every_steps is {config.log_every_steps}, but a trial has {self.num_steps} steps, and its speed is "
                f"measured from a row before its last: set it below {self.num_steps}"
            )
        self.fingerprint = dataset.fingerprint

    def cost(self, fields: Mapping[str, Any]) -> cost.Cost:
        """Return the cost of a candidate's network."""
        return cost.of_model(space.training_config(self.config, fields).model, self.num_classes, self.image_shape)

    def run(self, names: tuple[str, ...]) -> None:
        """Take part in stages, one after the other, until all are done.

        Raises:
            preemption.TrainingInterrupted: after a signal; the running trial is saved.
        """
        with self.stop_request.capture_signals():
            for stage in names:
                self.take_part(stage)

    def take_part(self, stage: str) -> None:
        """Take part in a stage until it is done."""
        self.free_since = time.monotonic()
        with self.claiming() as token:
            study = self.study(stage, token)
        while True:
            if code := self.stop_request.exit_code():
                raise preemption.TrainingInterrupted(
                    code, f"stopped by {preemption.stopped_by(code)} between trials: rerun the command to resume"
                )
            with self.claiming():
                claim = self.adopt(study, stage) or self.ask(study, stage)
                running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if claim:
                with claim.lock:
                    self.attempt(study, stage, claim)
                jax.clear_caches()  # the next candidate needs other programs
            elif running:
                time.sleep(_POLL_SECONDS)  # other workers are training; if one dies, this worker resumes its trial
                self.free_since = time.monotonic()
            else:
                break
        self.say(stages.outcome(self.config, study, stage))

    @contextlib.contextmanager
    def claiming(self) -> Iterator[str]:
        """Lock the claiming of trials; yield a token that identifies this folder."""
        lock_file = lock(self.root / ".claim", wait=True)
        assert lock_file
        with lock_file:
            lock_file.seek(0)
            if not (token := lock_file.read()):
                lock_file.write(token := secrets.token_hex(8))
                lock_file.flush()
            yield token

    def study(self, stage: str, token: str) -> optuna.Study:
        """Return the study of a stage; store what the stage starts from if the study is new."""
        study = studies.create(self.storage, self.name, stage, self.config)
        known = study.user_attrs
        if known.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise UserError(f"--study {self.name} was started with other data: use the same data, or another --study")
        if known.get("folder", token) != token:
            raise UserError(
                f"--workdir {self.root} is not the folder of the other workers of {self.name}: give the same folder"
            )
        if "candidates" not in known:
            if token not in {study.user_attrs["folder"] for study in self.others(stage).values()}:
                check_folder(self.root, claimed=True)
            candidates = self.candidates(stage)
            if stage == "refine":
                study.enqueue_trial(space.centre(self.config, candidates[0]), skip_if_exists=True)
            for key, value in {
                "config": stored_config.to_json(self.config),
                "fingerprint": self.fingerprint,
                "folder": token,
                "environment": environment.collect(),
                "candidates": candidates,
            }.items():
                study.set_user_attr(key, value)
        elif stage == "confirm":  # the earlier stages may have new trials
            confirmed = [space.from_json(fields) for fields in study.user_attrs["candidates"]]
            study.set_user_attr("candidates", space.distinct(self.config, [*confirmed, *self.candidates(stage)]))
        if stage == "confirm":
            enqueued = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
            for point in stages.confirmations(self.config, study):
                # Optuna's `skip_if_exists` would take large seeds that follow each other for equal.
                if point not in enqueued:
                    study.enqueue_trial(point)
        return study

    def others(self, stage: str) -> dict[str, optuna.Study]:
        """Return stage -> study for the stages that have started, without this one."""
        return {s: study for s, study in studies.begun(self.storage, self.name).items() if s != stage}

    def candidates(self, stage: str) -> list[space.Fields]:
        """Return the candidates that a stage starts from.

        Raises:
            UserError: if refinement cannot start: the grid is not complete, or there is no grid and the config's own
                network is over the budget.
        """
        others = self.others(stage)
        if stage == "refine":
            if "grid" in others:
                stages.check_grid_has_ended(self.config, others["grid"])
            elif why := space.why_infeasible(self.config, self.cost(space.own(self.config))):
                raise UserError(
                    f"refine starts from config.model, which is over the budget ({why}): run --stage=grid first"
                )
        return stages.candidates(self.config, others, stage)

    def adopt(self, study: optuna.Study, stage: str) -> Claim | None:
        """Claim a running trial whose worker has ended; None if there is none."""
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if lock_file := lock(self.folder(stage, frozen.number) / ".worker", wait=False):
                if study.get_trials(deepcopy=False)[frozen.number].state.is_finished():  # before the lock was free
                    lock_file.close()
                    continue
                self.say(f"{stage} {frozen.number}: resumed, because its worker ended")
                study.sampler = stages.sampler(self.config, study, stage)
                if claim := self.prepared(study, stage, optuna.Trial(study, frozen._trial_id), lock_file):
                    return claim
        return None

    def ask(self, study: optuna.Study, stage: str) -> Claim | None:
        """Claim a new trial; None if the stage has all its trials. Trials over the budget end at once."""
        while len(stages.begun(study, stage)) < (wanted := stages.wanted(self.config, study, stage)):
            if len(study.get_trials(deepcopy=False)) >= wanted * _MOST_INFEASIBLE:
                break
            study.sampler = stages.sampler(self.config, study, stage)
            trial = study.ask()
            lock_file = lock(self.folder(stage, trial.number) / ".worker", wait=False)
            assert lock_file  # the trial is new, and only this worker is claiming
            if claim := self.prepared(study, stage, trial, lock_file):
                return claim
        return None

    def prepared(self, study: optuna.Study, stage: str, trial: optuna.Trial, lock_file: IO[str]) -> Claim | None:
        """Set the candidate and cost of a trial, and claim it; None if it is over the budget."""
        folder = self.folder(stage, trial.number)
        with contextlib.ExitStack() as stack:
            stack.callback(lock_file.close)
            study.sampler.before_trial(study, study.trials[trial.number])  # its worker may have ended before this call
            fields = stages.propose(self.config, study, stage, trial)
            costs = self.cost(fields)
            for key, value in {"fields": fields, **costs._asdict()}.items():
                trial.set_user_attr(key, value)
            why = space.why_infeasible(self.config, costs) if stage != "confirm" else ""
            if not why:
                stack.pop_all()
                return Claim(trial, fields, folder, lock_file)
            self.end_early(study, stage, trial, "infeasible", why)
        shutil.rmtree(folder)
        return None

    def attempt(self, study: optuna.Study, stage: str, claim: Claim) -> None:
        """Train a trial, or resume it, and record how it ended."""
        trial, what = claim.trial, f"{stage} {claim.trial.number}: {space.name(claim.fields)}"
        self.say(f"{what}: in {claim.folder}")
        started = time.monotonic()
        with (claim.folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            result = self.trained(study, stage, claim, what)
        trial.set_user_attr("train_seconds", time.monotonic() - started)
        trial.set_user_attr("worker_seconds", time.monotonic() - self.free_since)
        self.free_since = time.monotonic()
        if isinstance(result, Early):
            return self.end_early(study, stage, trial, *result)
        assert result.validation_accuracy is not None  # a search has a validation split
        figures = {
            "accuracy": result.validation_accuracy,
            "num_params": result.num_params,
            "seconds_per_epoch": self.seconds_per_epoch(claim.folder),
        }
        for key in ("steps", "seconds", "checkpoint_step", "state_digest"):
            trial.set_user_attr(key, getattr(result, key))
        trial.set_user_attr("seconds_per_epoch", figures["seconds_per_epoch"])
        study.tell(trial, [figures[key] for key in studies.OBJECTIVES[self.config.search.objective]])
        self.say(f"{what}: complete, {figures['accuracy']:.2%} ({stages.progress(self.config, study, stage)})")

    def trained(self, study: optuna.Study, stage: str, claim: Claim, what: str) -> RunResult | Early:
        """Train the run of a trial; return its result, or why it has none."""
        trial = claim.trial
        prunes = stage != "confirm" and len(study.directions) == 1
        reported = study.trials[trial.number].intermediate_values
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=self.config.search.reduction_factor
        )

        watch = _WatchTrial(trial, self.say, what, set(reported) if prunes else None)
        config = space.training_config(self.config, claim.fields)
        try:
            return training.train(config, claim.folder, hooks=[watch], test=False, stop_request=self.stop_request)
        except _Pruned:
            return Early("pruned", f"behind after {watch.count} of its validations")
        except TrainingDiverged as error:
            return Early("diverged", str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Early("out_of_memory", str(error)[:200])

    def seconds_per_epoch(self, folder: Path) -> float:
        """Return the seconds of an epoch of a trial, from the median speed of its logged steps."""
        rows = metrics_log.metrics_rows(folder)
        speeds = [row["images_per_second"] for row in rows if row["split"] == "train" and row["images_per_second"]]
        return self.num_examples / float(np.median(speeds))

    def end_early(self, study: optuna.Study, stage: str, trial: optuna.Trial, how: str, why: str) -> None:
        """Record that a trial has no result, and why."""
        trial.set_user_attr(how, why)
        study.tell(trial, state=TrialState.PRUNED)
        self.say(
            f"{stage} {trial.number}: {how.replace('_', ' ')}, {why} ({stages.progress(self.config, study, stage)})"
        )

    def folder(self, stage: str, number: int) -> Path:
        """Return the workdir of a trial's run."""
        return self.root / f"{stage}-{number:04d}"

    def say(self, text: str) -> None:
        """Print a line on the terminal, also while the output of a run goes into a file."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.terminal, flush=True)


def dry_run(worker: Worker) -> Iterator[str]:
    """Yield the grid, one line per point: parameters, GFLOP per image and whether it is within the budget."""
    yield f"{'blocks':<16} {'channels':<22} {'parameters':>12} {'GFLOP':>8}  feasible"
    within = 0
    for point in space.grid_points(worker.config):
        costs = worker.cost(space.from_grid(point))
        why = space.why_infeasible(worker.config, costs)
        within += not why
        verdict = f"no: {why}" if why else "yes"
        yield f"{point['blocks']:<16} {point['channels']:<22} {costs.num_params:>12,} {costs.gflops:>8.3f}  {verdict}"
    yield f"{within} within the budget, each trained for {worker.num_steps:,} steps; GFLOP are for the forward pass of one image"
