"""Residual networks for small images (He et al., arXiv:1512.03385), in Flax linen.

`ResNet` describes its stages by two lists, channels and numbers of blocks. Images are `[B, H, W, C]`.
Batch norm normalises over the global batch when the step is jitted over a sharded batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": nn.gelu}
# The fields of `config.model` that say what is computed with the weights.
COMPUTATION_FIELDS = ("stem", "downsample", "activation", "global_pool", "logit_scale", "batch_norm_epsilon")
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., arXiv:1502.01852, eq. 14


def at_least_float32(dtype: Any) -> Any:
    """Return float32 for bfloat16, in which small updates of a parameter or a mean would be lost, and wider dtypes as they are."""
    return jnp.promote_types(dtype, jnp.float32)


class Layers(NamedTuple):
    """What a network is built of: Flax's layers, or those of `kernels.layers`, which pass on arrays in a form of their own."""

    conv: Callable[..., Any]  # a module like `nn.Conv`, without bias or padding; with `pool`, `max_pool` follows it
    norm: Callable[..., Any]  # a module like `nn.BatchNorm`, for what `conv` returns
    activate: Callable[[Any], Any]  # of what `norm` returns
    value: Callable[[Any], jax.Array]  # the array that `activate` returned; an array stays as it is
    add_activate: Callable[[Any, Any], jax.Array]  # of what `norm` returns, and a shortcut
    activate_max_pool: Callable[[Any], jax.Array]  # of what `norm` returns


def flax_layers(dtype: Any, activation: str) -> Layers:
    """Return Flax's layers, which compute in `dtype`, with parameters of `at_least_float32`."""
    dtypes, activate = {"dtype": dtype, "param_dtype": at_least_float32(dtype)}, ACTIVATIONS[activation]
    norm = partial(nn.BatchNorm, **dtypes)

    def conv(*args: Any, pool: bool = False, **settings: Any) -> Callable[[jax.Array], jax.Array]:
        module = nn.Conv(*args, **{"use_bias": False, "padding": 0, **dtypes, **settings})
        return (lambda x: max_pool(module(x))) if pool else module

    add_activate, activate_max_pool = lambda x, shortcut: activate(x + shortcut), lambda x: max_pool(activate(x))
    return Layers(conv, norm, activate, lambda x: x, add_activate, activate_max_pool)


