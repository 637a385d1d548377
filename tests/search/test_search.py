import copy
import json
import os
import re
import signal
import subprocess
import sys
import time

import browser
import jax
import numpy as np
import optuna
import pytest
from helpers import SEARCH, launch, made_once, mistake_of_tool, rows, tool
from ml_collections import ConfigDict
from optuna.trial import TrialState

from configs import final, narrow
from configs import search as search_config
from resnet_jax import config as config_lib
from resnet_jax import errors
from resnet_jax.errors import UserError
from resnet_jax.runs import preemption
from resnet_jax.runs.result import RunResult
from resnet_jax.search import check_folder, cost, figures, report, space, studies, summary, worker
from resnet_jax.search.locks import JournalLock, lock

SMOKE = ("--config", "configs/search.py:smoke")


def search(*arguments, **environment):
    return launch(*arguments, program=SEARCH, **environment)


@pytest.fixture
def config(cache_dir) -> ConfigDict:
    """The smoke search."""
    config = search_config.get_config("smoke")
    config.data.cache_dir = cache_dir
    return config


# What a candidate costs


def test_the_cost_is_that_of_the_model_and_no_array_is_made():
    before = jax.live_arrays()  # held, so that none of them ends meanwhile
    of = cost.of_model(final.get_config().model, 10, (32, 32, 3))
    assert of.num_params == 4_918_602
    assert len(jax.live_arrays()) == len(before)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_operations_are_those_of_the_convolutions_and_the_classifier(block):
    config = final.get_config().model
    config.channel_list, config.block_list, config.block = (8, 16), (1, 1), block
    outputs = {
        "basic": [(32, 3, 3, 8), (32, 3, 8, 8), (32, 3, 8, 8), (16, 3, 8, 16), (16, 3, 16, 16), (16, 1, 8, 16)],
        "bottleneck": [
            *[(32, 3, 3, 8), (32, 1, 8, 8), (32, 3, 8, 8), (32, 1, 8, 32), (32, 1, 8, 32)],
            *[(32, 1, 32, 16), (16, 3, 16, 16), (16, 1, 16, 64), (16, 1, 32, 64)],
        ],
    }[block]  # (side of the output, side of the kernel, channels in, channels out)
    convolutions = sum(2 * side**2 * kernel**2 * before * after for side, kernel, before, after in outputs)
    classifier = 2 * 10 * outputs[-1][-1]
    assert cost.of_model(config, 10, (32, 32, 3)).gflops == pytest.approx((convolutions + classifier) / 1e9, rel=1e-12)


def test_the_cost_of_a_candidate_is_known_without_compiling_anything():
    events = []

    def listen(event, *_, **more):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 41.5)(1.0)
        assert any("backend_compile" in event for event in events)  # so would a compilation be heard
        events.clear()
        config = final.get_config().model
        config.block_list = (1, 2, 1, 1)
        cost.of_model(config, 10, (32, 32, 3))
        assert not any("backend_compile" in event for event in events)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Candidates


def test_the_grid_has_each_list_of_channels_with_each_of_blocks(config):
    points = [space.from_grid(point) for point in space.grid_points(config)]
    expected = [
        {"model.channel_list": channels, "model.block_list": blocks}
        for channels in config.search.channel_lists
        for blocks in config.search.block_lists
    ]
    assert points == expected


def test_refinement_stays_around_the_best_and_can_repeat_it():
    config = search_config.get_config()
    around = {"model.channel_list": (64, 100, 256, 512), "model.block_list": (3, 1, 3, 0)}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.centre(config, around))
    found = [space.refined(study.ask(), config, around) for _ in range(200)]
    assert found[0] == around | {
        "optim.learning_rate": config.optim.learning_rate,
        "optim.weight_decay": config.optim.weight_decay,
        "schedule.warmup_epochs": config.schedule.warmup_epochs,
    }
    for i, (width, depth) in enumerate(zip(around["model.channel_list"], around["model.block_list"], strict=True)):
        widths = {fields["model.channel_list"][i] for fields in found}
        depths = {fields["model.block_list"][i] for fields in found}
        assert depths == ({0} if not depth else {max(1, depth - 1), depth, depth + 1})
        if depth:
            assert width / 1.5 <= min(widths) < width < max(widths) <= width * 1.5
            assert all((other - width) % config.search.width_step == 0 for other in widths)
        else:
            assert widths == {width}
    config.model.downsample = "pool"  # before the blocks of each stage, and it has the stage's width
    assert len({space.refined(study.ask(), config, around)["model.channel_list"][3] for _ in range(20)}) > 1
    low, high = config.search.learning_rate
    assert all(low <= fields["optim.learning_rate"] <= high for fields in found)
    assert len({fields["schedule.warmup_epochs"] for fields in found}) > 100


