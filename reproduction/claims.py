"""The report's claims compared with measurements: each claim with the data, the seeds and a verdict.

The report is the one that the README names. Claims that come from its authors' public log say so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.reporting import report, statistics
from resnet_jax.reporting.figures import Group

_NOT_MEASURED = "not measured"


class Claim(NamedTuple):
    """A row of the table.

    Attributes:
        claim: the claim, and where the report makes it.
        measured: the measured values.
        basis: data, seeds, machine.
        verdict: "holds", "does not hold", "not measured", "undecided", each perhaps with a reason.
    """

    claim: str
    measured: str
    basis: str
    verdict: str


def _seeds(group: Group) -> str:
    config = group.config
    epochs, count = config["num_epochs"], len(group.runs)
    return f"{group.name}: {config['data']['name']}, {epochs:g} epochs, {count} seed{'s' * (count > 1)}"


def _is_reports_model(config: dict[str, Any], optimizer: str = "adamw") -> bool:
    """Whether a run trained the report's network as long as the report did, on the same data."""
    model = config["model"]
    whole = (model["channel_list"], model["block_list"]) == ([64, 128, 256, 512], [3, 5, 3, 0])
    data = (
        config["data"]["name"].rpartition(":")[2].rpartition("/")[2].removesuffix(".npz"),
        config["data"]["image_size"],
    )
    return whole and data == ("cifar10", 0) and config["num_epochs"] == 50 and config["optim"]["name"] == optimizer


def _accuracy(claim: str, claimed: float, groups: Sequence[Group], wanted: str) -> list[Claim]:
    """Check the claim that the report's own model reaches an accuracy, for each group of runs of it, most seeds first."""
    if not groups:
        return [Claim(claim, "-", f"needs a run of {wanted}", _NOT_MEASURED)]
    claims = []
    for group in sorted(groups, key=lambda group: -len(group.runs)):
        values = group.values("test_accuracy")
        short = claimed - float(np.mean(values))
        verdict = "holds" if short <= 0 else f"does not hold: {100 * short:.2f} points short"
        claims.append(Claim(claim, statistics.mean_and_spread(values), _seeds(group), verdict))
    return claims


def _optimizers(groups: Sequence[Group]) -> list[Claim]:
    """Check the claim that AdamW is better than SGD, for each pair of groups that differ in nothing else."""
    claim = "AdamW's test accuracy is above SGD's: 95.8 % and 94.7 % (figures 1 and 2)"
    pairs = report.optimizer_pairs(groups)
    if not pairs:
        return [Claim(claim, "-", "needs two configs that differ only in the optimizer", _NOT_MEASURED)]
    claims = []
    for sgd, adamw in pairs:
        values = [group.values("test_accuracy") for group in (sgd, adamw)]
        measured = f"AdamW {statistics.mean_and_spread(values[1])}, SGD {statistics.mean_and_spread(values[0])}"
        if not (compared := statistics.compare(*values)):
            verdict = (
                f"undecided: {'needs at least two seeds' if min(map(len, values)) < 2 else 'the seeds do not differ'}"
            )
        else:
            difference, low, high = (100 * value for value in compared)
            measured += f"; AdamW {difference:+.2f} ({low:+.2f} to {high:+.2f}, 95 %)"
            verdict = "holds in this protocol" if low > 0 else "does not hold: SGD is better in this protocol"
            verdict = verdict if low > 0 or high < 0 else "undecided: the difference is not significant"
        claims.append(Claim(claim, measured, f"{_seeds(adamw)}; {_seeds(sgd)}", verdict))
    return claims


def _resnet18(comparison: dict[str, Any] | None) -> list[Claim]:
    """Check the claims about size and speed, from the output of `reproduction.reproduce resnet18`."""
    texts = (
        "Fewer than 5 M parameters",
        "26 % fewer parameters than a ResNet-18 adapted for CIFAR-10",
        "22 % less time per epoch than that ResNet-18",
    )
    if comparison is None:
        return [Claim(text, "-", "needs --resnet18", _NOT_MEASURED) for text in texts]
    ours, theirs, less = comparison["final"], comparison["resnet18"], comparison["final_has_less_by"]
    (case,) = comparison["benchmarks"]["final"]["cases"]
    environment = comparison["benchmarks"]["final"]["environment"]
    machine = f"{environment['cpu_count']} CPU cores" if environment["backend"] == "cpu" else environment["devices"][0]
    by_round = less["seconds_per_epoch_by_round"]
    rounds = f"{len(by_round)} round{'s' * (len(by_round) > 1)}"
    basis = f"{machine}, {case['dtype']}, batch {case['batch_size']}, measured alternately in {rounds}"
    digits = 0 if ours["seconds_per_epoch"] >= 10 else 2

    def less_or_more(share: float) -> str:
        return f"{100 * abs(share):.0f} % {'less' if share >= 0 else 'more'}"

    def verdict(share: float, claimed: float) -> str:
        return "holds" if round(100 * share) == round(100 * claimed) else f"does not hold: {less_or_more(share)}"

    return [
        Claim(
            texts[0],
            f"{ours['num_params']:,}",
            "counted in the model",
            "holds" if ours["num_params"] < 5_000_000 else "does not hold",
        ),
        Claim(
            texts[1],
            f"{ours['num_params']:,} against {theirs['num_params']:,}",
            "counted in the models",
            verdict(less["num_params"], 0.26),
        ),
        Claim(
            texts[2],
            f"{ours['seconds_per_epoch']:,.{digits}f} s against {theirs['seconds_per_epoch']:,.{digits}f} s, "
            f"{less_or_more(less['seconds_per_epoch'])} (by round {less_or_more(max(by_round))} to "
            f"{less_or_more(min(by_round))}); "
            f"{ours['train_flops_per_image'] / 1e9:.2f} against {theirs['train_flops_per_image'] / 1e9:.2f} GFLOP per image",
            basis,
            verdict(less["seconds_per_epoch"], 0.22),
        ),
    ]


def table(groups: Sequence[Group], comparison: dict[str, Any] | None) -> list[Claim]:
    """Compare the report's claims with the runs and the comparison with ResNet-18.

    Args:
        groups: the runs.
        comparison: the output of `reproduction.reproduce resnet18`, if there is one.
    """
    finals = [group for group in groups if _is_reports_model(group.config)]
    sgd = [group for group in groups if _is_reports_model(group.config, "sgd")]
    own = [g for g in finals if not g.config["augment"].get("policy") and g.config["data"]["validation_ratio"] > 0]
    authors = [
        g
        for g in finals
        if g.config["augment"].get("policy") == "cifar10" and g.config["data"]["validation_ratio"] == 0
    ]
    return [
        *_accuracy("91.8 % test accuracy", 0.918, own, "configs/final.py for 50 epochs"),
        *_accuracy(
            "93.93 % after 50 epochs (authors' log: AutoAugment, chosen on the test split)",
            0.9393,
            authors,
            "configs/final.py:full with config.augment.policy=cifar10 for 50 epochs",
        ),
        *_accuracy("95.8 % test accuracy with AdamW (figure 2)", 0.958, own, "configs/final.py for 50 epochs"),
        *_accuracy("94.7 % test accuracy with SGD (figure 1)", 0.947, sgd, "configs/sgd.py for 50 epochs"),
        *_optimizers(groups),
        *_resnet18(comparison),
    ]


def as_markdown(claims: Sequence[Claim]) -> str:
    """The table in Markdown."""
    lines = ["| claim | measured | basis | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(claim)} |" for claim in claims)])
