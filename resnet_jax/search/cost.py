"""Compute the cost of a network from shapes, without arrays or compilation."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_jax import models, train_state


class Cost(NamedTuple):
    """The cost of a network.

    Attributes:
        num_params: trainable parameters.
        gflops: 1e9 operations of the forward pass of one image: convolutions and classifier by their definition, with a
            multiplication and an addition counted as two. A training step takes about three times as many per image.
    """

    num_params: int
    gflops: float


def of_model(config: ConfigDict, num_classes: int, image_shape: tuple[int, ...]) -> Cost:
    """Return the cost of the network that `config.model` describes.

    Args:
        config: `config.model`; the cost does not depend on its `dtype`.
        num_classes: size of the output.
        image_shape: (H, W, C) of an image.
    """
    operations: list[int] = []

    def conv(images: jax.Array, kernel: jax.Array, *arguments: Any, **settings: Any) -> jax.Array:
        result = jax.lax.conv_general_dilated(images, kernel, *arguments, **settings)
        operations.append(2 * result.size * math.prod(kernel.shape[:-1]))
        return result

    layers = models.flax_layers(jnp.float32, config.activation)
    layers = layers._replace(conv=partial(layers.conv, conv_general_dilated=conv))
    in_float32 = config.copy_and_resolve_references()
    in_float32.dtype = "float32"
    model = models.from_config(in_float32, num_classes, layers)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)["params"]
    operations.append(2 * params["classifier"]["kernel"].size)
    return Cost(train_state.num_params(params), sum(operations) / 1e9)
