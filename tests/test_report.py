import json

import pytest
from PIL import Image

from resnet_jax import report

ROWS = [
    {"step": 10, "epoch": 0.5, "split": "train", "loss": 2.0, "accuracy": 0.3, "learning_rate": 0.01},
    {"step": 20, "epoch": 1.0, "split": "train", "loss": 1.0, "accuracy": 0.6, "learning_rate": 0.005},
    {"step": 20, "epoch": 1.0, "split": "validation", "loss": 1.1, "accuracy": 0.5},
    {"step": 20, "epoch": 1.0, "split": "test", "loss": 1.2, "accuracy": 0.4},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_the_curves_go_to_the_runs_report(run, capsys):
    report.main([str(run)])
    path = run / "report" / "curves.png"
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as image:
        assert image.size == (1210, 352)
        assert len(image.convert("RGB").getcolors(2**20)) > 50  # something is drawn


def test_the_curves_hold_the_rows_figures(run):
    svg = run / "curves.svg"
    report.draw_curves(report.read_rows(run), svg)
    report.draw_curves([row | {"accuracy": 0.25} for row in ROWS], run / "other.svg")
    assert svg.read_text() != (run / "other.svg").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", "is empty: train first"),
        ('{"step": 1', "is empty"),  # half a line is what a kill leaves
        ('{"epoch": "x", "split": "train"}\n', "a figure is no number"),
        ("{}\n", "lacks epoch"),
        ("[1]\n", "cannot be read"),
    ],
)
def test_a_folder_without_rows_is_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("output", ["nowhere/deeper/curves.png", "curves.nosuchformat"])
def test_an_output_that_cannot_be_written_is_one_line(run, capsys, output):
    with pytest.raises(SystemExit) as stop:
        report.main([str(run), "--output", str(run / output)])
    assert stop.value.code == 2
    assert "--output" in capsys.readouterr().err
