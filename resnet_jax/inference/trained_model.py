"""A trained network to use: `model = load("runs/final")`, `model.predict(images)`.

It takes a run's folder alone: no data set and no TensorFlow.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from absl import logging
from flax import traverse_util
from jax import export
from ml_collections import ConfigDict
from PIL import Image
from safetensors import safe_open

from resnet_jax import config as config_lib
from resnet_jax import kernels, models, steps, train_state
from resnet_jax.data import sources
from resnet_jax.errors import UserError
from resnet_jax.inference import calibration
from resnet_jax.runs import metrics_log, stored_config
from resnet_jax.runs.checkpoints import Checkpoints

_LARGEST_BATCH = 128  # images a call; fewer are padded to the next power of two, so that few sizes are compiled
_LONGEST = 1000  # times as long as wide, an image that is scaled


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
        program: computes the logits of uint8 images, in place of `variables`.

    Attributes are those of the same names, but for the last.
    """

    def __init__(
        self,
        config: ConfigDict,
        class_names: tuple[str, ...],
        image_shape: tuple[int, int, int],
        variables: Any,
        step: int,
        temperatures: Mapping[bool, float] = MappingProxyType({}),
        program: export.Exported | None = None,
    ) -> None:
        self.config, self.class_names, self.image_shape = config, class_names, image_shape
        self._variables, self.step, self.temperatures = variables, step, temperatures
        network = _network(config, len(class_names))
        self._logits = jax.jit(partial(_run, program) if program else network, static_argnames="flip")
        self._saliency = jax.jit(partial(_saliency, network))

    def __repr__(self) -> str:
        """Parameters, classes, image size and step."""
        params = (
            "" if self._variables is None else f"{train_state.num_params(self._variables['params']):,} parameters, "
        )
        height, width, _ = self.image_shape
        return f"Model({params}{len(self.class_names)} classes, {height}x{width} images, step {self.step})"

    @property
    def variables(self) -> Any:
        """{"params", "batch_stats"}, on the first device.

        Raises:
            UserError: of a network that was loaded from a `.stablehlo`.
        """
        if self._variables is None:
            raise UserError("a .stablehlo holds a program and no weights: give the run's workdir, or a .safetensors")
        return self._variables

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
        temperature = np.float32(self.temperatures.get(flip, 1.0))
        probabilities = scipy.special.softmax(self.logits(images, flip) / temperature, axis=1)
        labels = probabilities.argmax(axis=1)
        return Predictions(probabilities, labels, [self.class_names[label] for label in labels])

    def logits(self, images: Any, flip: bool = False) -> np.ndarray:
        """float32 [N, num_classes]; arguments and errors are those of `predict`."""
        batch = as_batch(images, self.image_shape)
        batch = batch if batch.dtype == np.uint8 else batch * np.float32(255)
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(batch), _LARGEST_BATCH):
            part = batch[start : start + _LARGEST_BATCH]
            padding = (1 << (len(part) - 1).bit_length()) - len(part)
            padded = np.pad(part, [(0, padding), (0, 0), (0, 0), (0, 0)])
            found.append(np.asarray(self._logits(self._variables, padded, flip=flip))[: len(part)])
        return np.concatenate(found)

    def in_float32(self) -> "Model":
        """The network with all its computation in float32."""
        config = config_lib.replaced(self.config, {"model.dtype": "float32"})
        return Model(config, self.class_names, self.image_shape, self.variables, self.step, self.temperatures)

    def saliency(self, images: Any) -> np.ndarray:
        """How much each pixel matters for the likeliest class: the size of that logit's gradient, the largest of the colours'.

        Simonyan et al., Deep Inside Convolutional Networks, arXiv:1312.6034, section 3.1.

        Args:
            images: as `predict` takes them.

        Returns:
            float32 [N, H, W] of `image_shape`, in shares of the largest of each image.

        Raises:
            UserError: of a network that was loaded from a `.stablehlo`.
            ValueError: where they are no such images.
        """
        batch = as_batch(images, self.image_shape)
        scale = np.float32(1.0 if batch.dtype == np.uint8 else 255.0)
        maps = [np.asarray(self._saliency(self.variables, image[None] * scale))[0] for image in batch]
        return np.stack(maps) if maps else np.zeros((0, *self.image_shape[:2]), np.float32)


def _network(config: ConfigDict, num_classes: int) -> Callable[..., jax.Array]:
    """`steps.eval_logits` of the config's network."""
    network = models.from_config(config.model, num_classes, kernels.for_inference(train_state.make_mesh(1)))

    def logits(variables: Any, images: jax.Array, flip: bool = False) -> jax.Array:
        return steps.eval_logits(network.apply, variables, images, config.data, flip)

    return logits


def _run(program: export.Exported, variables: None, images: jax.Array, flip: bool = False) -> jax.Array:
    """The logits of a program that takes uint8 alone, to which floats in 0..255 are rounded."""
    pixels = images if images.dtype == np.uint8 else jnp.round(images).astype(np.uint8)
    logits: jax.Array = program.call(pixels)
    return (logits + program.call(pixels[:, :, ::-1])) / 2 if flip else logits


