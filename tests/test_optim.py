import fractions
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import final, sgd
from resnet_jax import config as config_lib
from resnet_jax import optim

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizer_trajectories.json").read_text())


def loss(params):
    """The problem of golden/make_optimizer_trajectories.py."""
    waves = jnp.sin(3.0 * params["kernel"]) * jnp.array([[1.0, -2.0]])
    return waves.sum() + 0.5 * ((params["kernel"] + params["bias"][None]) ** 2).sum()


def descend(tx, params, steps):
    state, path = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("config", [final.get_config(), sgd.get_config()], ids=["adamw", "sgd"])
def test_ten_steps_equal_pytorch(config, dtype, tolerance):
    """In float64 the formulas are the same; in float32 optax's 1 - b2**t rounds, which shows in the seventh digit."""
    with jax.enable_x64(dtype == "float64"):
        rates = jnp.array(GOLDEN["learning_rates"], dtype)
        params = {name: jnp.array(value, dtype) for name, value in GOLDEN["initial"].items()}
        path = descend(optim.make_optimizer(config, lambda step: rates[step]), params, 10)
    for step, (ours, theirs) in enumerate(zip(path, GOLDEN[config.optim.name], strict=True)):
        for name in ("kernel", "bias"):
            assert ours[name].dtype == dtype
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance, err_msg=f"{step + 1} {name}")


def with_restarts(config):
    config.schedule.restart_epochs = (20.0, 35.5)
    return config


@pytest.mark.parametrize("config", [final.get_config(), sgd.get_config()], ids=["warmup_cosine", "step"])
def test_a_restart_begins_the_schedule_anew_without_a_warm_up(config):
    plain = optim.make_schedule(config_lib.replaced(config, {"num_epochs": 20.0}), 100.0)
    alone = {"num_epochs": 15.5, "schedule.restart_epochs": ()}
    if config.schedule.name == "warmup_cosine":
        alone["schedule.warmup_epochs"] = 0.0
    second = optim.make_schedule(config_lib.replaced(config, alone), 100.0)
    restarting = optim.make_schedule(with_restarts(config), 100.0)
    assert [restarting(step) for step in range(2000)] == [plain(step) for step in range(2000)]
    np.testing.assert_allclose(
        [restarting(2000 + s) for s in range(1550)], [second(s) for s in range(1550)], rtol=1e-12
    )
    assert restarting(2000) == restarting(3550) == config.optim.learning_rate


@pytest.mark.parametrize(
    "config",
    [final.get_config(), sgd.get_config(), with_restarts(final.get_config())],
    ids=["warmup_cosine", "step", "restarts"],
)
def test_the_rate_of_a_row_is_computed_on_the_host_and_is_that_of_the_step(config):
    schedule = optim.make_schedule(config, 45_000 / 128)
    some = np.unique(np.linspace(0, 17_578, 500).astype(int))
    on_the_device = np.asarray(jax.jit(schedule)(jnp.asarray(some)))
    with jax.transfer_guard("disallow"):
        on_the_host = [schedule(int(step)) for step in some]
    assert not any(isinstance(rate, jax.Array) for rate in on_the_host)
    np.testing.assert_allclose(on_the_host, on_the_device, rtol=1e-6, atol=1e-9)  # float64 and float32


def test_warmup_and_cosine_are_the_reports_formulas(final_config):
    steps_per_epoch = 45_000 / 128
    schedule = optim.make_schedule(final_config, steps_per_epoch)
    for step in (0, 1, 100, 1757, 1758, 1759, 5000, 9999, 17_000, 17_578):
        t = step / steps_per_epoch
        if t < 5:
            expected = 0.01 * t / 5
        else:
            expected = 1e-5 + 0.5 * (0.01 - 1e-5) * (1 + math.cos(math.pi * (t - 5) / (50 - 5)))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-8), (
            step
        )  # float32 cosine near its zero
    assert float(schedule(0)) == 0.0
    assert max(float(schedule(s)) for s in (1757, 1758, 1759)) == pytest.approx(0.01, rel=1e-3)
    assert float(schedule(17_579)) == pytest.approx(1e-5, rel=1e-4)


def test_no_warmup_starts_at_the_full_rate(final_config):
    final_config.schedule.warmup_epochs = 0.0
    assert float(optim.make_schedule(final_config, 100.0)(0)) == pytest.approx(0.01)


def test_step_decay_is_that_of_pytorchs_step_lr():
    schedule = optim.make_schedule(sgd.get_config(), 100.0)
    for step, power in ((0, 0), (299, 0), (300, 1), (599, 1), (600, 2), (4999, 16)):
        assert float(schedule(step)) == pytest.approx(0.01 * 0.7**power, rel=1e-6), step


