"""Load and use a trained network: `model = load("runs/final")`, `model.predict(images)`.

This needs only the folder of a run, and neither the data set nor TensorFlow.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from PIL import Image
from safetensors import safe_open

from resnet_jax import config as config_lib
from resnet_jax import kernels, models, steps, train_state
from resnet_jax.data import images as images_lib
from resnet_jax.disk import cache, files
from resnet_jax.errors import UserError, is_out_of_memory, reason
from resnet_jax.inference import calibration, shipped
from resnet_jax.runs import stored_config

LARGEST_BATCH = 128  # images per call; smaller batches are padded to a power of two, so that few sizes are compiled
_ROUNDING = 1e-5  # by which floats may leave 0..1


class Predictions(NamedTuple):
    """Predictions for N images.

    Attributes:
        probabilities: float32 [N, num_classes], each row a distribution.
        labels: int64 [N], the most likely class of each.
        names: the names of those N classes.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    names: list[str]


class Model:
    """A trained network.

    Args:
        config: the config of its run.
        class_names: names of its outputs, in order.
        image_shape: (H, W, 3) of the images it was trained on.
        variables: {"params", "batch_stats"}, on the first device.
        step: number of steps done at its checkpoint.
        temperatures: logits are divided by these before the softmax, by the number of `views`; 1.0 if missing.
        program: computes the logits of uint8 images instead of `variables`.
        program_views: how many views of an image `program` averages.

    All arguments but the last two are attributes.
    """

    def __init__(
        self,
        config: ConfigDict,
        class_names: tuple[str, ...],
        image_shape: tuple[int, int, int],
        variables: Any,
        step: int,
        temperatures: Mapping[int, float] = MappingProxyType({}),
        program: export.Exported | None = None,
        program_views: int = 1,
    ) -> None:
        self.config, self.class_names, self.image_shape = config, class_names, image_shape
        self._variables, self.step, self.temperatures = variables, step, temperatures
        self._program_views, self._process = program_views, os.getpid()
        network = _network(config, len(class_names))
        self._logits = jax.jit(partial(_run, program) if program else network, static_argnames="views")
        self._saliency = jax.jit(partial(_saliency, network))

    def __repr__(self) -> str:
        """Show the number of parameters and classes, the image size and the step."""
        params = (
            "" if self._variables is None else f"{train_state.num_params(self._variables['params']):,} parameters, "
        )
        height, width, _ = self.image_shape
        return f"Model({params}{len(self.class_names)} classes, {height}x{width} images, step {self.step})"

    @property
    def variables(self) -> Any:
        """The weights, {"params", "batch_stats"}, on the first device.

        Raises:
            UserError: if the network was loaded from a `.stablehlo`.
        """
        if self._variables is None:
            raise UserError("a .stablehlo holds a program without weights: give the run's workdir, or a .safetensors")
        return self._variables

    def predict(self, images: Any, views: int = 1) -> Predictions:
        """Predict the class probabilities of images.

        Args:
            images: an image of Pillow, an array [H, W], [H, W, C] or [N, H, W, C], or a list of these of any sizes; an empty list,
                or N = 0, gives empty predictions, [0, num_classes]. C is 3, 1 for grey, or 4 with transparency, which becomes
                white. uint8 in 0..255, or floats in 0..1. Images of another size than `image_shape` are scaled, bilinearly,
                until they cover it, and the centre is cropped.
            views: 1 for the image; 2 averages its logits and those of its mirror image; 6 also those of both moved by a pixel:
                `steps.average_over_views`.

        Raises:
            UserError: in a process that was forked after the network was loaded, or if the network is a program that averages
                views itself, and `views` is not 1.
            ValueError: if the images are not as described, or `views` is another number.
        """
        temperature = np.float32(self.temperatures.get(max(views, self._program_views), 1.0))
        probabilities = calibration.softmax(self.logits(images, views) / temperature)
        labels = probabilities.argmax(axis=1)
        return Predictions(probabilities, labels, [self.class_names[label] for label in labels])

    def logits(self, images: Any, views: int = 1) -> np.ndarray:
        """Return the logits, float32 [N, num_classes]; arguments and errors are those of `predict`."""
        self._check_process()
        if views not in config_lib.VIEWS or isinstance(views, bool):  # True was `flip` once
            raise ValueError(f"views must be 1, 2 or 6, got {views}")
        if views > 1 and self._program_views > 1:
            raise UserError(f"this program averages {self._program_views} views itself: leave --views out")
        batch = as_batch(images, self.image_shape)
        batch = batch if batch.dtype == np.uint8 else batch * np.float32(255)
        logits = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(batch), LARGEST_BATCH):
            part = batch[start : start + LARGEST_BATCH]
            padding = (1 << (len(part) - 1).bit_length()) - len(part)
            padded = np.pad(part, [(0, padding), (0, 0), (0, 0), (0, 0)])
            logits.append(np.asarray(self._logits(self._variables, padded, views=views))[: len(part)])
        return np.concatenate(logits)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UserError(
                'JAX does not survive a fork: load the network in each process, and start it with multiprocessing\'s "spawn"'
            )

    def in_float32(self) -> "Model":
        """Return the same network, computing everything in float32."""
        config = config_lib.replaced(self.config, {"model.dtype": "float32"})
        return Model(config, self.class_names, self.image_shape, self.variables, self.step, self.temperatures)

    def saliency(self, images: Any) -> np.ndarray:
        """Return the saliency of each pixel: the largest logit's absolute gradient, the maximum over the colours.

        Simonyan et al., Deep Inside Convolutional Networks, arXiv:1312.6034, section 3.1.

        Args:
            images: as for `predict`.

        Returns:
            float32 [N, H, W] with the H and W of `image_shape`, divided by the maximum of each image.

        Raises:
            UserError: if the network was loaded from a `.stablehlo`.
            ValueError: if the images are not as described.
        """
        self._check_process()
        batch = as_batch(images, self.image_shape)
        scale = np.float32(1.0 if batch.dtype == np.uint8 else 255.0)
        maps = [np.asarray(self._saliency(self.variables, image[None] * scale))[0] for image in batch]
        return np.stack(maps) if maps else np.zeros((0, *self.image_shape[:2]), np.float32)


