import json
import re

import pytest
from conftest import ROOT

from benchmarks import tables

README = (ROOT / "README.md").read_text()


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def against_torch(result):
    return "train step {train_step[median]:,.0f} images/s, {train_step / torch_train_step[median]:.2f} of PyTorch's".format(
        **result["cases"][0]["figures"]
    )


CELLS = {
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
        for path in (ROOT / "tests").glob("test_*.py")
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


def test_the_tables_of_performance_are_those_that_their_files_make():
    document = tables.DOCUMENT.read_text()
    assert tables.refreshed(document) == document, "run python -m benchmarks.tables"
    shown = set(re.findall(r"results/([\w-]+\.json)", document))
    assert shown
    assert all(f"<!-- results/{name} -->" in document for name in shown)
