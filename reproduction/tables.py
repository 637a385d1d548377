"""Write the tables of docs/ and the figures of the documents from results/*.json: `python -m reproduction.tables`.

A table replaces the lines between `<!-- NAME -->` and `<!-- end -->`. NAME is a file, `results/*.json`, or one of those that
`refreshed` names, which read several files. Tests check that every table and figure is up to date.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from reproduction import claims
from resnet_jax.reporting import figures, report, statistics
from resnet_jax.search import space

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "docs" / name for name in ("results.md", "recipes.md", "performance.md", "usage.md")]
DRAWN = ("final-h200", "sgd-h200", "final-autoaugment-h200")  # the groups of runs in the README's figure
RUNS = ("*-seed*.json", "final-cpu.json", "final-f32-*.json", "final-autoaugment-*.json")


def benchmark_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """One row for each figure that `benchmarks.benchmark` measured, ratios first; without FLOP/s, which follow from images/s."""
    yield ["batch", "dtype", "devices", "figure", "median", "min", "max", "repeats"]
    for case in result["cases"]:
        figures = {name: figure for name, figure in case["figures"].items() if figure["unit"] != "GFLOP/s"}
        for name, figure in sorted(figures.items(), key=lambda item: item[1]["unit"] != "ratio"):
            what = [str(case["batch_size"]), case["dtype"], str(case["devices"]), name.replace("_", " ")]
            decimals = 0 if figure["median"] >= 1000 else 1 if figure["median"] >= 10 else 2
            spread = [f"{figure[which]:,.{decimals}f}" for which in ("median", "min", "max")]
            spread[0] += "" if figure["unit"] == "ratio" else f" {figure['unit']}"
            yield [*what, *spread, str(len(figure["repeats"]))]


def run_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The result of one run; its median speed if it has metrics, and more of its speed if `reproduction.reproduce` measured it."""
    cells = {
        "seed": str(result["seed"]),
        "parameters": f"{result['num_params']:,}",
        "steps": f"{result['steps']:,}",
        "test accuracy": f"{result['test_accuracy']:.2%}",
        "seconds": f"{result['seconds']:,.0f}",
    }
    if "seconds_after_startup" in result:
        cells["seconds after startup"] = f"{result['seconds_after_startup']:.1f}"
    if speeds := [row["images_per_second"] for row in result.get("metrics", []) if row.get("images_per_second")]:
        cells["images/s"] = f"{np.median(speeds):,.0f}"
    if "share_of_peak" in result:
        cells["share of peak"] = f"{result['share_of_peak']:.1%} of {result['peak_tflops']:g} TFLOP/s"
    yield [*cells]
    yield [*cells.values()]


def resnet18_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The final model beside ResNet-18."""
    yield ["", "final", "ResNet-18", "reduction"]
    for name, decimals in (("num_params", 0), ("train_flops_per_image", 0), ("seconds_per_epoch", 3)):
        pair = [f"{result[which][name]:,.{decimals}f}" for which in ("final", "resnet18")]
        yield [name.replace("_", " "), *pair, f"{result['final_has_less_by'][name]:.1%}"]


def export_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Sizes and median latencies of a run's exports, as `benchmarks.exports` measured them."""
    cases, differences = result["cases"], result["differences"]
    latencies = (cell for case in cases for cell in (f"batch {case['batch_size']}", "time / PyTorch's"))
    yield ["", "MB", "largest difference", *latencies]
    for name in dict.fromkeys([*cases[0]["figures"], *result["bytes"]]):
        if "/" not in name:
            size = result["bytes"].get(name)
            row = [name.replace("_", ", "), "" if size is None else f"{size / 1e6:.2f}"]
            row.append(f"{differences[name]:.1e}" if name in differences else "")
            for case in cases:
                for key, digits in (
                    (name, "{:,.2f} ms ({:,.2f}-{:,.2f})"),
                    (f"{name} / torch", "{:.2f} ({:.2f}-{:.2f})"),
                ):
                    figure = case["figures"].get(key)
                    row.append(digits.format(figure["median"], figure["min"], figure["max"]) if figure else "")
            yield row