def test_refinement_of_a_whitened_stem_keeps_to_the_widths_that_it_can_have():
    config = search_config.get_config()
    config.model.stem, config.search.width_step, config.schedule.name = "whitened", 1, "warmup_linear"
    around = {"model.channel_list": (48, 100), "model.block_list": (1, 1)}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [space.refined(study.ask(), config, around) for _ in range(200)]
    assert {fields["model.channel_list"][0] for fields in found} == {*range(32, 55, 2)}
    assert len({fields["schedule.warmup_epochs"] for fields in found}) > 100
    for fields in found[:5]:
        space.training_config(config, fields)


def test_refinement_of_a_narrow_stage_and_of_a_schedule_without_warm_up():
    config = search_config.get_config("cpu")
    config.search.width_step = 64
    step = narrow.get_config("sgd")
    config.schedule = step.schedule
    around = {"model.channel_list": (1, 2), "model.block_list": (1, 1)}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.centre(config, around))
    fields = space.refined(study.ask(), config, around)
    assert fields["model.channel_list"] == (1, 2)
    assert set(fields) == {"model.channel_list", "model.block_list", "optim.learning_rate", "optim.weight_decay"}


def test_candidates_whose_runs_are_the_same_are_one(config):
    network = {"model.channel_list": (8, 16, 16), "model.block_list": (1, 1, 0)}
    same = [
        network,
        network | {"model.channel_list": (8, 16, 99)},  # of a stage without blocks
        network | {"optim.learning_rate": config.optim.learning_rate},
    ]
    other = network | {"optim.learning_rate": 0.5}
    assert space.distinct(config, [*same, other]) == [network, other]
    config.model.downsample = "pool_first"  # each stage has a convolution of its own
    assert space.distinct(config, [*same, other]) == [network, same[1], other]


def test_a_run_knows_nothing_of_the_search_and_its_budget(config):
    plain = space.training_config(config, {"model.block_list": (1, 1, 1)})
    assert "search" not in plain
    assert plain.model.max_params == 0
    config_lib.validate(plain)
    with pytest.raises(
        UserError,
        match=r"config\.search\.block_lists is only for searches: use this config with python -m resnet_jax search",
    ):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("max_params", "max_gflops", "why"),
    [(0, 0.0, ""), (100, 1.0, ""), (99, 1.0, "100 parameters of 99 allowed"), (0, 0.4, "0.500 GFLOP per image of 0.4")],
)
def test_the_budget(config, max_params, max_gflops, why):
    config.model.max_params, config.search.max_gflops = max_params, max_gflops
    found = space.why_infeasible(config, cost.Cost(100, 0.5))
    assert found.startswith(why)
    assert bool(found) == bool(why)


# A worker, whose runs are pretended


cost_of_model = made_once(cost.of_model)  # a second of tracing, for the same candidates in most tests