def _network(config: ConfigDict, num_classes: int) -> Callable[..., jax.Array]:
    """Return `steps.eval_logits` of the network that a config describes."""
    layers = kernels.layers_for(train_state.make_mesh(1), config.model)
    network = models.from_config(config.model, num_classes, layers)

    def logits(variables: Any, images: jax.Array, views: int = 1) -> jax.Array:
        return steps.eval_logits(network.apply, variables, images, config.data, views)

    return logits


def _run(program: export.Exported, variables: None, images: jax.Array, views: int = 1) -> jax.Array:
    """Return the logits of a program that takes only uint8; floats in 0..255 are rounded."""
    pixels = images if images.dtype == np.uint8 else jnp.round(images).astype(np.uint8)
    return steps.average_over_views(program.call, pixels, views)


def _saliency(network: Callable[..., jax.Array], variables: Any, images: jax.Array) -> jax.Array:
    """Return the saliency [N, H, W] of images [N, H, W, 3], floats in 0..255."""
    gradient = jax.grad(lambda pixels: network(variables, pixels).max(axis=1).sum())(images)
    largest = jnp.abs(gradient).max(axis=3)
    return largest / jnp.maximum(largest.max(axis=(1, 2), keepdims=True), jnp.finfo(jnp.float32).tiny)


