"""The functions that run on the devices: a training step, several steps with augmentation, and an evaluation step.

All are pure, take uint8 images and are jitted for a mesh, whose axis "data" shards the batch. Batch norm's statistics,
the loss and the gradient are those of the global batch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import kernels
from resnet_jax.train_state import AveragedTrainState, TrainMetrics, TrainState

Batch = Mapping[str, jax.Array]
LossAndGradient = tuple[tuple[jax.Array, tuple[jax.Array, optax.Params]], optax.Params]
BuildBatch = Callable[[Batch, Batch], Batch]


def normalize(images: jax.Array, data: ConfigDict) -> jax.Array:
    """Convert uint8 [B, H, W, 3] to float32 (x / 255 - mean) / std, with the mean and std of `config.data`."""
    mean, std = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (data.mean, data.std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the loss of each example: float32 [B, num_classes], int32 [B] -> float32 [B].

    `label_smoothing` is the share of the target that is spread over all classes (arXiv:1512.00567, section 7).
    """
    if label_smoothing == 0.0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def training_loss(
    logits: jax.Array, labels: jax.Array, config: ConfigDict, share: jax.Array | None = None
) -> jax.Array:
    """Return the mean loss, float32 [], of logits [B, num_classes] and labels [B].

    With `config.class_weights`, it is that of `torch.nn.CrossEntropyLoss(weight, label_smoothing)`: each term of the
    cross-entropy is weighted by its class, and the sum is divided by the sum of the weights of the labels. `share`, float32
    [B], is the share of an image that `mix` took from the mirrored place of the batch, and so its label's.
    """
    class_weights = jnp.array(config_lib.class_weights(config.class_weights))

    def losses_and_weights(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not class_weights.size:
            return cross_entropy(logits, labels, config.label_smoothing), jnp.ones(())
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), config.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets * class_weights[None]), class_weights[labels]

    losses, weights = losses_and_weights(labels)
    if share is not None:
        others, their_weights = losses_and_weights(labels[::-1])
        losses, weights = losses + share * (others - losses), weights + share * (their_weights - weights)
    return losses.mean() / weights.mean()


