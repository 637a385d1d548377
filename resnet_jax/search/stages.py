"""What the stages of a search try: the candidates that each starts from, what it proposes next, and when it is done."""

from collections.abc import Mapping
from typing import Any

import optuna
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from resnet_jax.errors import UserError
from resnet_jax.search import STAGES, space, studies, summary

_SEEDS = 2**32


def candidates(config: ConfigDict, others: Mapping[str, optuna.Study], stage: str) -> list[space.Fields]:
    """What a stage starts from: nothing, the best, or the best few and the config's own network.

    Args:
        config: of the search.
        others: the studies of the other stages that have begun.
        stage: which.
    """
    if stage == "grid":
        return []
    earlier = [
        trial for other, study in others.items() if STAGES.index(other) < STAGES.index(stage) for trial in study.trials
    ]
    fields = [space.from_json(trial.user_attrs["fields"]) for trial in studies.best_first(earlier)]
    ranked, own = space.distinct(config, fields), space.own(config)
    if stage == "refine":
        return ranked[:1] or [own]
    return space.distinct(config, [*ranked[: config.search.confirm_top], own])


def check_grid_has_ended(config: ConfigDict, grid: optuna.Study) -> None:
    """Refuse to refine around the best of a part of the grid.

    Raises:
        UserError: where the grid goes on.
    """
    trials = begun(grid, "grid")
    if len(trials) < wanted(config, grid, "grid") or not all(trial.state.is_finished() for trial in trials):
        raise UserError("refine starts from the grid's best, and the grid has not ended: go on with --stage=grid first")


def confirmations(config: ConfigDict, study: optuna.Study) -> list[dict[str, int]]:
    """The parameters of all trials of the confirmation: each candidate with each seed."""
    # Not the seed by which they were chosen, which flatters them.
    seeds = [(config.seed + 1 + i) % _SEEDS for i in range(config.search.confirm_seeds)]
    return [{"candidate": i, "seed": seed} for i in range(len(study.user_attrs["candidates"])) for seed in seeds]


def wanted(config: ConfigDict, study: optuna.Study, stage: str) -> int:
    """How many trials a stage has in the end; of refinement, those within the budget."""
    if stage == "refine":
        return int(config.search.refine_trials)
    return len(space.grid_points(config) if stage == "grid" else confirmations(config, study))


def begun(study: optuna.Study, stage: str) -> list[FrozenTrial]:
    """The trials that count towards `wanted`, under way or ended."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, *studies.ENDED))
    return [trial for trial in trials if stage != "refine" or "infeasible" not in trial.user_attrs]


def sampler(config: ConfigDict, study: optuna.Study, stage: str) -> optuna.samplers.BaseSampler:
    """What proposes the next trial; those of the confirmation are all enqueued."""
    seed = (config.seed + len(study.get_trials(deepcopy=False))) % _SEEDS
    return studies.sampler(space.grid(config) if stage == "grid" else {}, seed)


def propose(config: ConfigDict, study: optuna.Study, stage: str, trial: optuna.Trial) -> space.Fields:
    """The candidate of a trial."""
    known = [space.from_json(fields) for fields in study.user_attrs["candidates"]]
    if stage == "refine":
        return space.refined(trial, config, known[0])
    if stage == "grid":
        grid: dict[str, Any] = space.grid(config)
        return space.from_grid({key: trial.suggest_categorical(key, values) for key, values in grid.items()})
    which = trial.suggest_int("candidate", 0, len(known) - 1)
    return known[which] | {"seed": trial.suggest_int("seed", 0, _SEEDS - 1)}


def progress(config: ConfigDict, study: optuna.Study, stage: str) -> str:
    """How far a stage is: "7 of 12, best 63.10%"."""
    trials = begun(study, stage)
    ended = sum(trial.state.is_finished() for trial in trials)
    best = studies.best_first(trials) if stage != "confirm" else []  # where a mean decides, and not the luckiest seed
    return f"{ended} of {wanted(config, study, stage)}" + (f", best {best[0].values[0]:.2%}" if best else "")


def outcome(config: ConfigDict, study: optuna.Study, stage: str) -> str:
    """What a stage that is done has found, in a line.

    Raises:
        UserError: where none of its trials is complete.
    """
    best = studies.best_first(study.get_trials(deepcopy=False))
    if not best:
        raise UserError(
            f"{stage} is done and no trial of it is complete: start another --study, with a larger config.model.max_params "
            "or config.search.max_gflops if they were infeasible, a lower config.optim.learning_rate if they diverged"
        )
    told = f"{best[0].values[0]:.2%}, {space.name(best[0].user_attrs['fields'])}"
    if stage == "confirm":  # where a mean decides, and not the luckiest seed
        for entry in summary.confirmed([summary.row(trial) for trial in study.trials], config):
            if entry["best"]:
                told = (
                    f"{entry['mean']:.2%}, the mean of {len(entry['accuracies'])} seeds, {space.name(entry['fields'])}"
                )
    return f"{stage} is done: {len(best)} complete, the best {told}"
