"""The report's architecture and recipe give what PyTorch's give: golden/make_architecture_parity.py, in float64.

Everything is compared twice. Computed in float64, ours may differ only by the roundings to float32 that the step makes on
purpose: of the normalised images, the logits and the loss, 6e-8 each, and by what the layers make of them. Computed in
float32, by those of 23 convolutions and as many batch norms as well: PyTorch's own float32 differs from its float64 by
4.3e-6 in a parameter's gradient and by 3.5e-6 in the way of five steps, and the limits are a few times that.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs import final
from resnet_jax import config as config_lib
from resnet_jax import steps, train_state
from resnet_jax.inference import torch_weights

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "architecture_parity.npz"))
EXACT, ROUNDED = "float64", "float32"


def part(prefix):
    return {name.removeprefix(prefix): array for name, array in GOLDEN.items() if name.startswith(prefix)}


def farthest(found, wanted):
    """The largest difference over the largest value."""
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


def distance(found, wanted):
    """Of two sets of arrays: the l2 norm of the difference over that of what is wanted."""
    assert found.keys() == wanted.keys()
    apart = sum(np.sum((np.asarray(found[name], np.float64) - wanted[name]) ** 2) for name in wanted)
    return np.sqrt(apart / sum(np.sum(wanted[name] ** 2) for name in wanted))


@pytest.fixture(scope="module", params=[EXACT, ROUNDED])
def ours(request):
    """What PyTorch's golden file holds, by this project's own step: a dictionary with the file's keys, and the dtype."""
    dtype = request.param
    with jax.enable_x64(dtype == EXACT):
        config = config_lib.replaced(
            final.get_config(),
            {
                "model.channel_list": (4, 8, 16, 32),
                "model.dtype": dtype,
                "batch_size": 4,
                "num_epochs": 3.0,
                "schedule.warmup_epochs": 1.0,
            },
        )
        fresh = train_state.create(config, 10, (16, 16, 3), 2.0, train_state.make_mesh(1))
        like = {"params": fresh.params, "batch_stats": fresh.batch_stats}
        variables = torch_weights.from_torch(part("initial/"), like)
        state = fresh.replace(**variables)
        batch = {"images": GOLDEN["images"], "labels": GOLDEN["labels"]}

        images = steps.normalize(batch["images"], config.data)
        found = {"dtype": dtype, "eval_logits": state.apply_fn(variables, images, train=False)}
        gradient = jax.jit(lambda state, batch: steps.loss_and_gradient(state, batch, config))
        (found["loss"], (found["train_logits"], running)), gradients = gradient(state, batch)
        found["gradient/"] = torch_weights.to_torch({"params": gradients}, 0)
        found["running/"] = torch_weights.to_torch({"batch_stats": running}, 0)
        step = jax.jit(lambda state, batch: steps.train_step(state, batch, config=config)[0])
        for _ in range(5):
            state = step(state, batch)
        found["after/"] = torch_weights.to_torch({"params": state.params}, 0)
    return found


@pytest.mark.parametrize(
    ("quantity", "limit"),
    [
        ("eval_logits", {EXACT: 5e-7, ROUNDED: 2e-6}),
        ("train_logits", {EXACT: 1e-6, ROUNDED: 5e-6}),  # batch norm divides by a deviation of four images
        ("loss", {EXACT: 1e-7, ROUNDED: 5e-7}),
    ],
)
def test_logits_and_loss(ours, quantity, limit):
    assert farthest(ours[quantity], GOLDEN[quantity]) < limit[ours["dtype"]]


def test_the_gradient_of_every_parameter(ours):
    wanted = part("gradient/")
    assert ours["gradient/"].keys() == wanted.keys()
    limit = {EXACT: 5e-6, ROUNDED: 2e-5}[ours["dtype"]]
    for name in wanted:
        assert distance({name: ours["gradient/"][name]}, {name: wanted[name]}) < limit, name


def test_running_statistics_and_that_the_variance_is_of_the_biased_estimate(ours):
    """The mean is PyTorch's. Of a channel's n values PyTorch's running variance takes the sum of squares over n - 1, ours, as
    Flax's, over n: what the step adds to it is (n - 1) / n of what PyTorch's adds."""
    limit = {EXACT: 1e-6, ROUNDED: 5e-6}[ours["dtype"]]
    wanted, before = part("running/"), part("initial/")
    assert {name for name in ours["running/"] if "running" in name} == wanted.keys()
    side = {"conv1": 16, "bn1": 16, "layer1": 16, "layer2": 8, "layer3": 4}
    for name in wanted:
        if name.endswith("running_mean"):
            assert farthest(ours["running/"][name], wanted[name]) < limit, name
        else:
            n = 4 * side[name.split(".")[0]] ** 2
            added = (ours["running/"][name].astype(np.float64) - 0.9 * before[name]) * n / (n - 1)
            assert farthest(added, wanted[name] - 0.9 * before[name]) < 10 * limit, (
                name
            )  # a tenth of the variance is added


def test_the_parameters_after_five_steps_of_adamw(ours):
    """Relative to the way gone. Adam divides a gradient by its own size, so a single parameter whose gradient is next to
    nothing may be off by a larger share of a step: the largest such difference is held to a part of the learning rate."""
    before, wanted = part("initial/"), part("after/")
    limit, of_a_step = {EXACT: (5e-6, 1e-3), ROUNDED: (5e-5, 1e-2)}[ours["dtype"]]
    way = {name: wanted[name] - before[name] for name in wanted}
    assert distance({name: ours["after/"][name] - before[name] for name in wanted}, way) < limit
    largest = max(np.abs(ours["after/"][name] - wanted[name]).max() for name in wanted)
    assert largest < of_a_step * final.get_config().optim.learning_rate
