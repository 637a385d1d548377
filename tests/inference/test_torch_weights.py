import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import ROOT, launch_here, mistake_of_tool, tool

from resnet_jax import models
from resnet_jax.errors import UserError
from resnet_jax.inference import torch_weights

SMOKE = f"--config={ROOT}/configs/final.py:smoke"


def random_variables(model, seed=0):
    """Variables without structure, so that no two arrays, and no array and its transpose, are alike."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def model():
    return models.ResNet(10, (4, 8), (1, 2))


@pytest.fixture
def weights(model):
    return torch_weights.to_torch(random_variables(model), step=7)


def test_the_names_and_shapes_are_those_of_the_reports_own_model(weights):
    norm = {"weight": (4,), "bias": (4,), "running_mean": (4,), "running_var": (4,), "num_batches_tracked": ()}
    first = {name: weights[name].shape for name in weights if name.startswith(("conv1", "bn1", "layer1"))}
    assert first == {
        "conv1.weight": (4, 3, 3, 3),
        "layer1.0.conv1.weight": (4, 4, 3, 3),
        "layer1.0.conv2.weight": (4, 4, 3, 3),
        **{f"{module}.{name}": s for module in ("bn1", "layer1.0.bn1", "layer1.0.bn2") for name, s in norm.items()},
    }
    assert weights["layer2.0.shortcut.0.weight"].shape == (8, 4, 1, 1)
    assert weights["layer2.0.shortcut.1.running_var"].shape == (8,)
    assert weights["fc.weight"].shape == (10, 8)
    assert weights["fc.bias"].shape == (10,)
    assert weights["bn1.num_batches_tracked"] == 7


def test_bottleneck_blocks_have_three_of_each():
    names = torch_weights.to_torch(random_variables(models.ResNet(10, (4,), (1,), models.BottleneckBlock)), 0)
    assert {"layer1.0.conv3.weight", "layer1.0.bn3.running_mean", "layer1.0.shortcut.0.weight"} <= names.keys()


def test_what_is_before_a_max_pool_has_names_too():
    names = torch_weights.to_torch(random_variables(models.ResNet(10, (4, 8), (0, 1), downsample="pool")), 0)
    assert names["down2.0.weight"].shape == (8, 4, 3, 3)
    assert names["down2.1.running_var"].shape == (8,)
    assert "layer2.0.shortcut.0.weight" not in names


def test_back_and_forth_is_the_same_to_the_bit(model, weights):
    variables = random_variables(model)
    back = torch_weights.from_torch(weights, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert torch_weights.to_torch(back, 7).keys() == weights.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapper_is_dropped_and_counters_may_be_missing(model, weights, prefix):
    wrapped = {prefix + name: array for name, array in weights.items() if "tracked" not in name}
    variables = random_variables(model)
    jax.tree.map(np.testing.assert_array_equal, torch_weights.from_torch(wrapped, variables), variables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.bias"), "missing: fc.bias"),
        (lambda w: w.update(extra=np.zeros(1, np.float32)), "unknown: extra"),
        (lambda w: w.update({"fc.weight": w["fc.weight"].T}), r"fc.weight \[8, 10\] instead of \[10, 8\]"),
        (lambda w: w.update({"fc.bias": np.full(10, np.nan, np.float32)}), "not finite .*: fc.bias"),
        (lambda w: w.update({"fc.bias": np.zeros(10, np.int64)}), "not finite .*: fc.bias"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("layer")], "missing: layer1.* and 25 more"),
    ],
    ids=["missing", "unexpected", "transposed", "nan", "integers", "many"],
)
def test_what_does_not_fit_is_named(model, weights, change, message):
    change(weights)
    with pytest.raises(UserError, match=message):
        torch_weights.from_torch(weights, random_variables(model))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_holds_what_was_written(tmp_path, weights, suffix):
    path = tmp_path / f"weights{suffix}"
    torch_weights.write(path, weights)
    read = torch_weights.read(path)
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["absent", "folder", "text", "pickle", "half"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_none_is_one_line(tmp_path, weights, suffix, kind):
    path = tmp_path / f"weights{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no weights\n" * 100)
    elif kind == "pickle":
        np.savez(tmp_path / "object.npz", a=np.array([print], dtype=object))
        (tmp_path / "object.npz").rename(path)
    elif kind == "half":
        torch_weights.write(path, weights)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read") as caught:
        torch_weights.read(path)
    assert "\n" not in str(caught.value)


def test_a_run_goes_through_pytorchs_names_and_gives_the_same_evaluation(tmp_path, capfd):
    """Train, save, load into a new folder, evaluate both, train on from the loaded weights."""
    first, second, weights = tmp_path / "first", tmp_path / "second", tmp_path / "weights.safetensors"
    launch_here(SMOKE, f"--workdir={first}")
    tool("weights", "save", first, weights, "--checkpoint=latest")
    assert safetensors.numpy.load_file(weights)["bn1.num_batches_tracked"] == 11
    tool("weights", "load", weights, SMOKE, f"--workdir={second}")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "weights.safetensors"}
    reports = []
    for directory in (first, second):
        launch_here(SMOKE, f"--workdir={directory}", "--mode=eval", "--checkpoint=latest")
        reports.append(json.loads((directory / "eval.json").read_text()))
    assert [report["checkpoint_step"] for report in reports] == [11, 0]
    assert reports[0]["test"] == reports[1]["test"]
    again = tmp_path / "again.safetensors"
    tool("weights", "save", second, again)
    export = tmp_path / "first" / "model.safetensors"
    tool("export", first, "--format=safetensors")
    kept = export.read_bytes()
    assert "the weights would replace" in mistake_of_tool(capfd, "weights", "save", export, export)
    assert export.read_bytes() == kept
    before, after = safetensors.numpy.load_file(weights), safetensors.numpy.load_file(again)
    assert before.keys() == after.keys()
    for name in before:
        if "tracked" not in name:
            assert before[name].tobytes() == after[name].tobytes()
    assert "already exists" in mistake_of_tool(capfd, "weights", "load", weights, SMOKE, f"--workdir={second}")
    launch_here(SMOKE, f"--workdir={second}")
    results = [json.loads((directory / "result.json").read_text()) for directory in (first, second)]
    assert results[0]["initial_weights"] is None
    assert results[1]["initial_weights"]["file"] == weights.name
    assert results[0]["state_digest"] != results[1]["state_digest"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["load", "weights.npz", SMOKE], ["--workdir"]),
        (["load", "weights.npz", "--workdir={}/run"], ["--config is missing"]),
        (["load", SMOKE, "--workdir={}/run"], ["FILE"]),
        (["load", "weights.h5", SMOKE, "--workdir={}/run"], [".safetensors"]),
        (["load", "{}/absent.npz", SMOKE, "--workdir={}/run"], ["absent.npz", "cannot be read"]),
        (["load", "{}/other.npz", SMOKE, "--workdir={}/run"], ["does not fit config.model", "conv1.weight"]),
        (["save", "{}/run", "{}/absent/weights.npz"], ["folder that exists"]),
        (["save", "{}/run", "{}/weights.npz"], ["holds no run"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("load", "save") else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, words, weights):
    torch_weights.write(tmp_path / "other.npz", weights)
    line = mistake_of_tool(capsys, "weights", *(argument.format(tmp_path) for argument in arguments))
    assert all(word in line for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["other.npz"]


def test_pytorchs_own_files_need_it_installed_or_go_through_it(tmp_path, weights):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here: .pt files cannot be read")
    path = tmp_path / "weights.pt"
    torch_weights.write(path, weights)
    loaded = torch.load(path, weights_only=True)
    torch.save({"net": loaded, "epoch": 3}, tmp_path / "nested.pth")
    for file in (path, tmp_path / "nested.pth"):
        read = torch_weights.read(file)
        assert read.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(read[name], array)


def test_without_pytorch_its_files_are_refused(tmp_path, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs PyTorch"):
        torch_weights.write(tmp_path / "weights.pt", weights)
    assert not list(tmp_path.iterdir())