def search_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The networks that a search confirmed with several seeds, best first."""
    yield ["network", "parameters", "validation accuracy", "points behind the best (95 % interval)"]
    for entry in result["confirmed"]:
        behind = {k: 100 * v for k, v in (entry["behind"] or {}).items() if k != "verdict"}
        yield [
            space.name(entry["fields"]) + (" (the report's)" if entry["own"] else ""),
            f"{entry['num_params']:,}",
            statistics.mean_and_spread([*entry["accuracies"].values()]),
            "{mean:.2f} ({low:.2f} to {high:.2f})".format(**behind) if behind else "",
        ]


def weights_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Shipped weights: test accuracy before and after their kernels were rounded to float16."""
    yield ["weights", "MB", "kernels in", "test accuracy", "with two views"]
    for kernels in ("float32", "float16"):
        size = f"{result['bytes_of_file'] / 1e6:.2f}" if kernels == "float16" else ""
        of = result[kernels]
        yield [f"`{result['weights']}`", size, kernels, f"{of['accuracy']:.2%}", f"{of['accuracy_flip']:.2%}"]


def compiled_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """What `benchmarks.compiled` counted in a training step, and the speed that the data sheet of the device allows it."""
    yield [
        *("devices", "batch", "operations", "convolutions", "GB moved", "temporary GB", "sums over devices"),
        *("images/s, by bytes", "images/s, by FLOP"),
    ]
    for program in result["compiled"]:
        batch, devices = program["batch_size"], program["devices"]
        sums = (f"{n} of {size / 1e6:.1f} MB in {dtype}" for dtype, (n, size) in program["all_reduces"].items())
        yield [
            f"{devices} {program['device']}",
            f"{batch:,}",
            f"{program['operations']:,}",
            str(sum(count for kind, count in program["convolutions"].items() if len(kind.split()[1]) == 4)),
            f"{program['bytes'] / 1e9:.1f}",
            f"{program['temporary_bytes'] / 1e9:.1f}",
            ", ".join(sums),
            f"{batch * program['bytes_per_second'] / program['bytes']:,.0f}",
            f"{devices * program['flops'] / result['train_flops_per_image']:,.0f}",
        ]


def repeat_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Whether the same run gave the same bits again, compiled anew and resumed."""
    yield ["the same run", "SHA-256 of its state", "equal to the first"]
    for which, words in (("a", "first"), ("b", "compiled anew"), ("c", "stopped after its first step and resumed")):
        equal = result[which]["state_digest"] == result["a"]["state_digest"]
        yield [words, f"{result[which]['state_digest'][:12]}...", "" if which == "a" else "yes" if equal else "no"]


def table(result: dict[str, Any]) -> str:
    """The table of a result, with the machine and the commit that it was measured on."""
    if "confirmed" in result:
        rows, environment = search_rows(result), result["environments"][0]
    elif "bytes" in result:
        rows, environment = export_rows(result), result["environment"]
    elif "compiled" in result:
        rows, environment = compiled_rows(result), result["environment"]
    elif "cases" in result:
        rows, environment = benchmark_rows(result), result["environment"]
    elif "weights" in result:
        rows, environment = weights_rows(result), result["environment"]
    elif "bitwise" in result:
        rows, environment = repeat_rows(result), result["a"]["environment"]
    elif "resnet18" in result:
        rows, environment = resnet18_rows(result), result["benchmarks"]["final"]["environment"]
    else:
        rows, environment = run_rows(result), result["environment"]
    note = measured_on(environment)
    if "confirmed" in result:  # its environments are those of the workers
        note = f"Each worker: {note} The search took {result['seconds'] / 60:.0f} minutes; "
        note += f"{result['share_outside_training']:.1%} of the workers' time was spent outside training."
    return f"{as_markdown(rows)}\n\n{note}"


def measured_table(rows: Iterable[list[str]], environment: dict[str, Any]) -> str:
    """A table of several results, with the machine of one of them."""
    return f"{as_markdown(rows)}\n\n{measured_on(environment)}"


def as_markdown(rows: Iterable[list[str]]) -> str:
    """A Markdown table of a header and its rows."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body])


def measured_on(environment: dict[str, Any]) -> str:
    """The machine and the versions of a result, in one line."""
    cores = f"{environment['cpu_count']} CPU core{'s' * (environment['cpu_count'] > 1)}"
    machine = cores if environment["backend"] == "cpu" else f"{environment['devices'][0]}, {cores}"
    machine += f" of {environment['cpu']}" if "cpu" in environment else ""
    commit = (environment["git"] or {"commit": "unknown"})["commit"][:9]
    return f"{machine}, jax {environment['versions']['jax']}, commit {commit}."