@pytest.mark.parametrize(
    ("images", "batch_size", "every", "periods"), [(45_000, 100, 7, 7), (50_000, 192, 1, 48), (45_000, 128, 3, 16)]
)
def test_a_compiled_step_decay_changes_where_its_period_ends(images, batch_size, every, periods):
    """XLA multiplies by 1 / 3150 instead of dividing by 3150, which rounds 3150 to a little less than one period."""
    config = sgd.get_config()
    config.schedule.decay_every_epochs = every
    schedule = optim.make_schedule(config, images / batch_size)
    compiled = jax.jit(schedule)
    for period in range(1, periods + 1):
        first = math.ceil(fractions.Fraction(images * every * period, batch_size))
        for step, power in ((first - 1, period - 1), (first, period)):
            wanted = config.optim.learning_rate * config.schedule.decay_factor**power
            assert float(compiled(jnp.int32(step))) == pytest.approx(wanted, rel=1e-5), step
            assert float(schedule(step)) == pytest.approx(wanted, rel=1e-5), step


@pytest.mark.parametrize("name", ["step", "restarts"])
def test_a_rate_changes_at_the_step_at_which_its_epochs_end(name):
    """11 epochs of 45,000 images are 1,875 steps of 264, which floats make a little more."""
    assert 11 * (45_000 / 264) > 1875
    if name == "step":
        config = sgd.get_config()
        config.schedule.decay_every_epochs = 11
    else:
        config = final.get_config()
        config.schedule.restart_epochs = (11.0,)
    schedule = optim.make_schedule(config, 45_000 / 264)
    for convert in (int, jnp.int32):
        before, after = (float(schedule(convert(step))) for step in (1874, 1875))
        assert after == pytest.approx(
            before * config.schedule.decay_factor if name == "step" else config.optim.learning_rate
        )


def test_clipping_bounds_the_global_norm(final_config):
    final_config.optim.name, final_config.optim.max_grad_norm = "sgd", 0.5
    final_config.optim.momentum, final_config.optim.dampening, final_config.optim.weight_decay = 0.0, 0.0, 0.0
    tx = optim.make_optimizer(final_config, lambda step: 1.0)
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, -4.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-6)
    small = jax.tree.map(lambda g: g * 1e-3, grads)
    updates, _ = tx.update(small, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -small["kernel"], rtol=1e-6)


@pytest.mark.parametrize(("mask", "bias_decays"), [("all", True), ("kernels", False)])
def test_the_decay_mask_spares_what_it_says(final_config, mask, bias_decays):
    final_config.optim.decay_mask = mask
    tx = optim.make_optimizer(final_config, lambda step: 1.0)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.001, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.001 if bias_decays else 0.0, rtol=1e-6)


def both(config, rate):
    """The updates of a network's two parts, and the state after them, with a factor on the backbone's rate."""
    config.optim.backbone_rate = rate
    tx = optim.make_optimizer(config, lambda step: 0.5)
    params = {"stem_conv": {"kernel": jnp.array([[1.0, -0.0]])}, "classifier": {"kernel": jnp.array([[2.0, 3.0]])}}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    return params, updates, state


@pytest.mark.parametrize("config", [final.get_config(), sgd.get_config()], ids=["adamw", "sgd"])
def test_the_factor_of_the_backbone_scales_its_updates_and_no_other(config):
    _, whole, state = both(config, 1.0)
    assert len(state) == 3  # clip, update, rate: as before there was a factor
    _, scaled, _ = both(config, 0.25)
    np.testing.assert_array_equal(scaled["stem_conv"]["kernel"], 0.25 * whole["stem_conv"]["kernel"])
    np.testing.assert_array_equal(scaled["classifier"]["kernel"], whole["classifier"]["kernel"])


@pytest.mark.parametrize("config", [final.get_config(), sgd.get_config()], ids=["adamw", "sgd"])
def test_a_factor_of_0_leaves_the_backbone_to_the_bit(config):
    params, updates, _ = both(config, 0.0)
    after = jax.jit(optax.apply_updates)(params, updates)
    np.testing.assert_array_equal(after["stem_conv"]["kernel"], params["stem_conv"]["kernel"])
    assert (after["classifier"]["kernel"] != params["classifier"]["kernel"]).all()


def with_optimizer(config, name, **fields):
    """A config with another optimizer, whose own fields are these."""
    shared = ("learning_rate", "backbone_rate", "weight_decay", "decay_mask", "max_grad_norm", "ema_decay")
    config.optim = {field: config.optim[field] for field in shared} | {"name": name, **fields}
    config_lib.validate(config)
    return config


