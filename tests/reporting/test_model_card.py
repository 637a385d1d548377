import json
import re
import shutil

import numpy as np
import pytest
import yaml
from helpers import make_tiny_config, mistake_of_tool, tool

from resnet_jax import train_state
from resnet_jax.errors import UserError
from resnet_jax.inference import trained_model
from resnet_jax.reporting import evaluation, model_card


@pytest.fixture(scope="module")
def evaluated(run, cache_dir):
    """The run, evaluated, with a temperature."""
    evaluation.run(make_tiny_config(cache_dir), run, "best", fit_temperature=True)
    return run


@pytest.fixture
def changed(evaluated):
    """Changes a value of a file of the run, until the test ends."""
    before = {name: (evaluated / name).read_text() for name in ("result.json", "eval.json")}

    def change(name, change_it):
        value = json.loads(before[name])
        change_it(value)
        (evaluated / name).write_text(json.dumps(value))
        return evaluated

    yield change
    for name, text in before.items():
        (evaluated / name).write_text(text)


def rows(text, beginning):
    """The cells of a table's rows that begin so."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {beginning}")]


def test_it_says_what_the_run_wrote(evaluated, capsys):
    path = evaluated / "MODEL_CARD.md"
    path.unlink(missing_ok=True)
    tool("card", evaluated)
    assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text()
    result, evaluation = (json.loads((evaluated / f"{name}.json").read_text()) for name in ("result", "eval"))
    test = evaluation["test"]
    assert rows(text, "test |") == [
        [
            "test",
            f"{result['test_accuracy']:.2%}",
            f"{result['test_loss']:.4f}",
            f"{test['calibration']['expected_calibration_error']:.2%}",
        ]
    ]
    calibrated = test["calibrated"]
    error = calibrated["calibration"]["expected_calibration_error"]
    (at,) = rows(text, "test, at temperature")
    assert at == [
        f"test, at temperature {calibrated['temperature']:.3g}",
        f"{test['accuracy']:.2%}",
        f"{calibrated['loss']:.4f}",
        f"{error:.2%}",
    ]
    assert rows(text, "validation |")[0][1] == f"{result['validation_accuracy']:.2%}"
    assert f"{result['num_params']:,} parameters" in text
    for digest in (result["state_digest"], result["dataset"]["fingerprint"]):
        assert f"`{digest}`" in text
    (field,) = rows(text, "`optim.learning_rate`")
    assert field[1] == f"`{result['config']['optim']['learning_rate']}`"
    weights = trained_model.load(evaluated).variables
    assert f"`{train_state.digest(weights)}`" in text
    assert "{{" not in text
    assert "\n\n\n" not in text


def test_every_class_is_in_it_the_worst_last(evaluated):
    test = json.loads((evaluated / "eval.json").read_text())["test"]
    classes = model_card.by_class(test)
    assert sorted(of["name"] for of in classes) == [str(i) for i in range(10)]
    accuracies = [of["accuracy"] for of in classes]
    assert accuracies == sorted(accuracies, reverse=True)
    for of in classes:
        row = np.array(test["confusion"][int(of["name"])])
        assert of["accuracy"] == test["accuracy_per_class"][of["name"]]
        row[int(of["name"])] = 0
        assert of["confused"] * of["count"] == pytest.approx(row.max())
        assert of["confused_with"] == (str(row.argmax()) if row.any() else None)
    text = model_card.card(evaluated)
    table = [cells for cells in rows(text, "") if len(cells) == 4 and cells[0].isdecimal()]
    assert [cells[0] for cells in table] == [of["name"] for of in classes]


def test_classes_that_nothing_is_known_of_are_shown():
    test = {"accuracy_per_class": {"a": 1.0, "b": None, "c": 0.5}, "confusion": [[3, 0, 0], [0, 0, 0], [1, 1, 2]]}
    assert model_card.by_class(test) == [
        {"name": "a", "count": 3, "accuracy": 1.0, "confused_with": None, "confused": 0.0},
        {"name": "c", "count": 4, "accuracy": 0.5, "confused_with": "a", "confused": 0.25},
        {"name": "b", "count": 0, "accuracy": None, "confused_with": None, "confused": 0.0},
    ]
    one = {"accuracy_per_class": {"only": 1.0}, "confusion": [[7]]}
    assert model_card.by_class(one)[0]["confused_with"] is None


def test_the_head_is_yaml_that_a_hub_reads(evaluated):
    head = yaml.safe_load(model_card.card(evaluated).split("---\n")[1])
    (of_model,) = head["model-index"]
    (measured,) = of_model["results"]
    assert measured["metrics"] == [
        {"type": "accuracy", "value": json.loads((evaluated / "result.json").read_text())["test_accuracy"]}
    ]
    assert head["datasets"] == ["digits"]


def test_the_snippet_runs(evaluated, monkeypatch):
    code = re.search(r"```python\n(.*?)```", model_card.card(evaluated), re.DOTALL)[1]
    monkeypatch.chdir(evaluated.parent)
    names = {"images": np.zeros((2, 8, 8, 3), np.uint8)}
    exec(code, names)
    assert len(names["predictions"].names) == 2


def test_folders_of_the_data_are_not_published_and_names_are_shown_as_text(changed):
    def of_folder(value):
        value["config"]["data"]["name"] = "folder:/home/someone/birds|1"

    run = changed("result.json", of_folder)

    def renamed(value):
        test = value["test"]
        test["accuracy_per_class"] = {f"<b>|{name}": share for name, share in test["accuracy_per_class"].items()}

    changed("eval.json", renamed)
    text = model_card.card(run)
    assert "someone" not in text
    assert "trained on folder:birds\\|1." in text
    assert "\\<b\\>\\|3" in text
    assert rows(text, "`data.name`") == [["`data.name`", '`"folder:birds\\|1"`']]
    assert "datasets" not in yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("name", "shown"),
    [("found_cpu", "found_cpu"), ("__init__", r"\_\_init\_\_"), ("a~~b~~ &lt;", r"a\~\~b\~\~ \&lt;"), ("a\n b", "a b")],
)
def test_markdown_shows_names_as_they_are(name, shown):
    assert model_card._escaped(name) == shown


def test_a_temperature_is_named_while_load_applies_it(evaluated, tmp_path):
    kept = evaluated / "temperature.json"
    assert f"before the temperature of {trained_model.load(evaluated).temperatures[1]:.3g}" in model_card.card(
        evaluated
    )
    kept.rename(tmp_path / "kept")
    assert "before the temperature" not in model_card.card(evaluated)
    (tmp_path / "kept").rename(kept)


def test_what_is_there_is_not_written_over(evaluated, capsys):
    for path in (evaluated / "result.json", evaluated):
        before = (evaluated / "result.json").read_text()
        with pytest.raises(SystemExit) as stop:
            tool("card", evaluated, f"--output={path}")
        assert stop.value.code == 2
        assert "exists and is not overwritten: move it away, or give another --output" in capsys.readouterr().err
        assert (evaluated / "result.json").read_text() == before


def test_data_that_have_moved_since_are_the_same_data(changed, evaluated):
    before = model_card.card(evaluated)
    run = changed("eval.json", lambda value: value["dataset"].update(name="folder:elsewhere"))
    assert model_card.card(run) == before


def test_a_run_without_validation_says_so(changed):
    def plain(value):
        del value["validation"], value["test"]["calibrated"]

    run = changed("eval.json", plain)
    changed("result.json", lambda value: value.update(validation_accuracy=None))
    text = model_card.card(run)
    assert ": the last." in text
    assert "at temperature" not in text
    assert rows(text, "validation |") == []


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "eval.json",
            lambda value: value.update(checkpoint_step=7),
            "eval.json and result.json differ in the checkpoint step",
        ),
        (
            "eval.json",
            lambda value: value["dataset"].update(fingerprint="0"),
            "eval.json and result.json differ in the dataset",
        ),
        (
            "eval.json",
            lambda value: value.update(dataset=None),
            "eval.json and result.json differ in the dataset",
        ),
        ("eval.json", lambda value: value["test"].pop("confusion"), "result.json or eval.json is corrupt"),
        ("eval.json", lambda value: value["test"].update(confusion=[["a"]]), "result.json or eval.json is corrupt"),
        ("eval.json", lambda value: value["test"].update(confusion=[[1] * 10] * 10), "does not match the accuracy"),
        ("eval.json", lambda value: value["test"].update(accuracy=float("inf")), "result.json or eval.json is corrupt"),
        ("eval.json", lambda value: value["test"]["confusion"][0].append(1), "result.json or eval.json is corrupt"),
        ("eval.json", lambda value: value.update(views=2), "eval.json and result.json differ in the views"),
        ("result.json", lambda value: value.pop("checkpoint_step"), "it lacks checkpoint_step"),
        ("result.json", lambda value: value["environment"].update(devices=[]), "result.json or eval.json is corrupt"),
        ("eval.json", lambda value: value.pop("test"), r"it lacks test\): evaluate the run again"),
        ("result.json", lambda value: value.pop("seconds"), "it lacks seconds"),
        ("result.json", lambda value: value.pop("state_digest"), "it lacks state_digest"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(changed, file, change, words):
    with pytest.raises(UserError, match=words):
        model_card.card(changed(file, change))


def test_a_run_that_is_not_complete_or_not_evaluated_is_refused(evaluated, tmp_path, capsys):
    for name, words in (
        (None, "is not a complete run"),
        ("result.json", "was not evaluated: run python -m resnet_jax eval"),
    ):
        if name:
            shutil.copy(evaluated / name, tmp_path)
        line = mistake_of_tool(capsys, "card", tmp_path)
        assert words in line
    assert not (tmp_path / "MODEL_CARD.md").exists()


def test_the_checkpoint_it_names_is_the_one_that_is_loaded(evaluated):
    text = model_card.card(evaluated)
    assert f"Checkpoint of step {trained_model.load(evaluated).step:,} of" in text