def evaluations_table(runs: Sequence[str]) -> str:
    """Test accuracy and calibration of runs, of one view and of two; means.

    Args:
        runs: NAME of each results/eval-NAME.json and results/eval-NAME-flip.json.
    """
    rows = [["evaluated", "test accuracy", "calibration error", "calibration error at the fitted temperature"]]
    for label, suffix in (("as it is", ""), ("with `--views=2`", "-flip")):
        tests = [read_result(f"eval-{run}{suffix}.json")["test"] for run in runs]
        errors = [
            [(test if fitted is None else test[fitted])["calibration"]["expected_calibration_error"] for test in tests]
            for fitted in (None, "calibrated")
            if fitted is None or all(fitted in test for test in tests)
        ]
        means = [f"{sum(values) / len(values):.2%}" for values in ([test["accuracy"] for test in tests], *errors)]
        rows.append([label, *means, *[""] * (3 - len(means))])
    return measured_table(rows, read_result(f"eval-{runs[0]}.json")["environment"])


def finetune_table() -> str:
    """The runs of `configs/finetune.py`, which start from a trained network, beside those from random weights."""
    runs = {
        start: [read_result(f"finetune-digits-{start}-{seed}.json") for seed in (0, 1, 2)]
        for start in ("trained", "scratch")
    }
    tuned, scratch = ([run["test_accuracy"] for run in of] for of in runs.values())
    compared = statistics.compare(scratch, tuned)
    assert compared  # there are three seeds of each
    difference, low, high = (100 * value for value in compared)
    rows = [
        ["start", "test accuracy after 15 steps, 3 seeds"],
        ["`final-cifar10`", statistics.mean_and_spread(tuned)],
        ["random weights", statistics.mean_and_spread(scratch)],
        ["difference", f"{difference:+.1f} points ({low:+.1f} to {high:+.1f}, 95 %)"],
    ]
    return measured_table(rows, runs["trained"][0]["environment"])


def quickstart_table() -> str:
    """The runs of `configs/quickstart.py`: the range over five seeds."""
    runs = [read_result(f"quickstart-cpu-{seed}.json") for seed in range(5)]
    accuracies, seconds = (np.array([run[name] for run in runs]) for name in ("test_accuracy", "seconds"))
    rows = [
        ["seeds", "parameters", "steps", "test accuracy: lowest", "median", "highest", "seconds, median"],
        [
            str(len(runs)),
            f"{runs[0]['num_params']:,}",
            f"{runs[0]['steps']:,}",
            *(f"{value:.2%}" for value in (accuracies.min(), np.median(accuracies), accuracies.max())),
            f"{np.median(seconds):.0f}",
        ],
    ]
    return measured_table(rows, runs[0]["environment"])


def runs_of(name: str) -> list[dict[str, Any]]:
    """The runs of a config on a CPU, by seed."""
    return [read_result(path.name) for path in sorted((ROOT / "results").glob(f"{name}-cpu-seed*.json"))]


def views_table(name: str) -> str:
    """The runs of a config on a CPU, with one view and six; of several, their mean accuracy, and the medians of the rest."""
    runs = runs_of(name)
    names = ("test_accuracy", "test_accuracy_over_views", "total_seconds", "evaluation_seconds", "images_per_second")
    rows = [["seed", "test accuracy, one view", "six views", "seconds in all", "of these evaluation", "images/s"]]
    for run in runs:
        one, six, *others = (run[name] for name in names)
        rows.append([str(run["seed"]), f"{one:.2%}", f"{six:.2%}", *(f"{value:.0f}" for value in others)])
    if len(runs) == 1:
        return measured_table(rows, runs[0]["environment"])
    means = [statistics.mean_and_spread([run[name] for run in runs]) for name in names[:2]]
    medians = [f"{np.median([run[name] for run in runs]):.0f}" for name in names[2:]]
    rows.append(["mean; median", *means, *medians])
    return measured_table(rows, runs[0]["environment"])


