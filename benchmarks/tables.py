"""Write the tables of docs/PERFORMANCE.md from results/*.json: `python -m benchmarks.tables`.

A table stands between the lines `<!-- results/NAME.json -->` and `<!-- end -->`; a test holds it to its file.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"


def benchmark_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """A row a figure that `resnet_jax.benchmark` measured, case by case."""
    yield ["batch", "dtype", "devices", "figure", "median", "min", "max", "repeats"]
    for case in result["cases"]:
        for name, figure in case["figures"].items():
            what = [str(case["batch_size"]), case["dtype"], str(case["devices"]), name.replace("_", " ")]
            decimals = 0 if figure["median"] >= 1000 else 3
            spread = [f"{figure[which]:,.{decimals}f}" for which in ("median", "min", "max")]
            spread[0] += "" if figure["unit"] == "ratio" else f" {figure['unit']}"
            yield [*what, *spread, str(len(figure["repeats"]))]


def run_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The figures of a run of `benchmarks.reproduce`."""
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


def table(result: dict[str, Any]) -> str:
    """The table of a result, and under it the machine and the code that it is of."""
    if "cases" in result:
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


def refreshed(document: str) -> str:
    """The document with each table as its result has it."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{table(json.loads((ROOT / found[2]).read_text()))}\n<!-- end -->\n"

    return re.sub(r"(<!-- (results/[\w-]+\.json) -->)\n(?:.*\n)*?<!-- end -->\n", block, document)


if __name__ == "__main__":
    DOCUMENT.write_text(refreshed(DOCUMENT.read_text()))