def _saliency(network: Callable[..., jax.Array], variables: Any, images: jax.Array) -> jax.Array:
    """[N, H, W] of images [N, H, W, 3], floats in 0..255."""
    gradient = jax.grad(lambda pixels: network(variables, pixels).max(axis=1).sum())(images)
    largest = jnp.abs(gradient).max(axis=3)
    return largest / jnp.maximum(largest.max(axis=(1, 2), keepdims=True), jnp.finfo(jnp.float32).tiny)


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
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # also of nan
            raise ValueError(
                f"float images run from {array.min():g} to {array.max():g}: they must be in 0..1, or uint8"
            )
        array = array.astype(np.float32)
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
    if max(image.shape[:2]) > _LONGEST * min(image.shape[:2]):  # scaled, it would fill the memory
        raise ValueError(f"an image has shape {image.shape}: one side may be {_LONGEST} times as long as the other")
    if image.dtype == np.uint8:
        return np.asarray(sources.fit(Image.fromarray(image), size))
    return np.stack(
        [np.asarray(sources.fit(Image.fromarray(channel), size)) for channel in np.moveaxis(image, 2, 0)], 2
    )


def load(source: str | os.PathLike[str], checkpoint: str | int = "best") -> Model:
    """The network of a run.

    Args:
        source: the run's workdir, or a `.safetensors` or `.stablehlo` that `python -m resnet_jax export` wrote. A `.stablehlo` is a
            program: load those that you trust. It has no `variables` and rounds floats to uint8.
        checkpoint: of a workdir: "best" by validation accuracy, "latest", or a step.

    Raises:
        UserError: where there is no such run, checkpoint or file, or it cannot be read.
    """
    path = Path(os.path.expanduser(source))
    if path.suffix not in _FILES:
        return _load_run(path, checkpoint)
    if checkpoint != "best":
        raise UserError(
            f"{path} holds one checkpoint, and {checkpoint} was asked for: leave that out, or give the workdir"
        )
    return _load_file(path)


def _load_run(directory: Path, checkpoint: str | int) -> Model:
    if not (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory} holds no run with checkpoints: give the workdir of one, or a .safetensors or .stablehlo of it"
        )
    logging.set_verbosity(logging.ERROR)  # Orbax says of each folder that it is only read
    accuracies = metrics_log.validation_accuracies(directory)
    with closing(Checkpoints(directory / "checkpoints", accuracies, read_only=True)) as checkpoints:
        step = checkpoints.choose(str(checkpoint))
        meta = checkpoints.meta(step)
        if "class_names" not in meta:
            raise UserError(
                f"{directory} is of a version that kept no class names with its checkpoints: train it again"
            )
        config, image_shape = stored_config.from_json(meta["config"]), tuple(meta["image_shape"])
        # The schedule is part of the optimizer, and of no use here: any number of steps an epoch will do.
        like = train_state.create(config, len(meta["class_names"]), image_shape, 1.0, train_state.make_mesh(1))
        state, _ = checkpoints.restore(step, like)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    kept = calibration.temperatures(directory, step)
    return Model(config, tuple(meta["class_names"]), image_shape, variables, step, kept)


def _load_file(path: Path) -> Model:
    try:
        meta, variables, program, payload = _FILES[path.suffix](path)
        if meta.pop("sha256") != seal(meta, payload):
            raise ValueError("it is damaged: its SHA-256 is another")
        config, names = stored_config.from_json(meta["config"]), tuple(meta["class_names"])
        shape, step = tuple(meta["image_shape"]), int(meta["checkpoint_step"])
        if program:
            if [a.shape[1:] for a in (*program.in_avals, *program.out_avals)] != [shape, (len(names),)]:
                raise ValueError("its program does not map such images to such classes")
        else:
            model = models.from_config(config.model, len(names))
            image = jax.ShapeDtypeStruct((1, *shape), np.float32)
            wanted = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
            if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, wanted):
                raise ValueError("its weights are not those of its config")
        return Model(config, names, shape, variables, step, calibration.from_names(meta["temperature"]), program)
    except KeyError as error:
        raise UserError(f"{path} cannot be used (it lacks {error}): export it again, with this version") from error
    except Exception as error:  # what a damaged file makes its reader raise is of every kind
        reason = f"{error or type(error).__name__}"[:200]
        raise UserError(
            f"{path} cannot be used ({reason}): give a file that python -m resnet_jax export wrote"
        ) from error


def seal(meta: Mapping[str, Any], payload: str) -> str:
    """SHA-256 of what an exported file says, as JSON holds it, and of the digest of what it holds, in hexadecimal."""
    return hashlib.sha256(json.dumps([meta, payload], sort_keys=True).encode()).hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any, None, str]:
    with safe_open(path, "numpy") as file:
        meta = json.loads((file.metadata() or {})["resnet_jax"])
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    variables = jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))
    return meta, variables, None, train_state.digest(variables)


def _read_stablehlo(path: Path) -> tuple[dict[str, Any], None, export.Exported, str]:
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("metadata.json"))
        program = path.read_bytes()[: archive.getinfo("metadata.json").header_offset]
    return meta, None, export.deserialize(bytearray(program)), hashlib.sha256(program).hexdigest()


_FILES: dict[str, Callable[[Path], tuple[dict[str, Any], Any, export.Exported | None, str]]] = {
    ".safetensors": _read_safetensors,
    ".stablehlo": _read_stablehlo,
}