class Training(NamedTuple):
    """A training in the comparison of accuracy and arithmetic.

    Attributes:
        name: of the training.
        accuracies: on the test images, 0..1: one for each seed, or the published one.
        num_params: parameters of the network; None if they were not published.
        pflop: floating-point operations of the training, times 10^15.
        published: where; "" if it was measured here.
    """

    name: str
    accuracies: list[float]
    num_params: int | None
    pflop: float
    published: str = ""


AIRBENCH = "github.com/KellerJordan/cifar10-airbench"
PUBLISHED = [
    Training("airbench94 with Muon", [0.9401], None, 0.29, AIRBENCH),
    Training("airbench96", [0.96], None, 3.1, AIRBENCH),
    Training("ResNet-18", [0.96], 11_173_962, 32.3, AIRBENCH),
    Training("the report", [0.918], 4_918_602, 9.9, "the report; PFLOP computed here"),
]


def trainings() -> list[Training]:
    """The trainings that were measured here and those that were published, by their arithmetic."""
    measured = []
    for name, runs, accuracy in (
        ("`speedrun.py`, six views", runs_of("speedrun"), "test_accuracy_over_views"),
        ("`best.py`, six views", runs_of("best"), "test_accuracy_over_views"),
        ("`final.py`", [read_result(f"final-h200-seed{seed}.json") for seed in (0, 1, 2)], "test_accuracy"),
    ):
        first = runs[0]
        pflop = first["train_flops_per_image"] * first["config"]["batch_size"] * first["steps"] / 1e15
        measured.append(Training(name, [run[accuracy] for run in runs], first["num_params"], pflop))
    return sorted(measured + PUBLISHED, key=lambda training: training.pflop)


def budget_table() -> str:
    """Test accuracy beside the floating-point operations of the training, measured here and published elsewhere."""
    rows = [["training", "test accuracy", "parameters", "PFLOP", "source"]]
    for name, accuracies, num_params, pflop, published in trainings():
        accuracy = f"{100 * accuracies[0]:.4g} %" if published else statistics.mean_and_spread(accuracies)
        seeds = f"{len(accuracies)} seed{'s' * (len(accuracies) > 1)}"
        source = f"published: {published}" if published else f"measured here, {seeds}"
        operations = f"{pflop:.2f}" if pflop < 1 else f"{pflop:.1f}"
        rows.append([name, accuracy, f"{num_params:,}" if num_params else "", operations, source])
    return as_markdown(rows)


def draw_budget() -> Figure:
    """Draw what `budget_table` says: filled markers were measured here, hollow ones published."""
    figure, axes = figures.new_axes("CIFAR-10: test accuracy by arithmetic")
    for name, accuracies, _, pflop, published in trainings():
        point = pflop, float(np.mean(accuracies))
        colour = figures.NEUTRAL if published else figures.COLOURS[0]
        axes.plot(*point, "o", color=colour, mfc="none" if published else colour, ms=7)
        offset, side = ((0, -15), "center") if published else ((8, -3), "left")  # so that no text covers another
        axes.annotate(name.replace("`", ""), point, xytext=offset, textcoords="offset points", ha=side, fontsize=8)
    axes.plot([], [], "o", color=figures.COLOURS[0], label="measured here")
    axes.plot([], [], "o", color=figures.NEUTRAL, mfc="none", label="published")
    axes.set(xscale="log", xlabel="PFLOP of the training", xlim=(0.05, 100), ylim=(0.91, 0.97))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figures.show_percent(axes.yaxis, "test accuracy")
    figures.add_legend(figure, axes)
    return figure


