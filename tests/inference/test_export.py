import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import make_state, make_tiny_config, mistake_of_tool, start, tool
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from resnet_jax import train_state
from resnet_jax.config import replaced
from resnet_jax.errors import UserError
from resnet_jax.inference import export, trained_model

FORMATS = ("stablehlo", "onnx", "safetensors")


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """Format -> file, as the command line writes it."""
    pytest.importorskip("onnxruntime")
    for kind in FORMATS:
        tool("export", run, "--format", kind)
    return {kind: run / f"model.{kind}" for kind in FORMATS}


def random_model(cache_dir, **of_model):
    """A network of other structure, with batch statistics as if it were trained."""
    config = make_tiny_config(cache_dir)
    for name, value in of_model.items():
        config.model[name] = value
    shape = (16, 12, 3)
    state = make_state(config, 5, shape, 1.0, train_state.make_mesh(1))
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten({"params": state.params, "batch_stats": state.batch_stats})
    noise = [np.asarray(leaf) + rng.uniform(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    return trained_model.Model(config, tuple("abcde"), shape, jax.tree.unflatten(structure, noise), 7)


STRUCTURES = {
    "the report's, narrow": {"channel_list": (8, 16, 24, 32), "block_list": (3, 2, 1, 0)},
    "bottlenecks": {"channel_list": (4, 8), "block_list": (1, 2), "block": "bottleneck"},
    "imagenet's stem": {"channel_list": (8, 8), "block_list": (1, 1), "stem": "imagenet"},
    "max-pools": {
        "channel_list": (8, 12, 16),
        "block_list": (0, 1, 0),
        "downsample": "pool",
        "global_pool": "max",
        "logit_scale": 0.125,
        "activation": "gelu",
    },
    "max-pools first": {"channel_list": (8, 12), "block_list": (0, 1), "downsample": "pool_first"},
    "no blocks": {"channel_list": (8,), "block_list": (0,)},
    "a stride on one pixel": {"channel_list": (8,) * 6, "block_list": (1,) * 6},
}


@pytest.fixture(scope="module", params=STRUCTURES)
def model_of_structure(request, cache_dir):
    return random_model(cache_dir, **STRUCTURES[request.param])


@pytest.mark.parametrize("kind", [*FORMATS, "folded"])
def test_every_structure_is_exported_and_computes_the_same(model_of_structure, tmp_path, kind):
    pytest.importorskip("onnxruntime")
    model = model_of_structure
    settings = {"fold": True} if kind == "folded" else {}
    kind = "onnx" if kind == "folded" else kind
    difference = export.write(model, kind, tmp_path / f"model.{kind}", **settings)
    assert difference < 2e-5
    assert difference == 0 or kind != "safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{kind}"]


@pytest.mark.parametrize(("kind", "precision"), [("onnx", "highest"), ("stablehlo", None)])
def test_an_onnx_export_is_compared_with_float32_products(cache_dir, tmp_path, monkeypatch, kind, precision):
    """Without it, a GPU multiplies in TF32, and a TPU in bfloat16."""
    pytest.importorskip("onnxruntime")
    precisions = []
    difference = export.largest_difference

    def compare(*arguments):
        precisions.append(jax.config.jax_default_matmul_precision)
        return difference(*arguments)

    monkeypatch.setattr(export, "largest_difference", compare)
    export.write(random_model(cache_dir), kind, tmp_path / f"model.{kind}")
    assert precisions == [precision]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_holds_no_path_of_this_machine(cache_dir, tmp_path, kind):
    pytest.importorskip("onnxruntime")
    model = random_model(cache_dir)
    model.config.data.name = f"folder:{tmp_path}/cats"
    model.config.data.data_dir = model.config.init_from = str(tmp_path / "other")
    export.write(model, kind, tmp_path / f"model.{kind}")
    content = (tmp_path / f"model.{kind}").read_bytes()
    assert b"folder:cats" in content
    assert str(tmp_path).encode() not in content
    assert cache_dir.encode() not in content


@pytest.mark.parametrize("views", [2, 6])
@pytest.mark.parametrize("kind", ["stablehlo", "onnx", "folded"])
def test_a_program_averages_views_itself(cache_dir, tmp_path, kind, views):
    pytest.importorskip("onnxruntime")
    model = random_model(cache_dir)
    settings = {"views": views} | ({"fold": True} if kind == "folded" else {})
    kind = "onnx" if kind == "folded" else kind
    path = tmp_path / f"model.{kind}"
    assert export.write(model, kind, path, **settings) < 2e-5
    images = np.random.default_rng(0).integers(0, 256, (3, *model.image_shape), np.uint8)
    plain, averaged = model.logits(images), model.logits(images, views)
    assert np.abs(plain - averaged).max() > 1e-3 * np.abs(plain).max()
    if kind == "stablehlo":
        program = trained_model.load(path)
        np.testing.assert_allclose(program.logits(images), averaged, rtol=1e-4, atol=1e-4)
        with pytest.raises(UserError, match=f"this program averages {views} views itself: leave --views out"):
            program.predict(images, views=2)


def test_a_program_that_averages_views_has_their_temperature(run, tmp_path):
    step = trained_model.load(run).step
    temperatures = {"checkpoint_step": step, "temperature": {"plain": 1.5, "flip": 1.3, "moved": 1.2}}
    (run / "temperature.json").write_text(json.dumps(temperatures))
    tool("export", run, "--format=stablehlo", "--views=6", f"--output={tmp_path}/model.stablehlo")
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    expected = trained_model.load(run).predict(images, views=6).probabilities
    found = trained_model.load(tmp_path / "model.stablehlo").predict(images).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_folding_leaves_no_batch_norm(cache_dir, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = random_model(cache_dir)
    for fold in (False, True):
        export.write(model, "onnx", tmp_path / "model.onnx", fold=fold)
        operations = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert ("BatchNormalization" in operations) != fold


def test_folding_leaves_the_batch_norms_after_max_pools(cache_dir, tmp_path):
    onnx = pytest.importorskip("onnx")
    export.write(random_model(cache_dir, **STRUCTURES["max-pools first"]), "onnx", tmp_path / "model.onnx", fold=True)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    pooled = [node.output[0] for node in nodes if node.op_type == "MaxPool"]
    normalised = [node.input[0] for node in nodes if node.op_type == "BatchNormalization"]
    assert len(pooled) == 1
    assert normalised == pooled


def test_a_file_that_computes_something_else_is_not_written(cache_dir, tmp_path, monkeypatch):
    model = random_model(cache_dir)
    monkeypatch.setitem(export.WRITERS, "safetensors", lambda m, path: lambda images: m.logits(images) * 1.001)
    (tmp_path / "model.safetensors").write_text("an older one")
    with pytest.raises(
        RuntimeError, match=r"safetensors export differs by 1\.0e-03 of the largest logit: it was not written"
    ):
        export.write(model, "safetensors", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_text() == "an older one"


def test_what_it_says_of_a_file(run, capsys):
    tool("export", run, "--format", "safetensors", "--output", run / "other.safetensors")
    size = (run / "other.safetensors").stat().st_size / 1e6
    assert (
        capsys.readouterr().out
        == f"{run}/other.safetensors: {size:.2f} MB, differs from the network by at most 0.0e+00 of the largest logit\n"
    )


def test_safetensors_are_loaded_as_the_run_is(run, files):
    (run / "temperature.json").write_text(
        json.dumps(
            {"checkpoint_step": trained_model.load(run).step, "temperature": {"plain": 1.5, "flip": 1.3, "moved": 1.2}}
        )
    )
    tool("export", run, "--format", "safetensors")
    one, other = trained_model.load(run), trained_model.load(files["safetensors"])
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(one.predict(images).probabilities, other.predict(images).probabilities)
    assert one.temperatures == other.temperatures == {1: 1.5, 2: 1.3, 6: 1.2}
    for name in ("class_names", "image_shape", "step"):
        assert getattr(one, name) == getattr(other, name)
    assert replaced(one.config, {"data.cache_dir": ""}) == other.config  # a path of this machine


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_an_opset_has_only_the_operators_of_its_time(cache_dir, tmp_path, opset):
    """ONNX's checker refuses what an opset does not have, and the runtime runs each operator as its opset defines it."""
    onnx = pytest.importorskip("onnx")
    model = random_model(cache_dir, stem="imagenet")
    assert export.write(model, "onnx", tmp_path / "model.onnx", opset=opset, views=6) < 2e-5
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [entry.version for entry in graph.opset_import] == [opset]
    assert graph.ir_version == {13: 7, 17: 8, 21: 10}[opset]  # the oldest that may hold it


def test_float16_takes_half_the_bytes_and_is_read_as_float32(run, tmp_path, capsys):
    path = tmp_path / "half.safetensors"
    tool("export", run, "--format", "safetensors", "--float16", "--output", path)
    said = float(re.search(r"at most (\S+) of the largest logit", capsys.readouterr().out)[1])
    whole, half = trained_model.load(run), trained_model.load(path)
    assert 0 < said < 0.01  # the rounding is in the figure
    weights = [jax.tree.leaves(model.variables) for model in (whole, half)]
    for one, other in zip(*weights, strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(other, one.astype(np.float16).astype(np.float32) if one.ndim > 1 else one)
    kernels = sum(leaf.size for leaf in weights[0] if leaf.ndim > 1)
    with safe_open(path, "numpy") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  it is not a dict
    assert sum(array.nbytes for array in stored) == sum(leaf.nbytes for leaf in weights[0]) - 2 * kernels


def test_a_weight_that_float16_cannot_hold_is_refused(run, tmp_path):
    model = trained_model.load(run)
    model.variables["params"]["classifier"]["kernel"] = 7e4 * jnp.ones((16, 10))
    with pytest.raises(UserError, match="--float16: a weight is above 65,504"):
        export.write(model, "safetensors", tmp_path / "m.safetensors", float16=True)
    assert list(tmp_path.iterdir()) == []


def test_the_metadata_is_in_the_onnx_file_too(run, files):
    onnx = pytest.importorskip("onnx")
    found = {entry.key: json.loads(entry.value) for entry in onnx.load(files["onnx"]).metadata_props}
    assert found["class_names"] == list("0123456789")
    assert found["image_shape"] == [8, 8, 3]
    assert found["config"]["model"]["block_list"] == [1, 1]


ONNX_ALONE = """
import importlib.util, sys
import numpy as np
import onnxruntime
assert importlib.util.find_spec("resnet_jax") is None and importlib.util.find_spec("jax") is None
session = onnxruntime.InferenceSession(sys.argv[1])
np.save(sys.argv[3], session.run(["logits"], {"images": np.load(sys.argv[2])})[0])
"""


def test_onnx_runs_without_this_project(run, files, tmp_path):
    """In an environment of its own, which has ONNX's runtime from this one's packages and nothing else of them."""
    import onnxruntime

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    source = Path(onnxruntime.__file__).parent.parent
    for pattern in ("onnxruntime*", "numpy*", "flatbuffers*", "google", "protobuf*", "packaging*"):
        for path in source.glob(pattern):
            (packages / path.name).symlink_to(path)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    shutil.copy(files["onnx"], tmp_path / "model.onnx")
    command = [tmp_path / "venv/bin/python", "-I", "-c", ONNX_ALONE, "model.onnx", "images.npy", "logits.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), trained_model.load(run).logits(images), atol=1e-4)


def test_a_damaged_program_is_refused_before_it_is_read_as_one(files, tmp_path, monkeypatch):
    damaged = bytearray(files["stablehlo"].read_bytes())
    damaged[1000] ^= 1
    (path := tmp_path / "damaged.stablehlo").write_bytes(damaged)
    monkeypatch.setattr(trained_model.export, "deserialize", lambda _: pytest.fail("the program was read"))
    with pytest.raises(UserError, match="it is corrupt: its SHA-256 differs"):
        trained_model.load(path)


def test_an_export_does_not_replace_the_file_that_it_is_made_from(files, tmp_path, capsys):
    shutil.copy(files["safetensors"], tmp_path / "weights.safetensors")
    before = (tmp_path / "weights.safetensors").read_bytes()
    line = mistake_of_tool(capsys, "export", tmp_path / "weights.safetensors", "--format=safetensors", "--float16")
    assert f"the export would replace {tmp_path}/weights.safetensors: give another file with --output" in line
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_stablehlo_is_for_every_platform(files):
    program = jax.export.deserialize(bytearray(files["stablehlo"].read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [str(size) for size in program.in_avals[0].shape] == ["n", "8", "8", "3"]


# Loading what was exported


def test_stablehlo_is_loaded_as_the_run_is(run, files):
    (run / "temperature.json").write_text(
        json.dumps(
            {"checkpoint_step": trained_model.load(run).step, "temperature": {"plain": 1.5, "flip": 1.3, "moved": 1.2}}
        )
    )
    tool("export", run, "--format", "stablehlo")
    one, other = trained_model.load(run), trained_model.load(files["stablehlo"])
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    for views in (1, 2, 6):
        np.testing.assert_allclose(one.logits(images, views), other.logits(images, views), atol=1e-4)
    np.testing.assert_allclose(one.predict(images).probabilities, other.predict(images / 255).probabilities, atol=1e-5)
    assert one.temperatures == other.temperatures == {1: 1.5, 2: 1.3, 6: 1.2}
    for name in ("class_names", "image_shape", "step"):
        assert getattr(one, name) == getattr(other, name)
    assert replaced(one.config, {"data.cache_dir": ""}) == other.config  # a path of this machine


def test_a_program_without_weights_says_so(run, files, capsys):
    model = trained_model.load(files["stablehlo"])
    for use in (lambda: model.variables, lambda: model.saliency(np.zeros((8, 8, 3), np.uint8))):
        with pytest.raises(UserError, match=r"holds a program without weights: give the run's workdir"):
            use()
    with pytest.raises(SystemExit):
        tool("export", files["stablehlo"], "--format=onnx", f"--output={run}/again.onnx")
    assert "holds a program without weights" in capsys.readouterr().err


def test_a_file_has_one_checkpoint(files):
    for kind in ("stablehlo", "safetensors"):
        with pytest.raises(UserError, match="holds only one checkpoint: do not ask for latest"):
            trained_model.load(files[kind], "latest")


def test_weights_alone_are_exported_again_to_the_same_bytes_as_the_run(files, tmp_path):
    shutil.copy(files["safetensors"], tmp_path / "copy.safetensors")
    tool("export", tmp_path / "copy.safetensors", "--format=stablehlo")
    assert trained_model.load(tmp_path / "copy.stablehlo").class_names == tuple("0123456789")
    tool("export", tmp_path / "copy.safetensors", "--format=safetensors", f"--output={tmp_path}/again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == files["safetensors"].read_bytes()
    assert (tmp_path / "again.safetensors").stat().st_mode == (tmp_path / "copy.stablehlo").stat().st_mode


def test_a_network_in_bfloat16_is_exported_as_onnx_in_float32(cache_dir, tmp_path):
    model = random_model(cache_dir, dtype="bfloat16")
    assert export.write(model, "onnx", tmp_path / "model.onnx") < 2e-5
    images = np.random.default_rng(0).integers(0, 256, (3, *model.image_shape), np.uint8)
    exact = model.in_float32().logits(images)
    assert 0 < np.abs(model.logits(images) - exact).max() < 0.05 * np.abs(exact).max()  # of bfloat16's eight bits
    for kind in ("stablehlo", "safetensors"):
        export.write(model, kind, tmp_path / f"model.{kind}")


def test_an_export_that_is_killed_leaves_what_was_there(run, tmp_path):
    path = tmp_path / "m.stablehlo"
    path.write_text("an older one")
    process = start(run, "--format=stablehlo", f"--output={path}", program=("-m", "resnet_jax", "export"))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".incomplete-*/m.stablehlo")):  # it is written, and not compared yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert path.read_text() == "an older one"


def offset_of_metadata(path):
    """Where the program of a .stablehlo ends."""
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo("metadata.json").header_offset


DAMAGED_PROGRAMS = {
    "missing": "No such file",
    "cut": "not a zip file",
    "noise": "not a zip file",
    "no metadata": "not a zip file",
    "no program": "",
    "a bit": "its SHA-256 differs",
    "another shape": "its program has other image or class shapes",
}


@pytest.mark.parametrize("damage", DAMAGED_PROGRAMS)
def test_a_damaged_program_is_refused(files, tmp_path, damage):
    path = tmp_path / "model.stablehlo"
    whole, end = files["stablehlo"].read_bytes(), offset_of_metadata(files["stablehlo"])
    program, meta = bytearray(whole[:end]), whole[end:]
    if damage == "cut":
        path.write_bytes(whole[: end // 2])
    elif damage == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif damage == "no metadata":
        path.write_bytes(program)
    elif damage == "no program":
        path.write_bytes(meta)
    elif damage == "a bit":
        program[end // 2] ^= 1
        path.write_bytes(program + meta)
    elif damage == "another shape":
        with zipfile.ZipFile(files["stablehlo"]) as archive:
            said = json.loads(archive.read("metadata.json"))
        path.write_bytes(program)
        with zipfile.ZipFile(path, "a") as archive:
            meta = {key: value for key, value in said.items() if key != "sha256"} | {"image_shape": [16, 16, 3]}
            archive.writestr("metadata.json", export.sealed(meta, hashlib.sha256(program).hexdigest()))
    with pytest.raises(UserError, match=rf"{DAMAGED_PROGRAMS[damage]}.*give a file from python -m resnet_jax export"):
        trained_model.load(path)


# Mistakes

MISTAKES = {
    "no run": (["nowhere", "--format=onnx"], "nowhere holds no run"),
    "another suffix": (["{run}", "--format=onnx", "--output=m.pb"], "the file name must end in .onnx"),
    "folding something else": (
        ["{run}", "--format=stablehlo", "--fold-batch-norm"],
        "--fold-batch-norm needs --format onnx",
    ),
    "an opset of another format": (["{run}", "--format=stablehlo", "--opset=13"], "--opset needs --format onnx"),
    "an opset that is too old": (["{run}", "--format=onnx", "--opset=12"], "--opset 12 must be from 13 to 21"),
    "half of a program": (["{run}", "--format=stablehlo", "--float16"], "--float16 needs --format safetensors"),
    "views of weights": (
        ["{run}", "--format=safetensors", "--views=2"],
        "--views=2 needs --format onnx or stablehlo: weights alone average nothing",
    ),
    "no such folder": (["{run}", "--format=safetensors", "--output=no/m.safetensors"], "cannot be written"),
    "no such checkpoint": (["{run}", "--format=onnx", "--checkpoint=7"], "no checkpoint of step 7"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[mistake]
    line = mistake_of_tool(capsys, "export", *(argument.format(run=run) for argument in arguments))
    assert words in line
    assert list(tmp_path.iterdir()) == []


DAMAGED_WEIGHTS = {
    "missing": "No such file",
    "cut": "",
    "no metadata": "it lacks 'resnet_jax'",
    "a bit of a weight": "its SHA-256 differs",
    "a digit of the metadata": "its SHA-256 differs",
    "another shape": "its weights do not fit its config",
    "a weight less": "its weights do not fit its config",
    "a network of 65,536 blocks": "its weights do not fit its config",
    "a temperature of nothing": "a temperature of 0 is not in 0.001..1000",
}


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_damaged_weights_are_refused(run, tmp_path, damage):
    path = tmp_path / "model.safetensors"
    tool("export", run, "--format=safetensors", f"--output={path}")
    with safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()["resnet_jax"])
    weights, raw = load_file(path), path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(raw[:-10])
    elif damage == "no metadata":
        save_file(weights, path)
    elif damage == "a bit of a weight":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "a digit of the metadata":
        assert raw.count(b"0.3053") >= 1  # config.data.mean
        path.write_bytes(raw.replace(b"0.3053", b"0.7081", 1))
    else:  # by someone who knows how to seal it
        del meta["sha256"]
        if damage == "another shape":
            weights["params/classifier/bias"] = np.zeros(11, np.float32)
        elif damage == "a weight less":
            del weights["params/classifier/bias"]
        elif damage == "a network of 65,536 blocks":
            meta["config"]["model"]["block_list"] = [65536] * len(meta["config"]["model"]["block_list"])
        else:
            meta["temperature"] = {"plain": 0}
        payload = train_state.digest(traverse_util.unflatten_dict(weights, sep="/"))
        save_file(weights, path, {"resnet_jax": export.sealed(meta, payload)})
    with pytest.raises(
        UserError,
        match=rf"{DAMAGED_WEIGHTS[damage]}.*(give a file from python -m resnet_jax export|export it again)",
    ):
        trained_model.load(path)


def test_without_onnx_the_message_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit):
        tool("export", run, "--format=onnx")
    assert "pip install 'resnet_jax[onnx]'" in capsys.readouterr().err