def test_nesterov_is_pytorchs_formula(final_config):
    """torch.optim.SGD: g += decay * theta; buffer = momentum * buffer + g; theta -= rate * (g + momentum * buffer)."""
    tx = optim.make_optimizer(with_optimizer(final_config, "nesterov", momentum=0.85), lambda step: 0.1)
    params = {"kernel": jnp.array(GOLDEN["initial"]["kernel"]), "bias": jnp.array(GOLDEN["initial"]["bias"])}
    theta, buffer = jax.tree.map(np.asarray, params), jax.tree.map(np.zeros_like, params)
    for ours in descend(tx, params, 5):
        grads = jax.tree.map(np.asarray, jax.grad(loss)(theta))
        for name, g in grads.items():
            g = g + 0.001 * theta[name]
            buffer[name] = 0.85 * buffer[name] + g
            theta[name] = theta[name] - 0.1 * (g + 0.85 * buffer[name])
            np.testing.assert_allclose(ours[name], theta[name], rtol=0, atol=1e-5)


def orthogonalised(matrix, iterations):
    """Iterations of Newton and Schulz with Jordan's coefficients, of a matrix that is at most as tall as wide."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("name", ["muon", "muon_normalized"])
def test_muon_orthogonalises_the_hidden_convolutions_and_leaves_the_rest_to_adam(final_config, name):
    config = with_optimizer(final_config, name, momentum=0.9, adam_ratio=0.25, b1=0.8, b2=0.99, eps=1e-8)
    tx, rate, decay = optim.make_optimizer(config, lambda step: 0.1), 0.1, 0.001
    rng = np.random.default_rng(0)
    shapes = {
        "stem_conv": {"kernel": (3, 3, 3, 4)},
        "block": {"conv1": {"kernel": (3, 3, 4, 8)}, "norm1": {"scale": (8,)}},
        "classifier": {"kernel": (8, 5), "bias": (5,)},
    }
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    updates, _ = tx.update(grads, tx.init(params), params)

    g = grads["block"]["conv1"]["kernel"].reshape(36, 8).astype(np.float64)
    iterations = {"muon": 5, "muon_normalized": 3}[name]
    expected = orthogonalised(g.T, iterations).T.reshape(3, 3, 4, 8)  # no matter how long the momentum is, and 8 <= 36
    kernel = params["block"]["conv1"]["kernel"]
    updated = kernel - rate * (expected + decay * kernel)
    if name == "muon_normalized":
        updated += kernel * np.sqrt(8) / np.linalg.norm(kernel) - kernel
    np.testing.assert_allclose(kernel + updates["block"]["conv1"]["kernel"], updated, atol=2e-5)
    adam = {("stem_conv", "kernel"), ("classifier", "kernel"), ("classifier", "bias")}
    for module, leaf in adam:
        g, p = grads[module][leaf], params[module][leaf]
        nesterov = 0.8 * (1 - 0.8) / (1 - 0.8**2) + 1  # of m_hat / (sqrt(v_hat) + eps), in units of the gradient's sign
        np.testing.assert_allclose(updates[module][leaf], -rate * (0.25 * nesterov * np.sign(g) + decay * p), atol=2e-6)


def test_a_slower_backbone_keeps_the_norms_of_muon(final_config):
    config = with_optimizer(final_config, "muon_normalized", momentum=0.9, adam_ratio=0.25, b1=0.8, b2=0.99, eps=1e-8)
    rng = np.random.default_rng(0)
    params = {name: {"kernel": jnp.array(rng.normal(size=(3, 3, 4, 8)), jnp.float32)} for name in ("stem_conv", "conv")}
    grads = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), jnp.float32), params)

    def change(rate, backbone_rate):
        """How far a step moves the kernel from that of the right norm."""
        config.optim.backbone_rate = backbone_rate
        tx = optim.make_optimizer(config, lambda step: rate)
        updates, _ = tx.update(grads, tx.init(params), params)
        kernel = params["conv"]["kernel"]
        return kernel + updates["conv"]["kernel"] - kernel * np.sqrt(8) / np.linalg.norm(kernel)

    np.testing.assert_allclose(change(0.1, 0.25), change(0.025, 1.0), atol=1e-6)
    config.optim.backbone_rate = 0.0
    tx = optim.make_optimizer(config, lambda step: 0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not any(map(np.any, jax.tree.leaves(updates)))


def test_a_linear_schedule_is_a_triangle(final_config):
    final_config.schedule.name = "warmup_linear"
    final_config.num_epochs, final_config.schedule.warmup_epochs, final_config.schedule.min_ratio = 10.0, 2.0, 0.1
    schedule = optim.make_schedule(final_config, 100.0)
    np.testing.assert_allclose([schedule(s) for s in (0, 100, 200, 600, 1000)], [0.0, 0.005, 0.01, 0.0055, 0.001])
