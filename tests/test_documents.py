import json
import re
import subprocess

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from reproduction import tables
from resnet_jax.reporting import statistics
from resnet_jax.search import space

README = (ROOT / "README.md").read_text()


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def against_torch(result):
    return "train step {train_step[median]:,.0f} images/s, {train_step / torch_train_step[median]:.2f} of PyTorch's".format(
        **result["cases"][0]["figures"]
    )


def confirmed(result):
    best = next(entry for entry in result["confirmed"] if entry["best"])
    own = next(entry for entry in result["confirmed"] if entry["own"])
    spread = [statistics.mean_and_spread([*entry["accuracies"].values()]) for entry in (best, own)]
    ahead = {name: 100 * value for name, value in own["behind"].items() if name in ("mean", "low", "high")}
    return (
        f"{space.name(best['fields'])}: {spread[0]} validation accuracy; the report's {space.name(own['fields'])}: {spread[1]}, "
        f"{ahead['mean']:.2f} points behind ({ahead['low']:.2f} to {ahead['high']:.2f}, 95 %), {own['behind']['verdict']}; "
        f"{result['share_outside_training']:.1%} of the workers' time outside the trials' runs, {result['seconds'] / 60:.0f} minutes in all"
    )


def flipped(_):
    """Means over the three seeds."""

    def mean(suffix, *keys):
        found = []
        for seed in (1, 2, 3):
            value = result(f"eval-found-{seed}{suffix}.json")["test"]
            for key in keys:
                value = value[key]
            found.append(value)
        return np.mean(found)

    error = ("calibration", "expected_calibration_error")
    return (
        f"test accuracy {mean('', 'accuracy'):.2%}, with `--flip` {mean('-flip', 'accuracy'):.2%}; expected calibration error "
        f"{mean('', *error):.2%}, at the fitted temperature {mean('', 'calibrated', *error):.2%}"
    )


CELLS = {
    "eval-found-1.json": flipped,
    "search-cpu.json": confirmed,
    "quickstart-cpu.json": lambda r: f"{r['test_accuracy']:.2%} test accuracy in {r['seconds']:.0f} s",
    "final-321-steps-cpu.json": lambda r: (
        f"{r['test_accuracy']:.2%} test accuracy after {r['steps']} steps in {r['seconds']:.0f} s"
    ),
    "benchmark-final-cpu.json": lambda r: (
        f"{against_torch(r)}; pipeline alone {r['cases'][0]['figures']['pipeline']['median']:,.0f} images/s"
    ),
    "benchmark-final-cpu-tcmalloc.json": lambda r: against_torch(r),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_figure_is_the_one_that_a_run_wrote(name):
    (row,) = [line for line in README.splitlines() if line.startswith("|") and f"results/{name}" in line]
    assert f"| {CELLS[name](result(name))} |" in row


def test_every_result_named_in_the_readme_is_held_to_its_file():
    named = set(re.findall(r"results/([\w-]+\.json)", README))
    assert named == set(CELLS)


def test_the_quickstart_has_the_parameters_that_the_readme_says():
    assert f"{result('quickstart-cpu.json')['num_params']:,} parameters" in README


def test_every_file_that_the_readme_points_at_is_there():
    paths = re.findall(r"(?:`|\()((?:resnet_jax|configs|results|docs|examples)/[\w/.-]+\.\w+|LICENSE)", README)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_every_promise_of_reliability_names_tests_that_are_there_and_every_slow_test_is_named():
    tests = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    rows = [line for line in (ROOT / "docs" / "RELIABILITY.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 20
    for row in promises:
        _, cell, command = row.strip("| ").split(" | ")
        named = set(re.findall(r"`(test_\w+)`", cell))
        assert named, row
        assert named <= set.union(*tests.values()), row
        assert ("make test-slow" in command) == (named <= tests["test_reliability.py"]), row
    assert tests["test_reliability.py"] <= set(re.findall(r"`(test_\w+)`", "".join(promises)))


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.stem)
def test_the_tables_are_those_that_the_results_make(path):
    document = path.read_text()
    assert tables.refreshed(document) == document, "run python -m reproduction.tables"
    assert document.count("<!-- end -->") == len(re.findall(r"<!-- (claims|results/[\w-]+\.json) -->", document)) > 0


def test_every_result_named_in_performance_has_its_table():
    document = tables.DOCUMENTS[1].read_text()
    shown = set(re.findall(r"results/([\w-]+\.json)", document))
    assert shown
    assert all(f"<!-- results/{name} -->" in document for name in shown)


def test_the_figure_is_drawn_from_the_results():
    assert f"({tables.FIGURE.relative_to(ROOT)})" in README
    with Image.open(tables.FIGURE) as image:
        assert image.text["Source"] == tables.figure_digest(), "run python -m reproduction.tables"


def test_the_figure_is_out_of_date_once_a_result_changes(monkeypatch):
    before, groups = tables.figure_digest(), tables.groups()
    next(row for row in groups[0].runs[0]["metrics"] if row["split"] == "validation")["accuracy"] += 1e-6
    monkeypatch.setattr(tables, "groups", lambda: groups)
    assert tables.figure_digest() != before


def test_make_report_shows_the_runs_of_the_claims_table():
    printed = subprocess.run(["make", "-n", "report"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {str(path.relative_to(ROOT)) for path in [*tables.run_files(), tables.comparison_file()]}
    assert set(re.findall(r"results/[\w-]+\.json", printed)) == wanted
