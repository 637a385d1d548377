"""The layers of `models.Layers` on the functions of `native`: batch norm and activation wait for what reads their result.

A normalised array is kept as the convolution's output with the scale and shift of each channel. The next convolution applies
them, and the activation, while it reads the images; so does `add_activate` at the end of a residual block. Parameters and running
statistics have the names, shapes and initial values of Flax's layers.
"""

from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from resnet_jax.kernels import native
from resnet_jax.models import ACTIVATIONS, Layers, max_pool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Convolved:
    """The output y [B, H, W, C] of a convolution, and [2, C], the sums of y and of y^2 by channel."""

    y: jax.Array
    sums: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.y.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Normalized:
    """The array y * scale + shift, for y [B, H, W, C] and affine = (scale, shift) [2, C]; its activation, if it has one."""

    y: jax.Array
    affine: jax.Array
    activation: str = field(default="", metadata={"static": True})  # of `models.ACTIVATIONS`

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.y.shape


def value(x: jax.Array | Normalized) -> jax.Array:
    """Compute a normalised array; other arrays stay as they are."""
    if not isinstance(x, Normalized):
        return x
    scale, shift = x.affine.reshape(2, 1, 1, 1, -1)
    normalized = x.y * scale + shift
    return ACTIVATIONS[x.activation](normalized) if x.activation else normalized


def activate(activation: str, x: Normalized) -> Normalized:
    """Apply an activation."""
    return replace(x, activation=activation)


class Conv(nn.Module):
    """`nn.Conv` without bias, and `max_pool` if it pools, with the sums that the batch norm after it needs."""

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: int = 0
    pool: bool = False
    mesh: Any = None  # of CPU devices
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array | Normalized) -> Convolved:
        """Convolve images."""
        w = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features), jnp.float32)
        winograd = native.supports(w, self.padding) and native.uses_winograd(
            x.y if isinstance(x, Normalized) else x, w, self.strides, self.mesh
        )
        if winograd and not (self.pool and (x.shape[1] % 2 or x.shape[2] % 2)):
            images, affine, activation = value(x), None, "relu"
            if isinstance(x, Normalized) and x.activation:
                images, affine, activation = x.y, x.affine, x.activation
            return Convolved(*native.convolve(images, affine, w, self.strides, self.mesh, activation, self.pool))
        if native.supports(w, self.padding):
            y, sums = native.convolve(value(x), None, w, self.strides, self.mesh)
            if not self.pool:
                return Convolved(y, sums)
        else:
            padding = ((self.padding, self.padding),) * 2
            y = lax.conv_general_dilated(
                value(x), w, (self.strides,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        y = max_pool(y) if self.pool else y
        return Convolved(y, jnp.stack([y.sum((0, 1, 2)), (y * y).sum((0, 1, 2))]))


class BatchNorm(nn.Module):
    """`nn.BatchNorm`, which computes the scale and shift of each channel and leaves the images as they are."""

    use_running_average: bool
    momentum: float
    epsilon: float

    @nn.compact
    def __call__(self, x: Convolved) -> Normalized:
        """Normalise the output of a convolution."""
        channels = x.shape[-1:]
        gamma = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        beta = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, mean_of_squares = x.sums / (x.y.size // x.shape[-1])
            var = jnp.maximum(mean_of_squares - mean * mean, 0.0)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        scale = gamma * lax.rsqrt(var + self.epsilon)
        return Normalized(x.y, jnp.stack([scale, beta - mean * scale]))


def add_activate(mesh: Mesh, activation: str, x: Normalized, shortcut: jax.Array | Normalized) -> jax.Array:
    """Return the activation of x + shortcut."""
    if x.shape[-1] % 8:
        return ACTIVATIONS[activation](value(x) + value(shortcut))
    return native.add_activate(x.y, x.affine, value(shortcut), mesh, activation)


def activate_max_pool(mesh: Mesh, activation: str, x: Normalized) -> jax.Array:
    """Return `max_pool` of the array's activation."""
    _, height, width, channels = x.shape
    if channels % 8 or height % 2 or width % 2:
        return max_pool(value(activate(activation, x)))
    return native.activate_max_pool(x.y, x.affine, mesh, activation)


@cache
def for_mesh(mesh: Mesh, activation: str) -> Layers:
    """Return the layers for float32 on a mesh of CPU devices."""
    return Layers(
        conv=partial(Conv, mesh=mesh),
        norm=BatchNorm,
        activate=partial(activate, activation),
        value=value,
        add_activate=partial(add_activate, mesh, activation),
        activate_max_pool=partial(activate_max_pool, mesh, activation),
    )
