"""The weights that ship with the code are the ones that were measured, and every tool finds them by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from configs import final
from resnet_jax import load, train_state
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference import export, predict

MEASURED = json.loads((ROOT / "results" / "weights-final-cifar10.json").read_text())


@pytest.fixture(scope="module")
def model():
    return load("final-cifar10")


def test_they_are_the_reports_network_and_the_measured_weights(model):
    assert train_state.num_params(model.variables["params"]) == 4_918_602
    assert train_state.digest(model.variables) == MEASURED["digest"]
    assert model.config.model.dtype == "float32"
    assert model.class_names[:4] == ("airplane", "automobile", "bird", "cat")


def test_rounding_cost_no_accuracy():
    for name in ("accuracy", "accuracy_flip"):
        assert MEASURED["float16"][name] == pytest.approx(MEASURED["float32"][name], abs=2e-4)  # two images of 10,000


def test_the_first_500_test_images(model):
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("needs CIFAR-10: set TFDS_DATA_DIR")
    images, labels = datasets.load(final.get_config().data).test
    right = int((model.predict(images[:500]).labels == labels[:500]).sum())
    assert abs(right - 465) <= 1  # another processor may round one borderline image to the other side


def test_the_card_beside_them_says_what_was_measured():
    card = (ROOT / "weights" / "final-cifar10.md").read_text()
    assert 'load("final-cifar10")  # ships with resnet_jax' in card
    assert "93.43%" in card


def test_a_picture_in_and_a_class_out(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)).save(picture)
    monkeypatch.chdir(tmp_path)
    predict.main(["final-cifar10", str(picture), "--top=10"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("airplane", "truck"))


def test_an_export_of_them_is_written_to_the_current_folder(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    export.main(["final-cifar10", "--format=safetensors", "--float16"])
    written = Path("final-cifar10.safetensors")
    assert train_state.digest(load(written).variables) == MEASURED["digest"]
    assert written.stat().st_size < 10e6


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("final-cifar10").mkdir()
    with pytest.raises(UserError, match="final-cifar10 holds no run with checkpoints"):
        load("final-cifar10")


def test_another_name_is_answered_with_the_names_that_there_are():
    with pytest.raises(UserError, match=r"final-cifar100 holds no run .* or final-cifar10$"):
        load("final-cifar100")


def test_a_file_is_loaded_without_what_only_a_run_needs():
    """Orbax and SciPy take a second to import."""
    code = (
        "import sys, numpy as np; from resnet_jax import load\n"
        "load('final-cifar10').predict(np.zeros((1, 32, 32, 3), np.uint8))\n"
        "print([name for name in ('orbax', 'scipy', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
