import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from resnet_jax import steps, train_state
from resnet_jax.data import feed, sampling

SHAPE = (8, 8, 3)
GOLDEN_LOSS = [2.5638033, 2.5034647, 2.4408014]  # means since step 1; jax 0.10.2 and 0.12.0.1 agree to 1e-7
GOLDEN_GRAD_NORM = [1.6782905, 1.5772852, 1.4769573]


def random_batch(size, seed=0, **extra):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, *SHAPE), np.uint8)
    images[: size // 2] //= 4  # the two devices' halves differ in mean: their statistics must be pooled
    return {"images": images, "labels": rng.integers(0, 10, size, np.int32), **extra}


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def make_state(config, mesh):
    return helpers.make_state(config, 10, SHAPE, 20.0, mesh)


def train(config, mesh, num_steps, batch_size=16):
    state, step = make_state(config, mesh), steps.jit_train_step(config, mesh)
    path = []
    for i in range(num_steps):
        state, metrics = step(state, feed.shard_batch(random_batch(batch_size, i), mesh))
        path.append({name: float(value) for name, value in metrics.means.compute().items()})
    return state, path


def test_normalize_gives_each_channel_its_mean_and_deviation(final_config):
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    mean, std = final_config.data.mean, final_config.data.std
    expected = [[[[(v - m) / s for v, m, s in zip((0.0, 0.2, 1.0), mean, std, strict=True)]]]]
    np.testing.assert_allclose(steps.normalize(images, final_config.data), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_its_formula(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)).astype(np.float32), np.array([0, 3, 1, 1, 2], np.int32)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    np.testing.assert_allclose(steps.cross_entropy(logits, labels, smoothing), -(target * log_p).sum(axis=1), rtol=1e-5)


def mixing(config, count, shape=SHAPE[:2]):
    return sampling.mixing_weights(0, 0, count, config.augment, shape)


def test_mix_is_the_formula_of_mixup_and_of_cutmix(tiny_config):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, *SHAPE)).astype(np.float32)
    rows, columns = rng.random((1, 8), np.float32), (np.arange(8)[None] // 4 % 2).astype(np.float32)
    for weights in ((rows[:, :1].repeat(8, 1), np.ones((1, 8), np.float32)), (columns, columns[:, ::-1])):
        ours, share = steps.mix(images, np.concatenate(weights, axis=1).repeat(6, axis=0))
        theirs = images.copy()
        partner = weights[0][0, :, None, None] * weights[1][0, None, :, None]
        for i in range(6):
            theirs[i] = (1 - partner) * images[i] + partner * images[5 - i]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(share, np.full(6, partner.mean()), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_mixed_batch_is_that_of_both_labels_by_their_shares(tiny_config, smoothing):
    tiny_config.augment.cutmix_alpha, tiny_config.label_smoothing = 1.0, smoothing
    state, batch = make_state(tiny_config, mesh_of(1)), random_batch(8)
    weights = mixing(tiny_config, 1).repeat(8, axis=0)
    (ours, (logits, _)), _ = steps.loss_and_gradient(state, batch | {"mix": weights}, tiny_config)
    images, share = steps.mix(steps.normalize(batch["images"], tiny_config.data), weights)
    expected, _ = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    own, other = (steps.cross_entropy(logits, labels, smoothing) for labels in (batch["labels"], batch["labels"][::-1]))
    assert 0 < share[0] < 1
    np.testing.assert_allclose(ours, np.mean((1 - share) * own + share * other), rtol=1e-6)


def test_a_mixed_step_is_the_same_on_one_device_and_on_two(tiny_config):
    tiny_config.augment.mixup_alpha = 1.0
    batch = random_batch(16, mix=mixing(tiny_config, 1).repeat(16, axis=0))
    losses = []
    for devices in (1, 2):
        mesh = mesh_of(devices)
        _, metrics = steps.jit_train_step(tiny_config, mesh)(
            make_state(tiny_config, mesh), feed.shard_batch(batch, mesh)
        )
        losses.append(float(metrics.means.compute()["loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_three_steps_have_their_golden_values(tiny_config):
    """From the first version. If a change is meant to alter training, say so and update them; otherwise it is a bug."""
    _, path = train(tiny_config, mesh_of(2), 3)
    np.testing.assert_allclose([row["loss"] for row in path], GOLDEN_LOSS, rtol=1e-4)
    np.testing.assert_allclose([row["grad_norm"] for row in path], GOLDEN_GRAD_NORM, rtol=1e-3)


def test_metrics_are_means_since_the_last_row(tiny_config):
    tiny_config.log_every_steps = 1
    _, each = train(tiny_config, mesh_of(2), 5)
    tiny_config.log_every_steps = 3
    _, rows = train(tiny_config, mesh_of(2), 5)
    for name in ("loss", "accuracy", "grad_norm"):
        single = [row[name] for row in each]
        expected = [np.mean(single[0:1]), np.mean(single[0:2]), np.mean(single[0:3]), single[3], np.mean(single[3:5])]
        np.testing.assert_allclose([row[name] for row in rows], expected, rtol=1e-5)


def test_a_step_normalises_over_the_global_batch_whatever_the_device_count(tiny_config):
    """Loss and statistics alone: Adam's first update is the gradient's sign times the rate, and rounding can flip a sign."""
    (one, path_one), (two, path_two) = (train(tiny_config, mesh_of(n), 1) for n in (1, 2))
    np.testing.assert_allclose(path_one[0]["loss"], path_two[0]["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.batch_stats), jax.tree.leaves(two.batch_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss(tiny_config):
    mesh = mesh_of(2)
    tiny_config.schedule.warmup_epochs = 0.0
    state, step = make_state(tiny_config, mesh), steps.jit_train_step(tiny_config, mesh)
    batch = feed.shard_batch(random_batch(16), mesh)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(metrics)
    assert int(state.step) == 20
    first, last = (float(m.means.compute()["loss"]) for m in (losses[0], losses[-1]))
    assert last < 0.3 * first


def test_sgd_takes_a_plain_step(tiny_config):
    """theta - lr * (g + weight_decay * theta), with g from a loss written out here."""
    from configs import sgd

    tiny_config.optim, tiny_config.schedule = sgd.get_config().optim, sgd.get_config().schedule
    mesh, batch = mesh_of(1), random_batch(16)
    before = jax.device_get(make_state(tiny_config, mesh))

    def loss(params):
        logits, _ = before.apply_fn(
            {"params": params, "batch_stats": before.batch_stats},
            steps.normalize(batch["images"], tiny_config.data),
            train=True,
            mutable=["batch_stats"],
        )
        return -jax.nn.log_softmax(logits)[jnp.arange(16), batch["labels"]].mean()

    grads = jax.jit(jax.grad(loss))(before.params)
    expected = jax.tree.map(lambda p, g: p - 0.01 * (g + 0.001 * p), before.params, grads)
    after, _ = steps.jit_train_step(tiny_config, mesh)(make_state(tiny_config, mesh), feed.shard_batch(batch, mesh))
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_evaluation_counts_what_the_mask_keeps_and_nothing_else(tiny_config):
    mesh = mesh_of(2)
    state = make_state(tiny_config, mesh)
    mask = np.arange(16) < 11
    evaluate = steps.jit_eval_step(tiny_config, mesh)
    masked = evaluate(state, feed.shard_batch(random_batch(16, mask=mask), mesh))
    batch = random_batch(16)
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        steps.normalize(batch["images"][:11], tiny_config.data),
        train=False,
    )
    losses = steps.cross_entropy(logits, batch["labels"][:11])
    assert float(masked.loss) == pytest.approx(float(losses.sum()), rel=1e-5)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (batch["labels"][:11], np.argmax(logits, axis=1)), 1)
    assert np.array_equal(masked.confusion, confusion)
    garbage = random_batch(16, mask=mask)
    garbage["images"][11:] = 255
    again = evaluate(state, feed.shard_batch(garbage, mesh))
    assert np.array_equal(masked.loss, again.loss)
    assert np.array_equal(masked.confusion, again.confusion)
    assert np.array_equal(masked.logits[:11], again.logits[:11])


def test_label_smoothing_reaches_the_training_loss_and_not_evaluation(tiny_config):
    mesh = mesh_of(1)
    batch = feed.shard_batch(random_batch(16, mask=np.ones(16, bool)), mesh)
    state = make_state(tiny_config, mesh)
    results = []
    for smoothing in (0.0, 0.2):
        tiny_config.label_smoothing = smoothing
        _, metrics = jax.jit(functools.partial(steps.train_step, config=tiny_config.copy_and_resolve_references()))(
            state, batch
        )
        evaluated = jax.jit(functools.partial(steps.eval_step, config=tiny_config))(state, batch)
        results.append((float(metrics.means.compute()["loss"]), float(evaluated.loss)))
    (plain, plain_eval), (smooth, smooth_eval) = results
    assert plain != smooth
    assert plain_eval == smooth_eval


def test_the_average_follows_weights_and_statistics_and_is_evaluated(tiny_config):
    """TensorFlow's formula: average += (1 - min(decay, (1 + t) / (10 + t))) * (weights - average) after step t."""
    tiny_config.optim.ema_decay = 0.2
    mesh, step = mesh_of(2), steps.jit_train_step(tiny_config, mesh_of(2))
    state = make_state(tiny_config, mesh)
    average = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    for t in range(1, 4):
        state, _ = step(state, feed.shard_batch(random_batch(16, t), mesh))
        now = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        new = 1 - min(0.2, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, x, new=new: a + new * (x - a), average, now)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.average, average)
    batch = feed.shard_batch(random_batch(16, mask=np.ones(16, bool)), mesh)
    evaluated = steps.jit_eval_step(tiny_config, mesh)(state, batch)
    tiny_config.optim.ema_decay = 0.0
    plain = make_state(tiny_config, mesh).replace(**average)
    expected = steps.jit_eval_step(tiny_config, mesh)(plain, batch)
    np.testing.assert_allclose(evaluated.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_without_an_average_the_state_is_the_one_of_earlier_versions(tiny_config):
    state = make_state(tiny_config, mesh_of(1))
    assert type(state) is train_state.TrainState
    assert "average" not in train_state.trained(state)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_parts_of_a_batch_give_the_mean_of_their_gradients(tiny_config, devices):
    mesh, batch = mesh_of(devices), random_batch(24)
    state = make_state(tiny_config, mesh)
    of_part = jax.jit(functools.partial(steps.loss_and_gradient, config=tiny_config.copy_and_resolve_references()))
    losses, gradients, logits, batch_stats = [], [], np.zeros((24, 10), np.float32), state.batch_stats
    for part in range(3):
        taken = {name: array[part::3] for name, array in batch.items()}
        (loss, (logits[part::3], batch_stats)), grads = of_part(state.replace(batch_stats=batch_stats), taken)
        losses.append(loss)
        gradients.append(grads)
    tiny_config.accumulation_steps = 3
    whole = jax.jit(functools.partial(steps.loss_and_gradient, config=tiny_config))
    (loss, (got_logits, got_stats)), got = whole(state, feed.shard_batch(batch, mesh))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(loss, np.mean(losses))
    close(got_logits, logits)
    jax.tree.map(close, got_stats, batch_stats)
    jax.tree.map(lambda ours, *parts: close(ours, np.mean(parts, axis=0)), got, *gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_pytorchs_formula(final_config, smoothing):
    """sum over i and c of -w_c t_ic log p_ic, divided by the sum over i of w of label i, as torch.nn.CrossEntropyLoss says."""
    final_config.class_weights, final_config.label_smoothing = "0.5,2,1,4", smoothing
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)).astype(np.float32), np.array([0, 3, 1, 1, 2], np.int32)
    weights = np.array([0.5, 2, 1, 4])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    expected = -(weights * target * log_p).sum() / weights[labels].sum()
    np.testing.assert_allclose(steps.training_loss(logits, labels, final_config), expected, rtol=1e-5)
    final_config.class_weights = "3,3,3,3"
    equal = steps.training_loss(logits, labels, final_config)
    final_config.class_weights = ""
    np.testing.assert_allclose(equal, steps.training_loss(logits, labels, final_config), rtol=1e-6)
