"""A trained network to use: `model = load("runs/final")`, `model.predict(images)`.

It takes a run's folder alone: no data set and no TensorFlow.
"""

import json
import os
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special
from absl import logging
from flax import traverse_util
from ml_collections import ConfigDict
from PIL import Image
from safetensors import SafetensorError, safe_open

from resnet_jax import calibration, models, sources, steps, train_state, workdir
from resnet_jax import config as config_lib
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.errors import UserError

_LARGEST_BATCH = 128  # images a call; fewer are padded to the next power of two, so that few sizes are compiled


class Predictions(NamedTuple):
    """What a network says of N images.

    Attributes:
        probabilities: float32 [N, num_classes], each row a distribution.
        labels: int64 [N], the likeliest class of each.
        names: N names of those classes.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    names: list[str]


class Model:
    """A trained network.

    Args:
        config: of its run.
        class_names: of its output, in order.
        image_shape: (H, W, 3) of the images it was trained on.
        variables: {"params", "batch_stats"}, on the first device.
        step: of its checkpoint.
        temperatures: by which logits are divided before they become probabilities, for `flip` False and True; 1.0 if not given.

    Attributes are those of the same names.
    """

    def __init__(
        self,
        config: ConfigDict,
        class_names: tuple[str, ...],
        image_shape: tuple[int, int, int],
        variables: Any,
        step: int,
        temperatures: Mapping[bool, float] = MappingProxyType({}),
    ) -> None:
        self.config, self.class_names, self.image_shape = config, class_names, image_shape
        self.variables, self.step, self.temperatures = variables, step, temperatures
        apply = models.from_config(config.model, len(class_names), train_state.make_mesh(1)).apply
        self._logits = jax.jit(partial(steps.eval_logits, apply, data=config.data), static_argnames="flip")

    def predict(self, images: Any, flip: bool = False) -> Predictions:
        """Class probabilities of images.

        Args:
            images: one [H, W, C] or many [N, H, W, C], an array, or a list of arrays of different sizes; C is 3, or 1 for
                grey. uint8 in 0..255, or floats in 0..1. Those of another size than `image_shape` are scaled, bilinearly,
                until they cover it, and the centre is cut out.
            flip: average the logits of each image and its mirror.

        Raises:
            ValueError: where they are no such images.
        """
        batch = as_batch(images, self.image_shape)
        probabilities = scipy.special.softmax(
            self.logits(batch, flip) / np.float32(self.temperatures.get(flip, 1.0)), axis=1
        )
        labels = probabilities.argmax(axis=1)
        return Predictions(probabilities, labels, [self.class_names[label] for label in labels])

    def logits(self, images: np.ndarray, flip: bool = False) -> np.ndarray:
        """float32 [N, num_classes] of images [N, H, W, 3] of `image_shape`, uint8 in 0..255 or float32 in 0..1."""
        images = images if images.dtype == np.uint8 else images * np.float32(255)
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(images), _LARGEST_BATCH):
            part = images[start : start + _LARGEST_BATCH]
            padding = (1 << (len(part) - 1).bit_length()) - len(part)
            padded = np.pad(part, [(0, padding), (0, 0), (0, 0), (0, 0)])
            found.append(np.asarray(self._logits(self.variables, padded, flip=flip))[: len(part)])
        return np.concatenate(found)


def as_batch(images: Any, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Images as `Model.predict` takes them -> [N, *image_shape], uint8 or float32."""
    if isinstance(images, list | tuple):
        parts = [as_batch(image, image_shape) for image in images]
        if len({part.dtype for part in parts}) > 1:
            parts = [part / np.float32(255) if part.dtype == np.uint8 else part for part in parts]
        return np.concatenate(parts) if parts else np.zeros((0, *image_shape), np.uint8)
    array = np.asarray(images)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        raise ValueError(f"images have shape {np.shape(images)}: they must be [N, H, W, C] or [H, W, C] with C 3 or 1")
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # also of nan
            raise ValueError(
                f"float images run from {array.min():g} to {array.max():g}: they must be in 0..1, or uint8"
            )
    elif array.dtype != np.uint8:
        raise ValueError(f"images are {array.dtype}: they must be uint8 in 0..255 or floats in 0..1")
    if array.shape[3] == 1:
        array = np.repeat(array, 3, axis=3)
    if array.shape[1:] != image_shape:
        fitted = [_fit(image, image_shape[:2]) for image in array]
        array = np.stack(fitted) if fitted else np.zeros((0, *image_shape), array.dtype)
    return array


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image [H, W, 3] of uint8 or float32, scaled and cut to another size."""
    if image.dtype == np.uint8:
        return np.asarray(sources.fit(Image.fromarray(image), size))
    return np.stack(
        [np.asarray(sources.fit(Image.fromarray(channel), size)) for channel in np.moveaxis(image, 2, 0)], 2
    )


def load(source: str | os.PathLike[str], checkpoint: str | int = "best") -> Model:
    """The network of a run.

    Args:
        source: the run's workdir, or a `.safetensors` that `resnet_jax.export` wrote.
        checkpoint: of a workdir: "best" by validation accuracy, "latest", or a step.

    Raises:
        UserError: where there is no such run, checkpoint or file, or it cannot be read.
    """
    path = Path(source).expanduser()
    return _load_file(path) if path.suffix == ".safetensors" else _load_run(path, checkpoint)


def _load_run(directory: Path, checkpoint: str | int) -> Model:
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} holds no run with checkpoints: give the workdir of one")
    logging.set_verbosity(logging.ERROR)  # Orbax says of each folder that it is only read
    accuracies = workdir.validation_accuracies(directory)
    with closing(Checkpoints(directory / "checkpoints", accuracies, read_only=True)) as checkpoints:
        step = checkpoints.choose(str(checkpoint))
        meta = checkpoints.meta(step)
        if "class_names" not in meta:
            raise UserError(
                f"{directory} is of a version that kept no class names with its checkpoints: train it again"
            )
        config, image_shape = config_lib.from_json(meta["config"]), tuple(meta["image_shape"])
        # The schedule is part of the optimizer, and of no use here: any number of steps an epoch will do.
        like = train_state.create(config, len(meta["class_names"]), image_shape, 1.0, train_state.make_mesh(1))
        state, _ = checkpoints.restore(step, like)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    kept = calibration.temperatures(directory, step)
    return Model(config, tuple(meta["class_names"]), image_shape, variables, step, kept)


def _load_file(path: Path) -> Model:
    try:
        with safe_open(path, "numpy") as file:
            meta = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        config, names, shape = (
            config_lib.from_json(meta["config"]),
            tuple(meta["class_names"]),
            tuple(meta["image_shape"]),
        )
        model = models.from_config(config.model, len(names), train_state.make_mesh(1))
        image = jax.ShapeDtypeStruct((1, *shape), np.float32)
        wanted = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
        variables = traverse_util.unflatten_dict(flat, sep="/")
        if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, wanted):
            raise ValueError("its weights are not those of its config")
        temperatures = {False: float(meta["temperature"])}
        return Model(config, names, shape, jax.device_put(variables), int(meta["checkpoint_step"]), temperatures)
    except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): give what python -m resnet_jax.export wrote") from error