def ladder_table() -> str:
    """What each change of `configs/ladder.py` gained and cost: mean differences to the unchanged run of the same seed."""
    result = read_result("ladder-cpu.json")
    changes = result["changes"]
    base = changes["nothing"]["runs"]
    rows = [["change", "fields", "validation accuracy", "gain in points (by seed)", "time of an image"]]
    entries = []
    for name, change in changes.items():
        pairs = [(run, base[seed]) for seed, run in change["runs"].items() if seed in base]
        if not pairs:
            continue
        gains = [100 * (run["validation_accuracy"] - unchanged["validation_accuracy"]) for run, unchanged in pairs]
        times = [unchanged["images_per_second"] / run["images_per_second"] - 1 for run, unchanged in pairs]
        spread = f" ± {np.std(gains, ddof=1):.2f}" if len(gains) > 1 else ""
        entry = [
            name.replace("_", " "),
            ", ".join(f"`{field}={value}`" for field, value in change["fields"].items()),
            statistics.mean_and_spread([run["validation_accuracy"] for run, _ in pairs]),
            f"{np.mean(gains):+.2f}{spread} ({', '.join(f'{gain:+.2f}' for gain in gains)})",
            f"{100 * np.mean(times):+.0f} %",
        ]
        if name == "nothing":
            entry[3:] = "", ""
        entries.append((float(np.mean(gains)), entry))
    rows += [row for _, row in sorted(entries, key=lambda entry: -entry[0])]
    return measured_table(rows, result["environment"])


def run_files() -> list[Path]:
    """The summaries of runs in results/."""
    return sorted(path for pattern in RUNS for path in (ROOT / "results").glob(pattern))


def groups() -> list[figures.Group]:
    """The runs in results/, grouped by config."""
    return report.grouped([report.read_run(path) for path in run_files()])


def comparison_file() -> Path:
    """The comparison with ResNet-18 in results/; one from a GPU if there is one."""
    return max((ROOT / "results").glob("resnet18-*.json"), key=lambda path: (path.stem != "resnet18-cpu", path.name))


def read_result(name: str) -> dict[str, Any]:
    """The content of a file in results/."""
    result: dict[str, Any] = json.loads((ROOT / "results" / name).read_text("utf-8"))
    return result


def claims_table() -> str:
    """The report's claims beside what the runs in results/ measured."""
    return claims.as_markdown(claims.table(groups(), read_result(comparison_file().name)))


def refreshed(document: str) -> str:
    """The document with each table rewritten from results/."""
    named: dict[str, Callable[[], str]] = {
        "claims": claims_table,
        "finetune": finetune_table,
        "quickstart": quickstart_table,
        "speedrun": partial(views_table, "speedrun"),
        "best": partial(views_table, "best"),
        "budget": budget_table,
        "ladder": ladder_table,
        "evaluations-final": partial(evaluations_table, ["final-h200"]),
        "evaluations-final-cpu": partial(evaluations_table, ["final-cpu"]),
        "evaluations-found": partial(evaluations_table, ["found-1", "found-2", "found-3"]),
    }

    def block(match: re.Match[str]) -> str:
        text = named[match[2]]() if match[2] in named else table(read_result(Path(match[2]).name))
        return f"{match[1]}\n{text}\n<!-- end -->\n"

    names = "|".join([*named, r"results/[\w-]+\.json"])
    return re.sub(rf"(<!-- ({names}) -->)\n(?:.*\n)*?<!-- end -->\n", block, document)


def drawn_groups() -> list[figures.Group]:
    """The groups of runs in the README's figure: the report's network at its full size."""
    return [group for group in groups() if group.name in DRAWN]


def accuracy_values() -> list[Any]:
    """The values in the README's figure."""
    return [
        [
            group.name,
            split,
            [[column.tolist() for column in figures.rows(run, split, "accuracy")] for run in group.runs],
        ]
        for group in drawn_groups()
        for split in ("train", "validation", "test")
    ]


def draw_accuracy() -> Figure:
    """Draw the README's figure."""
    return figures.draw_accuracy(drawn_groups())


class Drawn(NamedTuple):
    """A figure of the documents, and the values from which it is drawn."""

    draw: Callable[[], Figure]
    values: Callable[[], Any]


FIGURES = {  # in results/
    "accuracy.png": Drawn(draw_accuracy, accuracy_values),
    "budget.png": Drawn(draw_budget, trainings),
}


def figure_digest(name: str) -> str:
    """SHA-256 of the values in a figure, which its file carries."""
    return hashlib.sha256(json.dumps(FIGURES[name].values()).encode()).hexdigest()


def draw(name: str, path: Path) -> None:
    """Draw a figure as a PNG whose text "Source" is `figure_digest`."""
    figures.save(FIGURES[name].draw, path, "light", "white", {"Source": figure_digest(name)})


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(refreshed(document.read_text("utf-8")), "utf-8")
    for figure_name in FIGURES:
        draw(figure_name, ROOT / "results" / figure_name)