def mix(images: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mix each image with that at the mirrored place of the batch, by `sampling.mixing_weights`: float32 [B, H + W].

    Return the mixed images, float32 [B, H, W, 3], and the other image's share of each: float32 [B].
    """
    rows, columns = jnp.split(weights, [images.shape[1]], axis=1)
    share = rows[:, :, None, None] * columns[:, None, :, None]
    return (1 - share) * images + share * images[::-1], share.mean(axis=(1, 2, 3))


def _loss_and_gradient_of_part(state: TrainState, batch: Batch, config: ConfigDict) -> LossAndGradient:
    """Return what `loss_and_gradient` does, without accumulation."""
    frozen = config.optim.backbone_rate == 0  # all but the classifier: its batch norm uses the running statistics

    def loss_fn(params: optax.Params) -> tuple[jax.Array, tuple[jax.Array, optax.Params]]:
        if frozen:
            params = jax.lax.stop_gradient(params) | {"classifier": params["classifier"]}
        images, share = normalize(batch["images"], config.data), None
        if "mix" in batch:
            images, share = mix(images, batch["mix"])
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats}, images, train=not frozen, mutable=["batch_stats"]
        )
        return training_loss(logits, batch["labels"], config, share), (logits, updates["batch_stats"])

    return jax.value_and_grad(loss_fn, has_aux=True)(state.params)


def loss_and_gradient(state: TrainState, batch: Batch, config: ConfigDict) -> LossAndGradient:
    """Return ((loss [], (logits [B, num_classes], new batch_stats)), gradient) of a batch's mean loss.

    The batch is taken in `config.accumulation_steps` parts, one after another. Part i has the examples i, i + parts,
    i + 2 parts and so on, so that each device keeps its own. Batch norm normalises over a part, and its running statistics
    take in each part. An image is mixed with one of its part.
    """
    parts = config.accumulation_steps
    if parts == 1:
        return _loss_and_gradient_of_part(state, batch, config)

    def one_part(sums: tuple[optax.Params, optax.Params], part: Batch) -> Any:
        batch_stats, total = sums
        state_of_part = state.replace(batch_stats=batch_stats)
        (loss, (logits, batch_stats)), grads = _loss_and_gradient_of_part(state_of_part, part, config)
        return (batch_stats, optax.tree.add(total, grads)), (loss, logits)

    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    nothing = state.batch_stats, optax.tree.zeros_like(state.params)
    (batch_stats, total), (loss, logits) = jax.lax.scan(one_part, nothing, split)
    logits = logits.swapaxes(0, 1).reshape(-1, logits.shape[-1])
    return (loss.mean(), (logits, batch_stats)), optax.tree.scale(1 / parts, total)


class StepMetrics(NamedTuple):
    """The metrics of a training step.

    Attributes:
        means: means over the steps since the last row of `metrics.jsonl`.
        rejected: bool [], whether the step was rejected.
    """

    means: TrainMetrics
    rejected: jax.Array


def train_step(state: TrainState, batch: Batch, *, config: ConfigDict) -> tuple[TrainState, StepMetrics]:
    """Take a training step.

    A step is rejected if its loss is not finite, or if its gradient's norm is not finite or reaches
    `config.abort_grad_norm`. The state then does not change, except that `failed` is set. Every later step is rejected
    too, until the host reads `StepMetrics.rejected`.

    Args:
        state: the state before the step.
        batch: {"images": uint8 [B, H, W, 3], "labels": int32 [B]}, and "mix", as `mix` takes it, to mix the images.
        config: the whole config; static.
    """
    (loss, (logits, batch_stats)), grads = loss_and_gradient(state, batch, config)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    now = TrainMetrics.single_from_model_output(
        loss=loss,
        accuracy=(jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32),
        grad_norm=grad_norm,
    )
    first_of_row = state.step % config.log_every_steps == 0
    since_row = jax.tree.map(partial(jnp.where, first_of_row), now, state.metrics.merge(now))
    after = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        metrics=since_row,
    )
    if isinstance(after, AveragedTrainState):
        after = after.averaged(config.optim.ema_decay)
    accepted = ~state.failed & jnp.isfinite(loss) & (grad_norm < (config.abort_grad_norm or jnp.inf))  # not if NaN
    state = jax.tree.map(partial(jnp.where, accepted), after, state).replace(failed=~accepted)
    return state, StepMetrics(since_row, ~accepted)


def train_steps(
    state: TrainState, data: Batch, draws: Batch, *, config: ConfigDict, build_batch: BuildBatch
) -> tuple[TrainState, StepMetrics]:
    """Take several training steps on data in the memory of the devices.

    Args:
        state: the state before the first step.
        data: all training examples: {"images": uint8 [N, H, W, 3], "labels": int32 [N]}.
        draws: from `pipelines.train_draws`, each [steps, B, ...].
        config: the whole config; static.
        build_batch: makes the batch of a step from `data` and the step's draws.

    Returns:
        The state after the last step, and the metrics of each step, stacked [steps].
    """

    def one_step(state: TrainState, draws: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(state, build_batch(data, draws), config=config)

    if len(draws["indices"]) == 1:  # without a scan, in which XLA runs convolutions 20 times slower on a CPU
        state, metrics = one_step(state, jax.tree.map(lambda drawn: drawn[0], draws))
        return state, jax.tree.map(lambda value: value[None], metrics)
    return jax.lax.scan(one_step, state, draws)


class EvalMetrics(NamedTuple):
    """The metrics of an evaluation step.

    Attributes:
        loss: float32 [], the sum over the examples in the mask.
        confusion: int32 [num_classes, num_classes], their counts by label (row) and prediction (column).
        logits: float32 [B, num_classes], of all examples.
    """

    loss: jax.Array
    confusion: jax.Array
    logits: jax.Array


def eval_logits(
    apply: Callable[..., Any], variables: Any, images: jax.Array, data: ConfigDict, views: int = 1
) -> jax.Array:
    """Compute logits with the running statistics of batch norm.

    Args:
        apply: the model's `apply`.
        variables: {"params", "batch_stats"}.
        images: uint8 [B, H, W, 3] in 0..255, or floats in that range.
        data: `config.data`, whose mean and std normalise the images.
        views: as in `average_over_views`.

    Returns:
        float32 [B, num_classes].
    """
    return average_over_views(partial(apply, variables, train=False), normalize(images, data), views)


def average_over_views(network: Callable[[jax.Array], jax.Array], images: jax.Array, views: int) -> jax.Array:
    """Average the logits [B, num_classes] that a network gives to views of images [B, H, W, 3] (arXiv:2404.00498, section 3.5).

    One view is the image, and two are it and its mirror image. Six are these and both moved by one pixel along the diagonal,
    in either direction, with reflected borders; the four weigh as much as the two.
    """
    if views == 6:
        padded = jnp.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
        places = images, padded[:, :-2, :-2], padded[:, 2:, 2:]
        middle, *moved = (average_over_views(network, place, 2) for place in places)
        return (middle + (moved[0] + moved[1]) / 2) / 2
    return network(images) if views == 1 else (network(images) + network(images[:, :, ::-1])) / 2


def eval_step(state: TrainState, batch: Batch, *, config: ConfigDict, views: int = 1) -> EvalMetrics:
    """Evaluate a batch with the running statistics of batch norm.

    Args:
        state: only its `variables` are read.
        batch: {"images": uint8 [B, H, W, 3], "labels": int32 [B], "mask": bool [B]}; only the examples in `mask` count.
        config: the whole config; static.
        views: as in `average_over_views`; static.
    """
    logits = eval_logits(state.apply_fn, state.variables, batch["images"], config.data, views)
    labels, mask, num_classes = batch["labels"], batch["mask"], logits.shape[-1]
    loss = jnp.where(mask, cross_entropy(logits, labels), jnp.zeros_like(mask, jnp.float32)).sum()
    cell = labels * num_classes + jnp.argmax(logits, axis=-1)
    counts = jnp.zeros(num_classes**2, jnp.int32).at[cell].add(mask.astype(jnp.int32))
    return EvalMetrics(loss, counts.reshape(num_classes, num_classes), logits)


def jit_train_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Wrapped:
    """Jit `train_step` for a mesh: state replicated and donated, batch sharded."""
    return _jit(partial(train_step, config=config), mesh, (P(), P("data")), donate_argnums=0)


def jit_train_steps(config: ConfigDict, mesh: Mesh, build_batch: BuildBatch) -> jax.stages.Wrapped:
    """Jit `train_steps` for a mesh: state replicated and donated, data replicated, draws sharded like batches."""
    function = partial(train_steps, config=config, build_batch=build_batch)
    return _jit(function, mesh, (P(), P(), P(None, "data")), donate_argnums=0)


def jit_eval_step(config: ConfigDict, mesh: Mesh, views: int = 1) -> jax.stages.Wrapped:
    """Jit `eval_step` for a mesh: state replicated, batch sharded."""
    return _jit(partial(eval_step, config=config, views=views), mesh, (P(), P("data")))


def _jit(function: Callable[..., Any], mesh: Mesh, specs: tuple[P, ...], **settings: Any) -> jax.stages.Wrapped:
    """Jit a function for a mesh, with arguments sharded by `specs` and replicated results."""
    shardings, replicated = tuple(NamedSharding(mesh, spec) for spec in specs), NamedSharding(mesh, P())
    options = kernels.compiler_options(mesh)
    return jax.jit(function, in_shardings=shardings, out_shardings=replicated, compiler_options=options, **settings)
