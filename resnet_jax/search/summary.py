"""What a search found: its trials by stage, the candidates that were confirmed, and the differences beyond noise."""

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
_EARLY = ("infeasible", "pruned", "diverged", "out_of_memory")  # attributes of trials that say why they have no result


def summarise(name: str, found: Mapping[str, optuna.Study]) -> Summary:
    """All that the page shows of a search, as JSON holds it.

    Args:
        name: of the search.
        found: stage -> study, of at least one stage.

    Returns:
        {"study", "config": of the search, "fingerprint": of the data, "environments": one a stage,
        "trials": stage -> `row` of each trial, "importances": stage -> parameter -> share, "confirmed": as `confirmed`
        gives it, "best": fields of the candidate with the highest accuracy, confirmed where that stage has begun,
        "share_outside_training": of the workers' time, "seconds": from the first trial's start to the last one's end}.
    """
    attributes = [study.user_attrs for study in found.values()]
    config = stored_config.from_json(attributes[0]["config"], SEARCH_FIELDS)
    trials = {stage: [row(t) for t in study.trials if "fields" in t.user_attrs] for stage, study in found.items()}
    candidates = confirmed(trials.get("confirm", []), config)
    ranked = sorted(
        (row for stage in ("grid", "refine") for row in trials.get(stage, []) if row["accuracy"] is not None),
        key=lambda row: -row["accuracy"],
    )
    chosen: Sequence[dict[str, Any]] = [entry for entry in candidates if entry["best"]] or ranked
    timed = [row for rows in trials.values() for row in rows if row["worker_seconds"]]
    return {
        "study": name,
        "config": attributes[0]["config"],
        "fingerprint": attributes[0]["fingerprint"],
        "environments": [known["environment"] for known in attributes],
        "trials": trials,
        "importances": {stage: importances(study) for stage, study in found.items() if stage != "confirm"},
        "confirmed": candidates,
        "best": chosen[0]["fields"] if chosen else None,
        "share_outside_training": 1
        - sum(row["train_seconds"] for row in timed) / sum(row["worker_seconds"] for row in timed)
        if timed
        else None,
        "seconds": _wall_seconds([trial for study in found.values() for trial in study.trials]),
    }


def _wall_seconds(trials: Sequence[FrozenTrial]) -> float | None:
    """From the start of the first trial to the end of the last one that has ended."""
    began = [trial.datetime_start for trial in trials if trial.datetime_start]
    ended = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    return (max(ended) - min(began)).total_seconds() if ended else None


def row(trial: FrozenTrial) -> dict[str, Any]:
    """A trial: how it ended ("complete", "running", or why it has no result), its candidate, cost, accuracy and times.

    Seconds are of its run in all ("seconds"), of its last session ("train_seconds"), and of its last worker, from the end
    of the trial before to the end of this one ("worker_seconds").
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
    """The share of the accuracy's variance that each parameter explains (fANOVA), of complete trials; {} of too few."""
    values = {trial.values[0] for trial in study.trials if trial.state == TrialState.COMPLETE}
    if len(values) < 3:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental
        return optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: trial.values[0],
        )


def confirmed(rows: Sequence[dict[str, Any]], config: ConfigDict) -> list[dict[str, Any]]:
    """The candidates of the confirmation, the highest mean first, those over the budget last.

    The config's own network takes part even if it is over the budget. Such a candidate is never the best.

    Args:
        rows: of its trials.
        config: of the search.

    Returns:
        {"fields", "own": whether it is the config's own network, "over_budget": the reason, or "", "num_params", "gflops",
        "seconds_per_epoch", "accuracies": seed -> accuracy, "mean", "std": of a sample, None for one seed, "best": whether it
        is the best, "behind": the best's lead over it, as `paired` returns it} for each candidate with a result.
    """
    found: dict[str, dict[str, Any]] = {}
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
        found.setdefault(repr(sorted(fields.items())), start)["accuracies"][seed] = row["accuracy"]
    for entry in found.values():
        entry["accuracies"] = dict(sorted(entry["accuracies"].items()))
        values = [*entry["accuracies"].values()]
        entry["mean"] = float(np.mean(values))
        entry["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    ranked = sorted(found.values(), key=lambda entry: (bool(entry["over_budget"]), -entry["mean"]))
    best = ranked[0] if ranked and not ranked[0]["over_budget"] else None
    for entry in ranked:
        entry["best"] = entry is best
        entry["behind"] = None if best is None or entry["best"] else paired(entry["accuracies"], best["accuracies"])
    return ranked


def paired(first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[str, Any] | None:
    """Whether second - first is more than noise: Student's paired t test over the seeds that both have.

    Returns:
        {"mean", "low", "high": 95 % interval, "seeds": how many, "verdict"}; None of fewer than two seeds.
    """
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([second[seed] - first[seed] for seed in seeds])
    mean = float(differences.mean())
    margin = float(stats.t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / np.sqrt(len(seeds)))
    verdict = "more than noise" if abs(mean) > margin else "within the seeds' noise"
    return {"mean": mean, "low": mean - margin, "high": mean + margin, "seeds": len(seeds), "verdict": verdict}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, accuracy) of which no other costs at most as much and is at least as accurate, by cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def costs_against(summary: Summary) -> str:
    """What the Pareto front sets accuracy against: the objective's, or parameters where it has none."""
    return [*studies.OBJECTIVES[summary["config"]["search"]["objective"]], "num_params"][1]
