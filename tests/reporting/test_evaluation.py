import dataclasses
import json
import sys

import numpy as np
import pytest
import scipy
from PIL import Image
from sklearn import metrics

from resnet_jax import steps, training
from resnet_jax.errors import UserError
from resnet_jax.evaluate import Evaluation
from resnet_jax.inference import calibration, trained_model
from resnet_jax.inference.restore import restore_run
from resnet_jax.reporting import evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder and its result."""
    directory = tmp_path_factory.mktemp("run")
    return directory, {}


@pytest.fixture
def finished(run, tiny_config):
    directory, result = run
    if not result:
        result.update(dataclasses.asdict(training.train(tiny_config, directory)))
    return directory, result, tiny_config


def test_evaluation_gives_the_very_figures_that_training_recorded(finished, capsys):
    directory, result, config = finished
    report = evaluation.run(config, directory, "best")
    assert report["checkpoint_step"] == result["checkpoint_step"]
    assert report["test"]["accuracy"] == result["test_accuracy"]
    assert report["test"]["loss"] == result["test_loss"]
    assert report["validation"]["accuracy"] == result["validation_accuracy"]
    assert json.loads((directory / "eval.json").read_text()) == report
    out = capsys.readouterr().out
    assert f"accuracy {result['test_accuracy']:.2%}" in out
    assert out.count("%  ") >= 10  # a line a class


def test_the_confusion_matrix_holds_every_image_and_gives_the_accuracies(finished):
    directory, _, config = finished
    test = evaluation.run(config, directory, "latest")["test"]
    confusion = np.array(test["confusion"])
    assert confusion.sum() == 359
    assert np.trace(confusion) / 359 == test["accuracy"]
    for name, row in zip(map(str, range(10)), confusion, strict=True):
        assert test["accuracy_per_class"][name] == row[int(name)] / row.sum()


def test_balanced_accuracy_and_macro_f1_are_those_of_scikit_learn():
    """Of classes of different sizes, one of which is never predicted, and one of which has no image."""
    labels = np.repeat([0, 1, 2], [40, 9, 3])
    rng = np.random.default_rng(0)
    predictions = np.where(rng.random(52) < 0.6, labels, rng.integers(0, 2, 52))
    predictions[labels == 2] = 0
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    logits = np.eye(4, dtype=np.float32)[predictions]
    described = evaluation._describe(
        Evaluation(1.0, float((labels == predictions).mean()), confusion, logits), labels, tuple("abcd"), None
    )
    assert described["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predictions))
    assert described["macro_f1"] == pytest.approx(metrics.f1_score(labels, predictions, average="macro"))
    assert described["balanced_accuracy"] < described["accuracy"]
    accuracies = described["accuracy_per_class"]
    assert accuracies["d"] is None  # it has no image
    assert np.mean([accuracies[name] for name in "abc"]) == pytest.approx(described["balanced_accuracy"])
    report = {"checkpoint": "best", "checkpoint_step": 1, "views": 1, "test": described}
    assert evaluation._as_text(report, tuple("abcd")).splitlines()[-1].split() == ["d", "-", "0", "0", "0", "0"]
    described["accuracy_per_class"]["\x1b[31m"] = accuracies["d"]
    assert evaluation._as_text(report, ("a", "b", "c", "\x1b[31m")).splitlines()[-1].split()[0] == r"\x1b[31m"


def test_a_step_is_chosen_by_number(finished):
    directory, _, config = finished
    assert evaluation.run(config, directory, "41")["checkpoint_step"] == 41
    with pytest.raises(UserError, match="no checkpoint of step 40: choose one of 21, 41"):
        evaluation.run(config, directory, "40")


@pytest.mark.parametrize("eval_batch_size", [1, 100, 359, 1000])
def test_the_accuracy_does_not_depend_on_the_batch(finished, eval_batch_size):
    directory, result, config = finished
    config.eval_batch_size = eval_batch_size
    report = evaluation.run(config, directory, "best")
    assert report["test"]["accuracy"] == result["test_accuracy"]
    assert report["test"]["loss"] == pytest.approx(result["test_loss"], rel=1e-5)  # float32 sums in another order


def test_a_run_of_another_config_and_a_folder_without_a_run_are_refused(finished, tmp_path):
    directory, _, config = finished
    config.model.channel_list = (8, 32)
    with pytest.raises(UserError, match=r"model.channel_list: \[8, 16\] -> \[8, 32\]"):
        evaluation.run(config, directory, "best")
    with pytest.raises(UserError, match="holds no run"):
        evaluation.run(config, tmp_path, "best")
    assert list(tmp_path.iterdir()) == []


def test_two_views_average_logits_with_those_of_the_mirrors(finished, capsys):
    directory, _, config = finished
    (directory / "eval.json").write_text("of one view")
    report = evaluation.run(config, directory, "best", views=2)
    printed = capsys.readouterr()
    assert "each image and its mirror averaged" in printed.out
    assert "warning: --views=2 mirrors images, but the run was trained without mirrored ones\n" in printed.err
    assert json.loads((directory / "eval-2-views.json").read_text()) == report
    assert (directory / "eval.json").read_text() == "of one view"
    setup, state, _ = restore_run(config, directory, "best")
    test = setup.dataset.test
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    views = [steps.normalize(images, config.data) for images in (test.images, test.images[:, :, ::-1])]
    logits = np.mean([state.apply_fn(variables, view, train=False) for view in views], axis=0)
    assert report["test"]["accuracy"] == (logits.argmax(axis=1) == test.labels).mean()
    losses = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(logits)), test.labels]
    assert report["test"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_six_views_have_files_of_their_own(finished, capsys):
    directory, _, config = finished
    report = evaluation.run(config, directory, "best", views=6)
    assert "six views of each image averaged" in capsys.readouterr().out
    assert json.loads((directory / "eval-6-views.json").read_text()) == report
    assert report["views"] == 6
    assert (directory / "reliability-6-views.png").exists()


def test_two_views_do_not_warn_where_training_mirrored(finished, tmp_path, monkeypatch, capsys):
    config = finished[2]
    config.augment.flip_probability = 0.5
    monkeypatch.setattr(evaluation, "restore_run", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        evaluation.run(config, tmp_path, "best", views=2)
    assert capsys.readouterr().err == ""


def test_a_temperature_is_fitted_on_validation_kept_and_used(finished, capsys):
    directory, _, config = finished
    report = evaluation.run(config, directory, "best", fit_temperature=True)
    assert f"at temperature {report['test']['calibrated']['temperature']:.3f}" in capsys.readouterr().out
    validation = report["validation"]
    assert validation["calibrated"]["loss"] < validation["loss"]
    flipped = evaluation.run(config, directory, "best", views=2, fit_temperature=True)
    model = trained_model.load(directory)
    temperatures = [r["test"]["calibrated"]["temperature"] for r in (report, flipped)]
    assert model.temperatures == dict(zip((1, 2), temperatures, strict=True))
    assert 1.0 not in temperatures
    setup, _, _ = restore_run(config, directory, "best")
    test = setup.dataset.test
    for views, of in ((1, report), (2, flipped)):
        probabilities = model.predict(test.images, views=views).probabilities
        losses = -np.log(probabilities[np.arange(len(test.labels)), test.labels])
        assert losses.mean() == pytest.approx(of["test"]["calibrated"]["loss"], rel=1e-4)
    with Image.open(directory / "reliability.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 50  # something is drawn
    others = [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()]
    others.remove(model.step)
    assert [trained_model.load(directory, step).temperatures for step in others] == [{}] * len(
        others
    )  # they are of one alone


def test_without_a_validation_split_no_temperature_is_fitted(tiny_config, tmp_path):
    tiny_config.data.validation_ratio, tiny_config.num_epochs, tiny_config.schedule.warmup_epochs = 0.0, 0.1, 0.0
    training.train(tiny_config, tmp_path)
    with pytest.raises(UserError, match="--fit-temperature needs a validation split, and the run has none"):
        evaluation.run(tiny_config, tmp_path, "best", fit_temperature=True)


TEMPERATURES = ('{"plain": "warm"}', '{"plain": "9"}', '{"Plain": 9.0}', "[]", '{"plain": 1' + 400 * "0" + "}")


@pytest.mark.parametrize(
    "content", ["{", "{}", *(f'{{"checkpoint_step": 41, "temperature": {of}}}' for of in TEMPERATURES)]
)
def test_a_damaged_temperature_is_refused(tmp_path, content):
    (tmp_path / "temperature.json").write_text(content)
    with pytest.raises(UserError, match="fit the temperature again, or remove"):
        calibration.temperatures(tmp_path, 41)