class BasicBlock(nn.Module):
    """3x3 conv, BN, activation, 3x3 conv, BN, plus the shortcut, activation; [B, H, W, C] -> [B, H/stride, W/stride, channels]."""

    channels: int
    stride: int
    layers: Layers
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block."""
        layers = self.layers
        y = layers.conv(self.channels, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = layers.activate(layers.norm(name="norm1")(y))
        y = layers.conv(self.channels, (3, 3), padding=1, name="conv2")(y)
        return layers.add_activate(layers.norm(name="norm2")(y), _shortcut(self, x, y.shape[-1]))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (strided), 1x1 convs with BN, plus the shortcut; [B, H, W, C] -> [B, H/stride, W/stride, 4 channels]."""

    channels: int
    stride: int
    layers: Layers
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block."""
        layers = self.layers
        y = layers.conv(self.channels, (1, 1), name="conv1")(x)
        y = layers.activate(layers.norm(name="norm1")(y))
        y = layers.conv(self.channels, (3, 3), self.stride, padding=1, name="conv2")(y)
        y = layers.activate(layers.norm(name="norm2")(y))
        y = layers.conv(self.channels * self.expansion, (1, 1), name="conv3")(y)
        return layers.add_activate(layers.norm(name="norm3")(y), _shortcut(self, x, y.shape[-1]))


def _shortcut(block: Any, x: jax.Array, channels: int) -> Any:
    """Apply the identity, or a 1x1 conv and BN if the block has a stride or other channels (He et al., section 3.3, option B)."""
    if block.stride == 1 and x.shape[-1] == channels:
        return x
    x = block.layers.conv(channels, (1, 1), block.stride, name="shortcut_conv")(x)
    return block.layers.norm(name="shortcut_norm")(x)


BLOCKS: dict[str, type[BasicBlock] | type[BottleneckBlock]] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


class ResNet(nn.Module):
    """A residual network: stem, stages, global pool, linear classifier.

    Attributes:
        num_classes: size of the output.
        channel_list: channels of each stage; with bottleneck blocks, a stage outputs four times as many.
        block_list: blocks of each stage, as long as `channel_list`; with `downsample` "stride", a
            stage of 0 blocks is the identity.
        block: `BasicBlock` or `BottleneckBlock`.
        downsample: how all stages but the first halve the size: "stride", in their first block; "pool", a 3x3 conv, BN,
            activation and a 2x2 max-pool before their blocks (as in ResNet-9; Page, 2018); or "pool_first", the same with the
            max-pool before BN (as in airbench94; Jordan, arXiv:2404.00498).
        activation: one of `ACTIVATIONS`; GELU in its form with tanh (Hendrycks and Gimpel, arXiv:1606.08415).
        global_pool: "mean" or "max" over the pixels of the last stage.
        logit_scale: factor on the logits.
        stem: "cifar" (3x3 conv, stride 1), "imagenet" (7x7 conv, stride 2, then 3x3 max-pool, stride 2) or "whitened", as
            "cifar", but with the kernel of `data.whitening`; neither it nor the batch norm after it is trained.
        batch_norm_momentum: weight of the old running statistic at each step (PyTorch's momentum is 1 - this).
        batch_norm_epsilon: added to the variance.
        dtype: dtype of the computation up to the last stage; parameters, and all that follows, are `at_least_float32`.
        layers: what the network is built of; None means Flax's layers, with that dtype.
    """

    num_classes: int
    channel_list: tuple[int, ...]
    block_list: tuple[int, ...]
    block: type[BasicBlock] | type[BottleneckBlock] = BasicBlock
    stem: str = "cifar"
    downsample: str = "stride"
    activation: str = "relu"
    global_pool: str = "mean"
    logit_scale: float = 1.0
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    layers: Layers | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map normalised images to logits.

        Args:
            x: [B, H, W, C] normalised images, any float dtype.
            train: normalise with the statistics of the batch and update the running ones (`batch_stats` mutable), or
                normalise with the running ones.

        Returns:
            [B, num_classes] float32 logits.
        """
        layers = self.layers or flax_layers(self.dtype, self.activation)
        conv = partial(layers.conv, kernel_init=conv_init)
        norm = partial(layers.norm, momentum=self.batch_norm_momentum, epsilon=self.batch_norm_epsilon)
        norm = partial(norm, use_running_average=not train)
        layers = layers._replace(conv=conv, norm=norm)
        kernel, stride = ((7, 7), 2) if self.stem == "imagenet" else ((3, 3), 1)
        x = conv(self.channel_list[0], kernel, stride, padding=kernel[0] // 2, name="stem_conv")(x)
        x = layers.activate(norm(name="stem_norm")(x))
        if train and self.stem == "whitened":
            x = jax.lax.stop_gradient(x)
        if self.stem == "imagenet":
            x = nn.max_pool(layers.value(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, (channels, blocks) in enumerate(zip(self.channel_list, self.block_list, strict=True)):
            pools, early = i > 0 and self.downsample != "stride", self.downsample == "pool_first"
            if pools:
                x = conv(channels * self.block.expansion, (3, 3), padding=1, pool=early, name=f"stage{i + 1}_conv")(x)
                x = norm(name=f"stage{i + 1}_norm")(x)
                x = layers.activate(x) if early else layers.activate_max_pool(x)
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 and not pools else 1
                x = self.block(channels, stride, layers, name=f"stage{i + 1}_block{j + 1}")(layers.value(x))
        x, dtype = layers.value(x), at_least_float32(self.dtype)
        x = x.max(axis=(1, 2)) if self.global_pool == "max" else jnp.mean(x, axis=(1, 2), dtype=dtype)
        classifier = nn.Dense(self.num_classes, dtype=dtype, param_dtype=dtype, name="classifier")
        return (classifier(x) * self.logit_scale).astype(jnp.float32)


def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum of each 2x2 pixels: [B, H, W, C] -> [B, H // 2, W // 2, C]."""
    size, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(size, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def from_config(model: ConfigDict, num_classes: int, layers: Layers | None = None) -> ResNet:
    """Build the network that `config.model` describes, by default of Flax's layers."""
    return ResNet(
        num_classes=num_classes,
        channel_list=tuple(model.channel_list),
        block_list=tuple(model.block_list),
        block=BLOCKS[model.block],
        batch_norm_momentum=model.batch_norm_momentum,
        dtype=jnp.dtype(model.dtype),
        layers=layers,
        **{name: model[name] for name in COMPUTATION_FIELDS},
    )