def as_batch(images: Any, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Convert images as `Model.predict` takes them to [N, *image_shape], uint8 or float32."""
    if isinstance(images, list | tuple):
        parts = [as_batch(image, image_shape) for image in images]
        if len({part.dtype for part in parts}) > 1:
            parts = [part / np.float32(255) if part.dtype == np.uint8 else part for part in parts]
        return np.concatenate(parts) if parts else np.zeros((0, *image_shape), np.uint8)
    if isinstance(images, Image.Image):
        images = images_lib.to_rgb(images)
    array = np.asarray(images)
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4) or 0 in array.shape[1:]:
        raise ValueError(
            f"images have shape {np.shape(images)}: they must be [N, H, W, C], [H, W, C] or [H, W], with C 3, 4 or 1"
        )
    if np.issubdtype(array.dtype, np.floating):
        if array.size and not (array.min() >= -_ROUNDING and array.max() <= 1 + _ROUNDING):  # true for nan too
            raise ValueError(
                f"float images have values from {array.min():g} to {array.max():g}: they must be in 0..1, or uint8"
            )
        array = array.clip(0, 1).astype(np.float32)
    elif array.dtype != np.uint8:
        raise ValueError(f"images are {array.dtype}: they must be uint8 in 0..255 or floats in 0..1")
    if array.shape[3] == 1:
        array = np.repeat(array, 3, axis=3)
    if array.shape[3] == 4 and array.dtype == np.uint8:
        opaque = [np.asarray(images_lib.to_rgb(Image.fromarray(image))) for image in array]
        array = np.stack(opaque) if opaque else array[..., :3]
    elif array.shape[3] == 4:
        alpha = array[..., 3:]
        array = array[..., :3] * alpha + (1 - alpha)
    if array.shape[1:] != image_shape:
        fitted = [_fit(image, image_shape[:2]) for image in array]
        array = np.stack(fitted) if fitted else np.zeros((0, *image_shape), array.dtype)
    return array


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale and crop an image [H, W, 3] of uint8 or float32 to another size."""
    if max(image.shape[:2]) > images_lib.MAX_RATIO * min(image.shape[:2]):  # the scaled image would fill the memory
        raise ValueError(
            f"an image has shape {image.shape}: one side may be at most {images_lib.MAX_RATIO} times as long as the other"
        )
    if image.dtype == np.uint8:
        return np.asarray(images_lib.fit(Image.fromarray(image), size))
    return np.stack(
        [np.asarray(images_lib.fit(Image.fromarray(channel), size)) for channel in np.moveaxis(image, 2, 0)], 2
    )


def load(source: str | os.PathLike[str], checkpoint: str | int = "best") -> Model:
    """Load a trained network.

    Args:
        source: a run's workdir, a `.safetensors` or `.stablehlo` from `python -m resnet_jax export`, or the name of weights
            that ship with the package, "final-cifar10". A `.stablehlo` is a program: load only files that you trust. It
            has no `variables` and rounds floats to uint8.
        checkpoint: "best", as the run chose it; "latest"; or a step. An export holds only one.

    Raises:
        UserError: if the run, checkpoint or file does not exist or cannot be read.
    """
    cache.keep_programs()
    path = shipped.find(source)
    if path.suffix not in _FILES:
        return _load_run(path, checkpoint)
    if checkpoint != "best":
        raise UserError(f"{path} holds only one checkpoint: do not ask for {checkpoint}, or give the run's workdir")
    return _load_file(path)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Let absl log nothing less than an error in this block, or in a function that it decorates."""
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


@_without_warnings()  # Orbax warns that it only reads the folder
def _load_run(directory: Path, checkpoint: str | int) -> Model:
    if not (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory} holds no run with checkpoints: give the workdir of a run, its .safetensors or .stablehlo export, or "
            + " or ".join(shipped.names())
        )
    # Here, because Orbax takes half a second to import, and a file needs none of it.
    from resnet_jax.runs import checkpoints

    meta, _ = checkpoints.read_chosen(directory, str(checkpoint), checkpoints.Checkpoints.meta)
    config, names = stored_config.from_json(meta["config"]), tuple(meta["class_names"])
    height, width, depth = meta["image_shape"]
    mesh = train_state.make_mesh(1)
    # Shapes suffice. The state needs a schedule, which is not used here: any number of steps per epoch works.
    shapes = jax.eval_shape(partial(train_state.create, config, len(names), (height, width, depth), 1.0, mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), shapes)
    variables, step = checkpoints.read_chosen(
        directory, str(checkpoint), lambda saved, step: saved.restore_variables(step, like)
    )
    temperatures = calibration.temperatures(directory, step)
    return Model(config, names, (height, width, depth), variables, step, temperatures)


def _load_file(path: Path) -> Model:
    try:
        meta, variables, program = _FILES[path.suffix](files.readable(path))
        config, names = stored_config.from_json(meta["config"]), tuple(meta["class_names"])
        shape, step = tuple(meta["image_shape"]), int(meta["checkpoint_step"])
        if program:
            if [a.shape[1:] for a in (*program.in_avals, *program.out_avals)] != [shape, (len(names),)]:
                raise ValueError("its program has other image or class shapes than its metadata")
        else:
            if sum(config.model.block_list) > len(jax.tree.leaves(variables)):  # else building it may take for ever
                raise ValueError("its weights do not fit its config")
            model = models.from_config(config.model, len(names))
            image = jax.ShapeDtypeStruct((1, *shape), np.float32)
            wanted = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
            if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, wanted):
                raise ValueError("its weights do not fit its config")
        if (views := meta.get("views", 1)) not in config_lib.VIEWS:
            raise ValueError(f"its program averages {views} views")
        temperatures = calibration.from_names(meta["temperature"])
        return Model(config, names, shape, variables, step, temperatures, program, views)
    except KeyError as error:
        raise UserError(f"{path} cannot be used (it lacks {error}): export it again with this version") from error
    except Exception as error:  # a reader can raise anything for a corrupt file
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} cannot be used ({reason(error)}): give a file from python -m resnet_jax export"
        ) from error


def _check_seal(meta: dict[str, Any], payload: str) -> None:
    """Check the SHA-256 that `export.sealed` adds to an export's metadata, and remove it."""
    if meta.pop("sha256") != files.digest([meta, payload]):
        raise ValueError("it is corrupt: its SHA-256 differs")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any, None]:
    with safe_open(path, "numpy") as file:
        meta = json.loads((file.metadata() or {})["resnet_jax"])
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
    flat = {name: leaf.astype(np.float32) if leaf.dtype == np.float16 else leaf for name, leaf in flat.items()}
    variables = jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))
    _check_seal(meta, train_state.digest(variables))
    return meta, variables, None


def _read_stablehlo(path: Path) -> tuple[dict[str, Any], None, export.Exported]:
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("metadata.json"))
        program = path.read_bytes()[: archive.getinfo("metadata.json").header_offset]
    _check_seal(meta, hashlib.sha256(program).hexdigest())  # before C++ reads what may be damaged
    return meta, None, export.deserialize(bytearray(program))


_FILES: dict[str, Callable[[Path], tuple[dict[str, Any], Any, export.Exported | None]]] = {
    ".safetensors": _read_safetensors,
    ".stablehlo": _read_stablehlo,
}
