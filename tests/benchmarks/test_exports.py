import contextlib
import json

import pytest
from helpers import ROOT

from benchmarks import exports, measure
from reproduction import tables
from resnet_jax import train_state
from resnet_jax.errors import UserError
from resnet_jax.inference import trained_model

pytest.importorskip("onnxruntime")
RUNNERS = ("load", "stablehlo", "onnx", "onnx_folded")


@contextlib.contextmanager
def pretended(config, num_classes, image_shape, python, mode):
    """A yardstick of 1,000 images a second."""
    assert (num_classes, image_shape, mode) == (10, (8, 8, 3), "predict")
    yield (lambda seconds: 1000.0), {"bytes": 123_000}


def test_each_export_is_measured_beside_the_yardstick(run, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "torch_step", pretended)
    output = tmp_path / "result.json"
    exports.main([str(run), "--seconds=0.01", "--repeats=3", f"--output={output}"])
    result = json.loads(output.read_text())
    assert [case["batch_size"] for case in result["cases"]] == [1, 128]
    for case in result["cases"]:
        figures = case["figures"]
        assert figures["torch"]["repeats"] == [case["batch_size"]] * 3  # ms at 1,000 images/s
        for name in RUNNERS:
            assert all(ms > 0 for ms in figures[name]["repeats"])
            ratios = [ms / case["batch_size"] for ms in figures[name]["repeats"]]
            assert figures[f"{name} / torch"]["repeats"] == pytest.approx(ratios)
    assert set(result["bytes"]) == {"stablehlo", "onnx", "onnx_folded", "safetensors", "torch"}
    num_params = train_state.num_params(trained_model.load(run).variables["params"])
    assert all(size > 4 * num_params for name, size in result["bytes"].items() if name != "torch")
    assert set(result["differences"]) == {"stablehlo", "onnx", "onnx_folded", "safetensors"}
    table = tables.table(result).splitlines()
    assert [row.split(" | ")[0] for row in table[2:8]] == [
        "| load", "| stablehlo", "| onnx", "| onnx, folded", "| torch", "| safetensors",
    ]  # fmt: skip
    assert " 0.12 " in table[6]


def test_a_python_without_pytorch_is_named(run, tmp_path):
    with pytest.raises(UserError, match="give the Python of an environment with PyTorch"):
        exports.main([str(run), "--torch-python=false", f"--output={tmp_path}/result.json"])
    assert not (tmp_path / "result.json").exists()


def test_the_results_are_of_the_networks_that_the_document_says():
    result = json.loads((ROOT / "results" / "exports-final-cpu.json").read_text())
    assert [case["num_params"] for case in result["cases"]] == [4_918_602] * 2
    assert max(result["differences"].values()) < 1e-5
