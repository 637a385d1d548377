"""Write the tables of README.md and docs/PERFORMANCE.md, and the README's figure, from results/*.json.

    python -m reproduction.tables

A table stands between the lines `<!-- results/NAME.json -->` and `<!-- end -->`, the report's claims between
`<!-- claims -->` and `<!-- end -->`. Tests check that tables and figure are up to date.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from reproduction import claims
from resnet_jax.reporting import figures, report

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "PERFORMANCE.md"]
FIGURE = ROOT / "results" / "accuracy.png"
RUNS = ("*-seed*.json", "final-f32-*.json", "final-autoaugment-*.json")  # as in the Makefile


def benchmark_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """A row a figure that `benchmarks.benchmark` measured, case by case."""
    yield ["batch", "dtype", "devices", "figure", "median", "min", "max", "repeats"]
    for case in result["cases"]:
        for name, figure in case["figures"].items():
            what = [str(case["batch_size"]), case["dtype"], str(case["devices"]), name.replace("_", " ")]
            decimals = 0 if figure["median"] >= 1000 else 3
            spread = [f"{figure[which]:,.{decimals}f}" for which in ("median", "min", "max")]
            spread[0] += "" if figure["unit"] == "ratio" else f" {figure['unit']}"
            yield [*what, *spread, str(len(figure["repeats"]))]


def run_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The figures of a run of `reproduction.reproduce`."""
    yield ["seed", "steps", "test accuracy", "seconds", "after start-up", "images/s", "share of peak"]
    yield [
        str(result["seed"]),
        str(result["steps"]),
        f"{result['test_accuracy']:.2%}",
        f"{result['seconds']:.1f}",
        f"{result['seconds_after_startup']:.1f}",
        f"{result['images_per_second']:,.0f}",
        f"{result['share_of_peak']:.1%} of {result['peak_tflops']:g} TFLOP/s",
    ]


def resnet18_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The final model beside ResNet-18."""
    yield ["", "final", "ResNet-18", "final has less by"]
    for name, decimals in (("num_params", 0), ("train_flops_per_image", 0), ("seconds_per_epoch", 3)):
        pair = [f"{result[which][name]:,.{decimals}f}" for which in ("final", "resnet18")]
        yield [name.replace("_", " "), *pair, f"{result['final_has_less_by'][name]:.1%}"]


def export_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The exports of a run as `benchmarks.exports` measured them: their sizes, and medians of their latencies."""
    cases, differences = result["cases"], result["differences"]
    yield [
        "",
        "MB",
        "differs by",
        *(cell for case in cases for cell in (f"batch {case['batch_size']}", "of PyTorch's")),
    ]
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


def table(result: dict[str, Any]) -> str:
    """The table of a result, and under it the machine and the code that it is of."""
    if "bytes" in result:
        rows, environment = list(export_rows(result)), result["environment"]
    elif "cases" in result:
        rows, environment = list(benchmark_rows(result)), result["environment"]
    elif "resnet18" in result:
        rows, environment = list(resnet18_rows(result)), result["benchmarks"]["final"]["environment"]
    else:
        rows, environment = list(run_rows(result)), result["environment"]
    rows.insert(1, ["---"] * len(rows[0]))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    machine = f"{environment['devices'][0]}, {environment['cpu_count']} CPU core{'s' * (environment['cpu_count'] > 1)}, jax {environment['versions']['jax']}"
    code = (environment["git"] or {"commit": "unknown"})["commit"][:9]
    return "\n".join([*lines, "", f"{machine}, commit {code}."])


def run_files() -> list[Path]:
    """The summaries of runs in results/."""
    return sorted(path for pattern in RUNS for path in (ROOT / "results").glob(pattern))


def groups() -> list[figures.Group]:
    """The runs in results/, by config."""
    return report.grouped([report.read_run(path) for path in run_files()])


def comparison_file() -> Path:
    """The comparison with ResNet-18 in results/: a GPU's, where there is one."""
    return sorted((ROOT / "results").glob("resnet18-*.json"))[-1]


def refreshed(document: str) -> str:
    """The document with each table as the results have it."""

    def block(found: re.Match[str]) -> str:
        if found[2] == "claims":
            text = claims.as_markdown(claims.table(groups(), json.loads(comparison_file().read_text())))
        else:
            text = table(json.loads((ROOT / found[2]).read_text()))
        return f"{found[1]}\n{text}\n<!-- end -->\n"

    return re.sub(r"(<!-- (claims|results/[\w-]+\.json) -->)\n(?:.*\n)*?<!-- end -->\n", block, document)


def figure_digest() -> str:
    """SHA-256 of the values in the README's figure, which its file carries."""
    values = [
        [
            group.name,
            split,
            [[column.tolist() for column in figures.rows(run, split, "accuracy")] for run in group.runs],
        ]
        for group in groups()
        for split in ("train", "validation", "test")
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def draw(path: Path) -> None:
    """Draw the README's figure as a PNG whose text "Source" is `figure_digest`."""
    figures.save(partial(figures.draw_accuracy, groups()), path, "light", "white", {"Source": figure_digest()})


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(refreshed(document.read_text()))
    draw(FIGURE)
