"""The yardstick is the same network: where PyTorch is installed beside JAX, as a scratch environment may have it."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT

from benchmarks import measure
from resnet_jax import config as config_lib
from resnet_jax import models, train_state
from resnet_jax.inference import torch_weights
from resnet_jax.runs import stored_config

torch = pytest.importorskip("torch", reason="PyTorch is not installed here: the yardstick has nothing to run on")
from benchmarks import torch_step  # noqa: E402  needs PyTorch

NETWORKS = {
    "final": ({}, 4_918_602),
    "resnet18": ({"block_list": (2, 2, 2, 2)}, 11_173_962),
    "bottleneck": ({"block": "bottleneck", "channel_list": (8, 16), "block_list": (2, 1), "activation": "gelu"}, None),
    "max-pools": (
        {
            "channel_list": (8, 12, 16),
            "block_list": (0, 1, 0),
            "downsample": "pool",
            "global_pool": "max",
            "logit_scale": 0.125,
            "activation": "gelu",
        },
        None,
    ),
    "max-pools first": ({"channel_list": (8, 12), "block_list": (0, 1), "downsample": "pool_first"}, None),
    "imagenet stem": ({"stem": "imagenet", "channel_list": (8, 16), "block_list": (1, 2)}, None),
}


def copy_to_torch(variables, network):
    """Give the yardstick our parameters and statistics, under the names that `resnet_jax.inference.torch_weights` knows."""
    weights = torch_weights.to_torch(variables, step=0)
    network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})


@pytest.mark.parametrize("network", NETWORKS)
def test_the_yardstick_has_our_parameters_and_given_them_our_logits(final_config, network):
    changed, num_params = NETWORKS[network]
    config = config_lib.replaced(final_config, {f"model.{k}": v for k, v in changed.items()})
    ours = models.from_config(config.model, 10)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = ours.lazy_init(jax.random.key(0), jax.ShapeDtypeStruct(images.shape, np.float32), train=False)
    theirs = torch_step.ResNet(stored_config.to_json(config)["model"], 10)
    copy_to_torch(variables, theirs)
    count = sum(p.numel() for p in theirs.parameters())
    assert count == train_state.num_params(variables["params"])
    assert num_params in (None, count)
    for train in (True, False):  # the second with the running statistics that the first has left
        logits, updates = ours.apply(variables, images, train=train, mutable=["batch_stats"])
        with torch.no_grad():
            expected = theirs.train(train)(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        variables = variables | updates
        copy_to_torch(variables, theirs)  # whose running variance is the unbiased one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_that_of_each_round(tmp_path, dtype):
    output = tmp_path / "result.json"
    flags = ["--only=train_step", "--against-torch", "--device-counts=1", f"--dtypes={dtype}", "--seconds=0.1"]
    command = [sys.executable, "-m", "resnet_jax", "benchmark", "--config=configs/final.py:smoke", *flags]
    done = subprocess.run([*command, f"--output={output}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(output.read_text())["cases"]
    assert case["torch"]["num_params"] == case["num_params"]
    ours, theirs = (case["figures"][name]["repeats"] for name in ("train_step", "torch_train_step"))
    assert case["figures"]["train_step / torch_train_step"]["repeats"] == [
        a / b for a, b in zip(ours, theirs, strict=True)
    ]


def test_the_yardstick_predicts_too(final_config):
    with measure.torch_step(final_config, 10, (32, 32, 3), sys.executable, "predict") as (images_per_second, about):
        assert images_per_second(0.1) > 0
    assert about["num_params"] == 4_918_602
    assert about["bytes"] > 4 * about["num_params"]


def test_the_golden_files_can_be_written_again():
    from golden import make_architecture_parity, make_optimizer_trajectories

    parity = dict(np.load(ROOT / "tests" / "golden" / "architecture_parity.npz"))
    drawn = (
        np.random.default_rng(seed).integers(0, 256, parity["images"].shape, dtype=np.uint8) for seed in range(200)
    )
    seed = next(seed for seed, images in enumerate(drawn) if (images == parity["images"]).all())
    again = make_architecture_parity.trajectory(seed)[1]
    assert again.keys() == parity.keys()
    for name, array in parity.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-9, atol=1e-12)
    stored = json.loads((ROOT / "tests" / "golden" / "optimizer_trajectories.json").read_text("utf-8"))
    for name in make_optimizer_trajectories.OPTIMIZERS:
        jax.tree.map(np.testing.assert_allclose, make_optimizer_trajectories.trajectory(name), stored[name])
