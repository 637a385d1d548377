"""Summarise a search: its trials by stage, the confirmed candidates, and which differences are more than noise."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from resnet_jax.runs import stored_config
from resnet_jax.search import space, studies
from resnet_jax.search.cost import Cost
from resnet_jax.search.fields import SEARCH_FIELDS

Summary = dict[str, Any]
_EARLY = ("infeasible", "pruned", "diverged", "out_of_memory")  # attributes that say why a trial has no result


def summarise(name: str, by_stage: Mapping[str, optuna.Study]) -> Summary:
    """Collect everything that the page shows of a search, as JSON values.

    Args:
        name: name of the search.
        by_stage: stage -> study, for at least one stage.

    Returns:
        {"study", "config": of the search, "fingerprint": of the data, "environments": one per stage,
        "trials": stage -> `row` of each trial, "importances": stage -> parameter -> share, "confirmed": as `confirmed`
        returns it, "best": fields of the candidate with the highest accuracy, a confirmed one if there is one,
        "share_outside_training": of the workers' time, "seconds": from the first trial's start to the last one's end}.
    """
    attributes = [study.user_attrs for study in by_stage.values()]
    config = stored_config.from_json(attributes[0]["config"], SEARCH_FIELDS)
    trials = {stage: rows(study) for stage, study in by_stage.items()}
    candidates = confirmed(trials.get("confirm", []), config)
    ranked = sorted(
        (row for stage in ("grid", "refine") for row in trials.get(stage, []) if row["accuracy"] is not None),
        key=lambda row: -row["accuracy"],
    )
    chosen: Sequence[dict[str, Any]] = [entry for entry in candidates if entry["best"]] or ranked
    timed = [row for of_stage in trials.values() for row in of_stage if row["worker_seconds"]]
    return {
        "study": name,
        "config": attributes[0]["config"],
        "fingerprint": attributes[0]["fingerprint"],
        "environments": [known["environment"] for known in attributes],
        "trials": trials,
        "importances": {stage: importances(study) for stage, study in by_stage.items() if stage != "confirm"},
        "confirmed": candidates,
        "best": chosen[0]["fields"] if chosen else None,
        "share_outside_training": 1
        - sum(row["train_seconds"] for row in timed) / sum(row["worker_seconds"] for row in timed)
        if timed
        else None,
        "seconds": _wall_seconds([trial for study in by_stage.values() for trial in study.trials]),
    }


def _wall_seconds(trials: Sequence[FrozenTrial]) -> float | None:
    """Return the seconds from the start of the first trial to the end of the last one that has ended."""
    began = [trial.datetime_start for trial in trials if trial.datetime_start]
    ended = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    return (max(ended) - min(began)).total_seconds() if ended else None


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Return `row` of each trial of a stage; one that a worker is about to begin, or died before it began, has none."""
    described = {"fields", *Cost._fields}
    return [row(trial) for trial in study.trials if described <= trial.user_attrs.keys()]


def row(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial as a row: its state ("complete", "running" or why it has no result), candidate, cost, accuracy, times.

    "seconds" is the time of its run, "train_seconds" that of the run's last session, and "worker_seconds" the time from
    the end of its worker's previous trial to the end of this one.
    """
    known = trial.user_attrs
    complete = trial.state == TrialState.COMPLETE
    return {
        "number": trial.number,
        "state": "complete" if complete else next((how for how in _EARLY if how in known), "running"),
        "fields": known["fields"],
        "num_params": known["num_params"],
        "gflops": known["gflops"],
        "accuracy": trial.values[0] if complete else None,
        "validations": [trial.intermediate_values[rung] for rung in sorted(trial.intermediate_values)],
        **{key: known.get(key) for key in ("seconds_per_epoch", "seconds", "train_seconds", "worker_seconds")},
    }


def importances(study: optuna.Study) -> dict[str, float]:
    """Return the share of the accuracy's variance that each parameter explains (fANOVA); {} for too few trials."""
    values = {trial.values[0] for trial in study.trials if trial.state == TrialState.COMPLETE}
    if len(values) < 3:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that this is experimental
        return optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: trial.values[0],
        )


def confirmed(rows: Sequence[dict[str, Any]], config: ConfigDict) -> list[dict[str, Any]]:
    """Return the candidates of confirmation, the highest mean first, then those that lack seeds, then those over the budget.

    A candidate lacks a seed whose trial failed or still runs. The config's own network takes part even if it is over the
    budget. Such a candidate is never the best.

    Args:
        rows: `row` of each trial of confirmation.
        config: the search's config.

    Returns:
        {"fields", "own": whether it is the config's own network, "over_budget": the reason, or "", "num_params",
        "gflops", "seconds_per_epoch", "accuracies": seed -> accuracy, "mean", "std": of a sample, None for one seed,
        "best": whether it is the best, "behind": the best's lead over it, as `paired` returns it} for each candidate with a result.
    """
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        fields = space.from_json(row["fields"])
        seed = fields.pop("seed")
        if row["accuracy"] is None:
            continue
        cost = {key: row[key] for key in ("num_params", "gflops")}
        start = {
            "fields": fields,
            "own": len(space.distinct(config, [fields, space.own(config)])) == 1,
            "over_budget": space.why_infeasible(config, Cost(**cost)),
            **cost,
            "seconds_per_epoch": row["seconds_per_epoch"],
            "accuracies": {},
        }
        entries.setdefault(repr(sorted(fields.items())), start)["accuracies"][seed] = row["accuracy"]
    for entry in entries.values():
        entry["accuracies"] = dict(sorted(entry["accuracies"].items()))
        values = [*entry["accuracies"].values()]
        entry["mean"] = float(np.mean(values))
        entry["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    ranked = sorted(entries.values(), key=lambda e: (bool(e["over_budget"]), -len(e["accuracies"]), -e["mean"]))
    best = ranked[0] if ranked and not ranked[0]["over_budget"] else None
    for entry in ranked:
        entry["best"] = entry is best
        entry["behind"] = None if best is None or entry["best"] else paired(entry["accuracies"], best["accuracies"])
    return ranked


def paired(first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[str, Any] | None:
    """Test whether second - first is more than noise: a paired t-test over their common seeds.

    Returns:
        {"mean", "low", "high": 95 % interval, "seeds": how many, "verdict"}; None for fewer than two seeds, or if all
        differ by the same, which says nothing about noise.
    """
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([second[seed] - first[seed] for seed in seeds])
    mean = float(differences.mean())
    if mean and np.ptp(differences) < 1e-9:
        return None
    margin = float(stats.t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / np.sqrt(len(seeds)))
    verdict = "more than noise" if abs(mean) > margin else "within the seeds' noise"
    return {"mean": mean, "low": mean - margin, "high": mean + margin, "seeds": len(seeds), "verdict": verdict}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front of points (cost, accuracy), in the order of cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def costs_against(summary: Summary) -> str:
    """Return the cost of the Pareto front: that of the objective, or the parameters if the objective has none."""
    return [*studies.OBJECTIVES[summary["config"]["search"]["objective"]], "num_params"][1]