class Pretended:
    """In place of `training.train`: validations and a result, as accuracies says of the candidate's channels."""

    def __init__(self, accuracies):
        self.accuracies, self.configs, self.told = accuracies, [], []

    def __call__(self, config, directory, hooks, test, stop_request):
        assert not test
        self.configs.append(config)
        accuracies = self.accuracies(config)
        if isinstance(accuracies, BaseException):
            raise accuracies
        for i, accuracy in enumerate(accuracies, start=1):
            for hook in hooks:
                hook.on_validation(i * 20, accuracy)
            self.told.append(accuracy)
        row = {"step": 20, "epoch": 1, "split": "train", "images_per_second": 100.0 * config.model.channel_list[0]}
        (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return RunResult(
            test_accuracy=None,
            test_loss=None,
            validation_accuracy=max(accuracies),
            num_params=config.model.channel_list[0],
            checkpoint_step=60,
            steps=60,
            seconds=1.0,
            config={},
            dataset={},
            environment={},
            state_digest="0",
        )


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """Run stages of a search, without a budget, with pretended runs; returns its studies by stage."""
    monkeypatch.setattr(cost, "of_model", cost_of_model)
    config.model.max_params, config.search.reduction_factor = 0, 100  # which compares first validations alone

    def run(accuracies, *stages, storage=tmp_path / "study.journal"):
        pretended = Pretended(accuracies)
        monkeypatch.setattr(worker.training, "train", pretended)
        with studies.opened(str(storage), create=True) as opened:
            run.pretended = pretended
            worker.Worker(config, "s", opened, tmp_path / "runs").run(stages)
            return studies.existing(opened, "s")

    return run


def by_width(config):
    """The wider the better, after a first validation that prunes none; seeds differ by a little."""
    return [0.01, 0.1, 0.1 + 0.001 * config.model.channel_list[0] + 0.0001 * config.seed]


def by_last_stage(config):
    """The wider the last stage, which has most parameters, the better; seeds differ by a little."""
    width = config.model.channel_list[-1] * bool(config.model.block_list[-1])
    return [0.01, 0.1, 0.1 + 0.001 * width + 0.0001 * config.seed * (1 + width / 1000)]


def states(study, attribute):
    return [trial.number for trial in study.trials if attribute in trial.user_attrs]


def test_the_three_stages(run, config):
    found = run(by_width, "grid", "refine", "confirm")
    assert {stage: len(study.trials) for stage, study in found.items()} == {"grid": 4, "refine": 3, "confirm": 4}
    first = found["refine"].trials[0]
    assert first.user_attrs["fields"]["model.channel_list"] == [16, 32, 64]  # the grid's best
    confirmed = [trial.user_attrs["fields"] for trial in found["confirm"].trials]
    assert {fields["seed"] for fields in confirmed} == {config.seed + 1, config.seed + 2}
    assert all(trial.state == TrialState.COMPLETE for trial in found["confirm"].trials)
    assert all("search" not in config for config in run.pretended.configs)
    assert sum(entry["own"] for entry in summary.summarise("s", found)["confirmed"]) == 1


def test_a_search_that_is_done_does_nothing_more(run):
    run(by_width, "grid")
    run(by_width, "grid")
    assert run.pretended.configs == []


def test_what_is_over_the_budget_is_recorded_and_leaves_no_folder(run, config, tmp_path):
    config.model.max_params = 20_000
    study = run(by_width, "grid")["grid"]
    (number,) = states(study, "infeasible")
    infeasible = study.trials[number]
    assert infeasible.state == TrialState.PRUNED
    assert infeasible.user_attrs["infeasible"] == "78,042 parameters of 20,000 allowed"
    assert infeasible.user_attrs["num_params"] == 78_042
    assert not (tmp_path / "runs" / f"grid-{number:04d}").exists()
    assert len(run.pretended.configs) == 3


def test_a_stage_in_which_nothing_is_within_the_budget_ends_in_one_line(run, config):
    config.model.max_params = 10
    with pytest.raises(
        UserError, match="grid is done, but none of its trials is complete: start another --study, with a larger"
    ):
        run(by_width, "grid")


def test_refinement_ends_where_nearly_nothing_is_within_the_budget(run, config, monkeypatch):
    monkeypatch.setattr(worker, "_MOST_INFEASIBLE", 3)
    own = cost.of_model(config.model, 10, (8, 8, 3))
    monkeypatch.setattr(space, "why_infeasible", lambda config, of: "" if of == own else "another")
    config.search.refine_trials = 8
    study = run(by_width, "refine")["refine"]
    assert len(study.trials) == 24
    assert len(study.get_trials(states=[TrialState.COMPLETE])) < 8


def test_refinement_does_not_start_from_what_is_over_the_budget(run, config):
    config.model.max_params = 20_000
    with pytest.raises(
        UserError, match=r"refine starts from config\.model, which is over the budget \(78,042 parameters"
    ):
        run(by_width, "refine")
    found = run(by_width, "grid", "refine")  # nothing stands in the way of
    assert len(found["refine"].get_trials(states=[TrialState.COMPLETE])) == 3


def test_refinement_waits_for_the_grid_that_has_begun(run):
    failures = iter([ValueError("stop")])
    with pytest.raises(ValueError, match="stop"):
        run(lambda c: next(failures), "grid")
    with pytest.raises(UserError, match="the grid is not complete: run --stage=grid first"):
        run(by_width, "refine")
    found = run(by_width, "grid", "refine")
    assert found["refine"].user_attrs["candidates"][0]["model.channel_list"] == [16, 32, 64]


def test_what_is_found_after_a_confirmation_is_confirmed_too(run, config):
    config.model.channel_list = (4, 4, 4)
    config.search.channel_lists = ((8, 16, 16), (16, 32, 64))
    first = run(by_width, "confirm")["confirm"].trials
    assert [trial.user_attrs["fields"]["model.channel_list"] for trial in first] == [[4, 4, 4]] * 2
    found = run(by_width, "grid", "refine", "confirm")
    assert [trial.params for trial in found["confirm"].trials[:2]] == [trial.params for trial in first]
    assert found["confirm"].trials[0].state == TrialState.COMPLETE
    page = summary.summarise("s", found)
    assert page["best"]["model.channel_list"][0] >= 16
    assert len(page["confirmed"]) == 3
    assert all(len(entry["accuracies"]) == 2 for entry in page["confirmed"])
    config.search.refine_trials += 3
    longer = run(lambda c: [0.01, 0.1, 0.9 if len(run.pretended.configs) == 3 else 0.2], "grid", "refine", "confirm")
    best = studies.best_first(longer["refine"].trials)[0].user_attrs["fields"]
    assert space.from_json(best) in [entry["fields"] for entry in summary.summarise("s", longer)["confirmed"]]


def test_a_signal_in_a_trial_that_ends_by_itself_ends_the_worker(run):
    def accuracies(c):
        signal.raise_signal(signal.SIGTERM)  # which `train` notes, and is done before it looks
        return [0.1, 0.2, 0.3]

    with pytest.raises(preemption.TrainingInterrupted, match="stopped by SIGTERM between trials: rerun") as stop:
        run(accuracies, "grid")
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert len(run.pretended.configs) == 1
    assert len(run(by_width, "grid")["grid"].trials) == 4


@pytest.mark.parametrize(("seed", "seeds"), [(2**32 - 1, {0, 1}), (20_240_601, {20_240_602, 20_240_603})])
def test_any_seed_of_a_config_will_do(run, config, seed, seeds):
    config.seed = seed
    confirm = run(by_width, "grid", "refine", "confirm")["confirm"]
    points = [(trial.params["candidate"], trial.params["seed"]) for trial in confirm.trials]
    candidates = len(confirm.user_attrs["candidates"])
    assert sorted(points) == [(candidate, of) for candidate in range(candidates) for of in sorted(seeds)]


def test_trials_that_fall_behind_are_pruned_at_their_validations(run, config):
    config.search.reduction_factor, config.model.max_params = 2, 20_000
    study = run(lambda c: [0.9, 0.9, 0.9] if len(run.pretended.configs) == 1 else [0.1, 0.9, 0.9], "grid")["grid"]
    pruned = states(study, "pruned")
    assert len(pruned) == 2  # and one is over the budget
    for number in pruned:
        assert study.trials[number].intermediate_values == {1: 0.1}
        assert study.trials[number].user_attrs["pruned"] == "behind after 1 of its validations"
    assert run.pretended.told == [0.9] * 3


def test_confirmation_prunes_nothing(run, config):
    study = run(lambda c: [0.9, 0.9] if len(run.pretended.configs) == 1 else [0.1, 0.1], "confirm")["confirm"]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_a_trial_that_diverges_or_has_no_memory_is_told_so_and_the_search_goes_on(run):
    failures = iter(
        [errors.TrainingDiverged("step 3 has loss nan"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")]
    )
    study = run(lambda c: next(failures, [0.5, 0.6, 0.7]), "grid")["grid"]
    assert [study.trials[i].user_attrs["diverged"] for i in states(study, "diverged")] == ["step 3 has loss nan"]
    assert [study.trials[i].user_attrs["out_of_memory"] for i in states(study, "out_of_memory")]
    assert len(study.get_trials(states=[TrialState.COMPLETE])) == 2


def test_any_other_failure_leaves_its_trial_to_the_next_worker(run):
    failures = iter([ValueError("a mistake of ours")])
    with pytest.raises(ValueError, match="a mistake of ours"):
        run(lambda c: next(failures), "grid")
    study = run(by_width, "grid")["grid"]
    assert len(study.trials) == 4
    assert all(trial.state.is_finished() for trial in study.trials)


def test_a_trial_that_was_left_is_taken_up_with_its_candidate_and_reports(run, config, tmp_path):
    runs = iter([[0.1, KeyboardInterrupt()]])

    def accuracies(c):
        return next(runs, [0.1, 0.2, 0.3])

    with pytest.raises(TypeError):  # a validation that cannot be: the worker ends amid its run
        run(accuracies, "refine")
    left = run.pretended.configs[0]
    study = run(accuracies, "refine")["refine"]
    assert run.pretended.configs[0].to_dict() == left.to_dict()
    assert study.trials[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}
    assert len(study.trials) == 3


@pytest.mark.parametrize("stage", ["grid", "refine", "confirm"])
@pytest.mark.parametrize("left_after", ["create_new_trial", "set_trial_user_attr"])
def test_a_trial_that_was_left_before_it_had_a_candidate_gets_one(
    run, config, tmp_path, monkeypatch, stage, left_after
):
    original = getattr(optuna.storages.JournalStorage, left_after)

    def die(self, *arguments, **more):
        original(self, *arguments, **more)
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.JournalStorage, left_after, die)
        if stage == "refine" and left_after == "create_new_trial":
            patch.setattr(optuna.storages.JournalStorage, "set_trial_state_values", die)  # it waits as enqueued
        with pytest.raises(SystemExit):
            run(by_width, stage)
    with studies.opened(str(tmp_path / "study.journal"), create=False) as storage:
        if stage == "refine" and left_after == "create_new_trial":  # its study has nothing but a trial that waits
            with pytest.raises(UserError, match="--study s has no candidates yet: rerun"):
                studies.existing(storage, "s")
        else:
            assert summary.summarise("s", studies.existing(storage, "s"))["trials"][stage] == []
    found = run(by_width, stage)[stage]
    assert all(trial.state.is_finished() and "fields" in trial.user_attrs for trial in found.trials)
    candidates = [json.dumps(trial.user_attrs["fields"]) for trial in found.trials]
    assert len(set(candidates)) == len(candidates) == {"grid": 4, "confirm": 2}.get(stage, len(candidates))


@pytest.mark.parametrize(
    ("objective", "values"), [("accuracy_params", [0.116, 16]), ("accuracy_seconds", [0.116, 1294 / 1600])]
)
def test_two_objectives_on_demand(run, config, objective, values):
    config.search.objective = objective
    found = run(by_width, "grid", "refine", "confirm")
    assert len(found["grid"].get_trials(states=[TrialState.COMPLETE])) == 4  # none is pruned by one objective alone
    assert max(found["grid"].trials, key=lambda trial: trial.values[0]).values == pytest.approx(values)
    assert [d.name for d in found["grid"].directions] == ["MAXIMIZE", "MINIMIZE"]
    page = summary.summarise("s", found)
    assert summary.costs_against(page) == {"accuracy_params": "num_params"}.get(objective, "seconds_per_epoch")


def test_workers_must_share_one_folder_config_and_data(run, config, tmp_path, monkeypatch):
    run(by_width, "grid")
    (tmp_path / "runs" / ".claim").unlink()
    with pytest.raises(
        UserError, match=r"--workdir .* is not the folder of the other workers of s: give the same folder"
    ):
        run(by_width, "grid")
    config.log_every_steps = 30  # what changes no result may differ
    config.optim.learning_rate = 0.5
    with pytest.raises(UserError, match=r"another config \(optim.learning_rate: 0.01 -> 0.5\)"):
        run(by_width, "grid")
    config.optim.learning_rate = 0.01
    monkeypatch.setattr(worker.datasets, "load", lambda c, load=worker.datasets.load: load(c)._replace(fingerprint="x"))
    with pytest.raises(UserError, match="was started with other data"):
        run(by_width, "grid")


def test_a_folder_takes_one_search_and_keeps_its_runs(run, config, tmp_path):
    run(by_width, "grid")
    before = sorted((tmp_path / "runs").rglob("*"))
    for stage in ("grid", "confirm"):
        with pytest.raises(
            UserError, match=r"--workdir .*/runs holds grid-0000 of another search: choose another folder"
        ):
            run(by_width, stage, storage=tmp_path / "other.journal")
    (tmp_path / "others" / "refine-0001").mkdir(parents=True)
    (tmp_path / "others" / "2020-01").mkdir()
    with pytest.raises(UserError, match="holds refine-0001 of another search"):
        check_folder(tmp_path / "others")
    check_folder(tmp_path / "runs")  # a search's own
    assert sorted((tmp_path / "runs").rglob("*")) == before


def test_refinement_can_go_on_with_more_trials(run, config):
    run(by_width, "refine")
    config.search.refine_trials += 2
    assert len(run(by_width, "refine")["refine"].trials) == config.search.refine_trials
    assert len(run.pretended.configs) == 2


# Locks


HOLD = """
import sys, time
from pathlib import Path
from resnet_jax.search.locks import JournalLock
held = JournalLock(Path(sys.argv[1]))
held.acquire()
with open(sys.argv[1], "ab") as journal:
    journal.write(b'{"op_code": 4, "half')
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_goes_with_its_holder_and_the_line_it_was_killed_in_is_taken_away(tmp_path):
    journal = tmp_path / "study.journal"
    journal.write_bytes(b'{"op_code": 0}\n')
    with subprocess.Popen([sys.executable, "-c", HOLD, str(journal)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert lock(tmp_path / "study.journal.lock", wait=False) is None
        holder.kill()
    waiting = JournalLock(journal)
    started = time.monotonic()
    assert waiting.acquire()
    assert time.monotonic() - started < 5
    assert journal.read_bytes() == b'{"op_code": 0}\n'
    waiting.release()


@pytest.mark.parametrize("content", [b"", b'{"op_code": 0}\n', b"half"])
def test_a_lock_leaves_whole_lines_alone(tmp_path, content):
    journal = tmp_path / "study.journal"
    journal.write_bytes(content)
    held = JournalLock(journal)
    held.acquire()
    held.release()
    assert journal.read_bytes() == (b"" if content == b"half" else content)


# What was found


def test_a_paired_comparison_tells_noise_from_difference():
    first = {1: 0.50, 2: 0.52, 3: 0.51}
    found = summary.paired(first, {1: 0.60, 2: 0.63, 3: 0.61})
    from scipy import stats

    interval = stats.ttest_rel([0.60, 0.63, 0.61], [0.50, 0.52, 0.51]).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(0.31 / 3)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert (found["verdict"], found["seeds"]) == ("more than noise", 3)
    assert summary.paired(first, {1: 0.55, 2: 0.50, 3: 0.52})["verdict"] == "within the seeds' noise"
    assert summary.paired(first, {1: 0.55, 9: 0.50}) is None
    assert summary.paired(first, first)["verdict"] == "within the seeds' noise"
    assert summary.paired({1: 0.5, 2: 0.6}, {1: 0.6, 2: 0.7}) is None  # by the same: nothing is known of the noise


def test_a_candidate_that_lacks_a_seed_is_not_the_best(config):
    own = space.own(config)
    other = own | {"optim.learning_rate": 0.5}
    cost = {"num_params": 1, "gflops": 1.0, "seconds_per_epoch": 1.0}
    accuracies = [(own, 1, 0.5), (own, 2, 0.5), (other, 1, 0.9), (other, 2, None)]
    rows = [{"fields": fields | {"seed": seed}, "accuracy": accuracy, **cost} for fields, seed, accuracy in accuracies]
    first, second = summary.confirmed(rows, config)
    assert first["own"]
    assert first["best"]
    assert second["accuracies"] == {1: 0.9}


def test_the_pareto_front():
    assert summary.pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (5, 0.95)]) == [1, 3, 0, 5]
    assert summary.pareto([]) == []


def test_the_best_is_within_the_budget(run, config):
    config.model.max_params = 20_000  # the config's own network, the widest, is over it
    found = summary.summarise("s", run(by_last_stage, "grid", "refine", "confirm"))
    own = next(entry for entry in found["confirmed"] if entry["own"])
    assert own["over_budget"]
    assert not own["best"]
    best = next(entry for entry in found["confirmed"] if entry["best"])
    assert found["best"] == best["fields"]
    assert best["behind"] is None
    assert own["behind"]["mean"] == pytest.approx(best["mean"] - own["mean"])
    assert own["mean"] > best["mean"]  # and still it is not first
    assert found["confirmed"][0] is best
    assert found["confirmed"][-1] is own


def test_the_page_shows_the_best_within_the_budget_first(run, config, tmp_path):
    config.model.max_params = 20_000
    found = summary.summarise("s", run(by_last_stage, "grid", "refine", "confirm"))
    text = report.page(found, tmp_path / "found.py", tmp_path)
    table = text.partition("<h2>Confirmed</h2>")[2].partition("</table>")[0]
    rows = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)).strip() for row in table.split("<tr>")[2:]]
    assert rows[0].startswith(space.name(found["best"]))
    assert "the best" in rows[0]
    assert "parameters of 20,000 allowed" not in rows[0]
    assert "over budget: " in rows[-1]
    assert "candidates over the budget come last" in re.sub(r"\s+", " ", text)
    (axes,) = figures.draw_pareto(found).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert min(lines["over budget"].get_xdata()) > 20_000 >= max(lines["Pareto front"].get_xdata())


# The real thing: two workers at once, and its page. What one worker does, and the page, are tested above with pretended runs.


@pytest.fixture(scope="module")
def searched(tmp_path_factory, cache_dir):
    """A folder in which a search of two workers has ended, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    flags = ("--study=tiny", f"--workdir={folder}/runs", f"--config.data.cache_dir={cache_dir}", "--workers=2")
    done = search(*SMOKE, *flags, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    storage = ("--study", "tiny", "--storage", str(folder / "runs" / "study.journal"))
    tool("search", "report", *storage, "--output", folder / "page", "--found", folder / "found.py")
    tool("search", "report", *storage, "--summary", folder / "summary.json")
    return folder, done.stdout


@pytest.mark.slow
def test_two_workers_share_the_trials(searched):
    folder, printed = searched
    found = json.loads((folder / "summary.json").read_text())
    assert {stage: {row["state"] for row in rows} <= {"complete", "pruned", "infeasible"} for stage, rows in
            found["trials"].items()} == dict.fromkeys(("grid", "refine", "confirm"), True)  # fmt: skip
    assert len(found["trials"]["grid"]) == 4
    trained = [(stage, row) for stage, rows in found["trials"].items() for row in rows if row["state"] != "infeasible"]
    for stage, row in trained:
        assert printed.count(f"{stage} {row['number']}: {space.name(row['fields'])}: in ") == 1
        assert 0 < row["train_seconds"] < row["worker_seconds"]
    assert printed.count("confirm is done") == 2
    first_two = [line for line in printed.splitlines() if ": in " in line][:2]
    assert "grid" in first_two[0]
    assert "grid" in first_two[1]
    assert [environment["cpu_count"] for environment in found["environments"]] == [
        len(os.sched_getaffinity(0)) // 2
    ] * 3


@pytest.mark.slow
def test_the_test_split_is_never_looked_at(searched):
    folder, _ = searched
    runs = sorted((folder / "runs").glob("*-*/"))
    assert len(runs) >= 8
    for directory in runs:
        assert not rows(directory, "test")
    for path in (folder / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        assert result["test_accuracy"] is result["test_loss"] is None


@pytest.mark.slow
def test_the_config_that_was_found_gives_the_run_that_was_confirmed(searched, tmp_path):
    folder, _ = searched
    found = json.loads((folder / "summary.json").read_text())
    best = next(entry for entry in found["confirmed"] if entry["best"])
    seed, accuracy = next(iter(best["accuracies"].items()))
    flags = ("--config", folder / "found.py", "--workdir", tmp_path / "run", f"--config.seed={seed}")
    done = launch(*flags, prefix=("taskset", "-c", "0"), XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["validation_accuracy"] == accuracy


@pytest.mark.slow
def test_the_page_shows_what_was_found(searched):
    folder, _ = searched
    text = (folder / "page" / "index.html").read_text()
    found = json.loads((folder / "summary.json").read_text())
    for entry in found["confirmed"]:
        assert space.name(entry["fields"]) in text
        assert f"{entry['num_params']:,}" in text
    assert {"history", "pareto"} <= set(re.findall(r'<figure id="(\w+)"', text))
    assert "launch.py --config" in text
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|url\(|@import|<script", text)


@browser.needed
def test_chromium_shows_the_page(run, config, tmp_path):
    config.search.refine_trials = 12
    rng = np.random.default_rng(0)
    found = summary.summarise("s", run(lambda c: [0.01, *np.sort(rng.random(2))], "grid", "refine", "confirm"))
    report.write(found, tmp_path / "page", tmp_path / "found.py")
    assert {"parallel", "importances_grid"} <= {path.stem for path in (tmp_path / "page" / "figures").iterdir()}
    assert browser.images_shown(tmp_path / "page" / "index.html") >= 4


def test_a_page_of_a_search_that_has_just_begun(run, tmp_path):
    with pytest.raises(ValueError, match="stop"):
        run(lambda c: ValueError("stop"), "grid")
    where = [f"--storage={tmp_path}/study.journal", f"--output={tmp_path}/page", f"--found={tmp_path}/f.py"]
    tool("search", "report", "--study=s", *where)
    assert "1 running" in (tmp_path / "page" / "index.html").read_text()
    assert not (tmp_path / "f.py").exists()


def test_the_dry_run_lists_the_grid_and_trains_nothing(capsys):
    tool("search", *SMOKE, "--dry-run")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) == 6
    assert re.search(r"1,1,1 +16,32,64 +78,042 +0\.002  no: 78,042 parameters of 20,000 allowed", printed)
    assert sum(line.endswith(" yes") for line in lines) == 3
    assert lines[-1].startswith("3 within the budget, each trained for 61 steps")


# Mistakes


MISTAKES = {
    "no study": ((*SMOKE,), "--study is ''"),
    "a name that is none": ((*SMOKE, "--study=a/b"), "--study is 'a/b'"),
    "a config of no search": (("--config", "configs/final.py", "--study=a"), "config.search.objective is missing"),
    "a field that is none": ((*SMOKE, "--study=a", "--config.search.refine_trial=3"), "config.search.refine_trials?"),
    "no validation": ((*SMOKE, "--study=a", "--config.data.validation_ratio=0.0"), "set it to 0.1"),
    "another database": ((*SMOKE, "--study=a", "--storage=mysql://x/y"), "postgresql://USER@HOST/DATABASE"),
    "no server": (
        (*SMOKE, "--study=a", "--storage=postgresql://u:secret@127.0.0.1:9/x"),
        "postgresql://127.0.0.1:9/x cannot",
    ),
    "a file that is no journal": ((*SMOKE, "--study=a", "--storage=README.md"), "--storage README.md cannot be used"),
    "a journal nowhere": ((*SMOKE, "--study=a", "--storage=/proc/x/y"), "--storage /proc/x/y cannot be used"),
    "a folder nowhere": ((*SMOKE, "--study=a", "--workdir=/proc/x", "--storage={tmp}/j"), "/proc/x/.claim"),
    "too many workers": ((*SMOKE, "--study=a", "--storage={tmp}/j", "--workers=999"), "use at most"),
    "a file for a folder": ((*SMOKE, "--study=a", "--workdir=README.md"), "README.md is not a folder"),
    "a port that is none": (
        (*SMOKE, "--study=a", "--storage=postgresql://u:secret@h:x/y"),
        "postgresql://h:x/y is not the URL",
    ),
    "a password elsewhere": (
        (*SMOKE, "--study=a", "--storage=mysql://u:se:cr@secret@h/y?password=secret"),
        "mysql://h/y:",
    ),
    "a device": (
        (*SMOKE, "--study=a", "--storage=/dev/null"),
        "--storage /dev/null cannot be used (it is not a regular file)",
    ),
    "one step": ((*SMOKE, "--study=a", "--workdir={tmp}", "--config.batch_size=100000"), "raise config.num_epochs"),
    "too few rows": ((*SMOKE, "--study=a", "--workdir={tmp}", "--config.log_every_steps=61"), "config.log_every_steps"),
    "a range upside down": ((*SMOKE, "--study=a", "--config.search.learning_rate=(0.1,0.01)"), "lowest and a highest"),
    "lists of other lengths": (
        (*SMOKE, "--study=a", "--workdir={tmp}", "--config.search.channel_lists=((8,16),)"),
        "config.search.channel_lists has (8, 16) with 2 stages, but config.model.channel_list has 3",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capfd, monkeypatch, mistake):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # otherwise a process of its own looks for GPUs
    arguments, words = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        tool("search", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert stop.value.code == 2
    printed = capfd.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert "secret" not in line
    assert printed.out == ""


REPORT_MISTAKES = {
    "no journal": (["--study=s", "--storage=nowhere"], "--storage nowhere does not exist"),
    "another study": (["--study=t", "--storage=study.journal"], "--study t is not in this storage, which has s"),
    "no name": (["--study=../s", "--storage=study.journal"], "--study is '../s'"),
    "another workdir": (["--study=s", "--workdir=runs"], "--storage runs/study.journal does not exist"),
    "a folder that is not there": (
        ["--study=s", "--storage=study.journal", "--found=no/x.py"],
        "the folder no does not exist",
    ),
    "a config in the page": (
        ["--study=s", "--storage=study.journal", "--output=p", "--found=p/x.py"],
        "is in --output p",
    ),
    "a summary on the journal": (
        ["--study=s", "--storage=study.journal", "--summary=study.journal"],
        "only the summary of a search",
    ),
    "a summary on a file": (
        ["--study=s", "--storage=study.journal", "--summary=mine.py"],
        "only the summary of a search",
    ),
    "a summary and a page": (
        ["--study=s", "--storage=study.journal", "--summary=x.json", "--output=p"],
        "--output: not allowed with argument --summary",
    ),
    "a summary and a config": (
        ["--study=s", "--storage=study.journal", "--summary=x.json", "--found=x.py"],
        "--summary writes no config: leave out --found",
    ),
    "an edited config": (["--study=s", "--storage=study.journal", "--found=edited.py"], "exists, and was edited"),
    "a config of another search": (
        ["--study=s", "--storage=study.journal", "--found=other.py"],
        "belongs to something else",
    ),
    "a page that is no text": (["--study=s", "--storage=study.journal", "--output=site"], "not a report"),
    "a folder of something else": (["--study=s", "--storage=study.journal", "--output=runs"], "not a report"),
    "a config of the user's": (
        ["--study=s", "--storage=study.journal", "--found=mine.py"],
        "mine.py exists, and was edited or belongs to something else",
    ),
    "a summary nowhere": (["--study=s", "--storage=study.journal", "--summary=no/x.json"], "cannot be written"),
}


def test_a_config_that_an_earlier_version_found_is_overwritten_and_one_with_a_line_more_is_not(run, tmp_path):
    found, path = summary.summarise("s", run(by_width, "grid")), tmp_path / "found.py"
    written = report.found_config(found, path)
    path.write_text(re.sub(r", digest of .*\n$", ", of the lines above: an edited file is not written over\n", written))
    assert path.read_text() != written
    report._check_found(path, "s")
    path.write_text(written + "x = 1\n")
    with pytest.raises(UserError, match="was edited"):
        report._check_found(path, "s")


@pytest.mark.parametrize("mistake", REPORT_MISTAKES)
def test_a_mistake_of_the_report_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, capsys, mistake):
    run(by_width, "grid")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("mine = 1\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_bytes(b"\xff\xfe")
    with studies.opened("study.journal", create=False) as opened:
        found = summary.summarise("s", studies.existing(opened, "s"))
    written = report.found_config(found, tmp_path / "x.py")
    (tmp_path / "edited.py").write_text(written.replace("    return config", "    config.seed = 7\n    return config"))
    (tmp_path / "other.py").write_text(report.found_config(found | {"study": "t"}, tmp_path / "x.py"))
    before = sorted(tmp_path.rglob("*"))
    arguments, words = REPORT_MISTAKES[mistake]
    capsys.readouterr()
    line = mistake_of_tool(capsys, "search", "report", *arguments)
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lost_database_is_one_line(tmp_path):
    lost = optuna.exceptions.StorageInternalError("a commit failed")
    with (
        pytest.raises(UserError, match=r"study.journal cannot be used \(gone\): fix this"),
        studies.opened(str(tmp_path / "study.journal"), create=True),
    ):
        raise lost from RuntimeError("gone")


def test_a_trial_that_ends_while_another_worker_waits_for_its_lock_is_left_alone(run, config, tmp_path, monkeypatch):
    run(by_width, "grid")
    with studies.opened(str(tmp_path / "study.journal"), create=False) as opened:
        study = studies.existing(opened, "s")["grid"]
        listed = copy.copy(study.trials[0])
        listed.state = TrialState.RUNNING  # as it was before
        now = study.get_trials
        monkeypatch.setattr(study, "get_trials", lambda states=None, **of: [listed] if states else now(**of))
        assert worker.Worker(config, "s", opened, tmp_path / "runs").adopt(study, "grid") is None
