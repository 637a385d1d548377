"""The stages of a search: the candidates that a stage starts from, what it proposes, and when it is done."""

from collections.abc import Mapping
from typing import Any

import optuna
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from resnet_jax.errors import UserError
from resnet_jax.search import STAGES, space, studies, summary

_SEEDS = 2**32


def candidates(config: ConfigDict, others: Mapping[str, optuna.Study], stage: str) -> list[space.Fields]:
    """Return the candidates that a stage starts from: none, the best, or the best few and the config's own network.

    Args:
        config: the search's config.
        others: stage -> study, for the other stages that have started.
        stage: the stage.
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
    """Check that the grid is complete before refinement starts from its best.

    Raises:
        UserError: if the grid is not complete.
    """
    trials = begun(grid, "grid")
    if len(trials) < wanted(config, grid, "grid") or not all(trial.state.is_finished() for trial in trials):
        raise UserError("refine starts from the grid's best, but the grid is not complete: run --stage=grid first")


def confirmations(config: ConfigDict, study: optuna.Study) -> list[dict[str, int]]:
    """Return the parameters of all trials of confirmation: each candidate with each seed."""
    # Other seeds than the one that selected the candidates, whose accuracy is biased upwards.
    seeds = [(config.seed + 1 + i) % _SEEDS for i in range(config.search.confirm_seeds)]
    return [{"candidate": i, "seed": seed} for i in range(len(study.user_attrs["candidates"])) for seed in seeds]


def wanted(config: ConfigDict, study: optuna.Study, stage: str) -> int:
    """Return how many trials a complete stage has; refinement counts only those within the budget."""
    if stage == "refine":
        return int(config.search.refine_trials)
    return len(space.grid_points(config) if stage == "grid" else confirmations(config, study))


def begun(study: optuna.Study, stage: str) -> list[FrozenTrial]:
    """List the trials that count towards `wanted`, running or ended."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, *studies.ENDED))
    return [trial for trial in trials if stage != "refine" or "infeasible" not in trial.user_attrs]


def sampler(config: ConfigDict, study: optuna.Study, stage: str) -> optuna.samplers.BaseSampler:
    """Return the sampler of the next trial; the trials of confirmation are all enqueued."""
    seed = (config.seed + len(study.get_trials(deepcopy=False))) % _SEEDS
    return studies.sampler(space.grid(config) if stage == "grid" else {}, seed)


def propose(config: ConfigDict, study: optuna.Study, stage: str, trial: optuna.Trial) -> space.Fields:
    """Return the candidate of a trial."""
    known = [space.from_json(fields) for fields in study.user_attrs["candidates"]]
    if stage == "refine":
        return space.refined(trial, config, known[0])
    if stage == "grid":
        grid: dict[str, Any] = space.grid(config)
        return space.from_grid({key: trial.suggest_categorical(key, values) for key, values in grid.items()})
    which = trial.suggest_int("candidate", 0, len(known) - 1)
    return known[which] | {"seed": trial.suggest_int("seed", 0, _SEEDS - 1)}


def progress(config: ConfigDict, study: optuna.Study, stage: str) -> str:
    """Describe the progress of a stage: "7 of 12, best 63.10%"."""
    trials = begun(study, stage)
    ended = sum(trial.state.is_finished() for trial in trials)
    best = studies.best_first(trials) if stage != "confirm" else []  # which is decided by means, not by the best seed
    return f"{ended} of {wanted(config, study, stage)}" + (f", best {best[0].values[0]:.2%}" if best else "")


def outcome(config: ConfigDict, study: optuna.Study, stage: str) -> str:
    """Describe the result of a stage in one line.

    Raises:
        UserError: if none of its trials is complete.
    """
    best = studies.best_first(study.get_trials(deepcopy=False))
    if not best:
        raise UserError(
            f"{stage} is done, but none of its trials is complete: start another --study, with a larger config.model.max_params "
            "or config.search.max_gflops if they were infeasible, a lower config.optim.learning_rate if they diverged"
        )
    winner = f"{best[0].values[0]:.2%}, {space.name(best[0].user_attrs['fields'])}"
    if stage == "confirm":  # which is decided by means, not by the best seed
        for entry in summary.confirmed(summary.rows(study), config):
            if entry["best"]:
                winner = (
                    f"{entry['mean']:.2%}, the mean of {len(entry['accuracies'])} seeds, {space.name(entry['fields'])}"
                )
    return f"{stage} is done: {len(best)} complete, the best {winner}"
