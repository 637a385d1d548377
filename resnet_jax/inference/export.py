"""Export a trained network as one file: a program for JAX or ONNX runtimes, or its weights.

    python -m resnet_jax export runs/final --format stablehlo|onnx|safetensors [--output FILE]

stablehlo     a program with its weights, for cpu, cuda and tpu and any number of images (`jax.export.deserialize`)
onnx          the same as an ONNX graph; needs `pip install 'resnet_jax[onnx]'`
safetensors   the weights, named by their paths; with --float16 the kernels take half the bytes

The programs take images uint8 [N, H, W, 3] in 0..255 and return logits float32 [N, classes]. Each file also holds the
config and the class names. `resnet_jax.load` reads .stablehlo and .safetensors. An export is read back and compared
with the network on random images; the file gets its final name only if they agree.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_jax import config as config_lib
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser, say_loading
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.host import __version__
from resnet_jax.inference import shipped
from resnet_jax.runs import stored_config

if TYPE_CHECKING:
    from resnet_jax.inference.trained_model import Model

Run = Callable[[np.ndarray], np.ndarray]  # images uint8 [N, H, W, 3] -> logits float32 [N, num_classes]

_OPSET = 17
_TOLERANCE = 1e-4  # of the largest logit: runtimes add float32 numbers in different orders
_CHECKED_ON = (1, 2, 17)  # batch sizes of the comparison


def metadata(model: "Model", views: int = 1) -> dict[str, Any]:
    """Return the metadata of an export as JSON values; of paths only the last name. `views` are those that it averages."""
    from resnet_jax import train_state
    from resnet_jax.inference import calibration

    without_paths = stored_config.without_paths(config_lib.flatten(model.config))
    return {
        "config": stored_config.to_json(config_lib.replaced(model.config, without_paths)),
        "class_names": list(model.class_names),
        "image_shape": list(model.image_shape),
        "checkpoint_step": model.step,
        "temperature": calibration.to_names(model.temperatures),
        **({"views": views} if views > 1 else {}),
        "weights": train_state.digest(model.variables),
        "resnet_jax": __version__,
    }


def sealed(meta: dict[str, Any], payload: str) -> str:
    """Return metadata as JSON, with a SHA-256 of it and the payload's digest to detect a corrupt file."""
    return json.dumps(meta | {"sha256": files.digest([meta, payload])})


def _is_kernel(leaf: Any) -> bool:
    """Whether a weight takes part in `--float16`: biases and batch norm's, which are few, do not."""
    return bool(leaf.ndim > 1)


def rounded(model: "Model") -> "Model":
    """Return the same network with its kernels rounded to float16; biases and batch norm's statistics stay as they are.

    Raises:
        UserError: if a weight is too large for float16.
    """
    import jax

    from resnet_jax.inference.trained_model import Model

    def of_leaf(leaf: Any) -> Any:
        return leaf.astype(np.float16).astype(leaf.dtype) if _is_kernel(leaf) else leaf

    variables = jax.tree.map(of_leaf, model.variables)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise UserError("--float16: a weight is above 65,504, the largest of float16: leave the flag out")
    return Model(model.config, model.class_names, model.image_shape, variables, model.step, model.temperatures)


def write_safetensors(model: "Model", path: Path, float16: bool = False) -> Run:
    """Write the variables, named by their paths ("params/stem_conv/kernel"), and read them back.

    Args:
        model: the network; with `float16` it is `rounded`.
        path: the file.
        float16: store the kernels in float16; a reader makes them float32 again.
    """
    from flax import traverse_util
    from safetensors.numpy import save

    from resnet_jax.inference import trained_model

    flat = traverse_util.flatten_dict(model.variables, sep="/")
    arrays = {
        name: np.array(leaf, np.float16 if float16 and _is_kernel(leaf) else None, order="C")
        for name, leaf in flat.items()
    }
    meta = metadata(model)
    # One key, because the order of several is not fixed.
    path.write_bytes(save(arrays, {"resnet_jax": sealed(meta, meta["weights"])}))
    return trained_model.load(path).logits


def write_stablehlo(model: "Model", path: Path, views: int = 1) -> Run:
    """Write the network as a `jax.export` program for any number of images, and read it back.

    Args:
        model: the network.
        path: the file.
        views: of each image, whose logits the program averages: `steps.average_over_views`.
    """
    import jax
    from jax import export

    from resnet_jax import models, steps

    network = models.from_config(model.config.model, len(model.class_names))  # XLA's convolutions run on every device
    variables = jax.device_get(model.variables)

    def logits(images: jax.Array) -> jax.Array:
        return steps.eval_logits(network.apply, variables, images, model.config.data, views)

    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *model.image_shape), np.uint8)
    program_bytes = export.export(jax.jit(logits), platforms=("cpu", "cuda", "tpu"))(images).serialize()
    path.write_bytes(program_bytes)
    with zipfile.ZipFile(path, "a") as archive:  # after the program, where its reader ignores it
        meta = sealed(metadata(model, views), hashlib.sha256(program_bytes).hexdigest())
        # Without a date, so that the same network gives the same bytes.
        archive.writestr(zipfile.ZipInfo("metadata.json"), meta)
    program = export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(program.call(images))


def write_onnx(model: "Model", path: Path, fold: bool = False, opset: int = _OPSET, views: int = 1) -> Run:
    """Write the network as an ONNX graph, and read it back.

    Args:
        model: the network.
        path: the file.
        fold: fold batch norm into the convolution right before it.
        opset: the version of ONNX's operators; an older runtime needs a lower one.
        views: as in `write_stablehlo`.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError("--format onnx needs onnx and onnxruntime: pip install 'resnet_jax[onnx]'") from error
    from resnet_jax.inference import onnx_graph

    if opset not in onnx_graph.OPSETS:
        raise UserError(f"--opset {opset} must be from {onnx_graph.OPSETS[0]} to {onnx_graph.OPSETS[-1]}")
    graph = onnx_graph.build(model, fold, opset, views)
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in metadata(model, views).items()})
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])


WRITERS: dict[str, Callable[..., Run]] = {
    "stablehlo": write_stablehlo,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
}


def largest_difference(model: "Model", run: Run, views: int = 1) -> float:
    """Return the largest difference of the logits, over `views` views, / the largest logit, on random images."""
    rng = np.random.default_rng()  # different images each time
    differences = []
    for count in _CHECKED_ON:
        images = rng.integers(0, 256, (count, *model.image_shape), np.uint8)
        expected = model.logits(images, views)
        differences.append(np.abs(run(images) - expected).max() / np.abs(expected).max())
    return float(max(differences))


def write(model: "Model", kind: str, path: Path, **settings: Any) -> float:
    """Write an export atomically, and return its `largest_difference` from the network.

    An ONNX export always computes in float32, and is compared with the network in float32, without the shorter products of
    accelerators. One with `float16` is compared with the `rounded` network.

    Raises:
        UserError: if the file cannot be written.
        RuntimeError: if the export differs from the network; then no file is written.
    """
    import jax

    precision = nullcontext()
    if kind == "onnx":
        model, precision = model.in_float32(), jax.default_matmul_precision("highest")  # not TF32, as on a GPU
    if settings.get("float16"):
        model = rounded(model)
    try:
        with files.atomic_file(path) as new, precision:
            difference = largest_difference(model, WRITERS[kind](model, new, **settings), settings.get("views", 1))
            if not difference <= _TOLERANCE:
                raise RuntimeError(
                    f"the {kind} export differs by {difference:.1e} of the largest logit: it was not written"
                )
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): choose another file") from error
    return difference


def main(argv: Sequence[str]) -> None:
    """Run the tool `export`."""
    parser = ArgumentParser("python -m resnet_jax export", __doc__)
    parser.add_argument(
        "run", metavar="RUN", type=command_line.local_path, help="workdir of a run, or its .safetensors export"
    )
    parser.add_argument("--format", required=True, choices=WRITERS, help="format of the file")
    parser.add_argument(
        "--output",
        type=command_line.local_path,
        metavar="FILE",
        help="file to write (default: RUN/model.FORMAT, or beside RUN)",
    )
    command_line.add_checkpoint_argument(parser)
    parser.add_argument(
        "--fold-batch-norm",
        dest="fold",
        action="store_true",
        help="fold batch norm into the convolution right before it (onnx only)",
    )
    parser.add_argument(
        "--opset", type=int, metavar="N", help=f"version of ONNX's operators, 13 to 21 (default: {_OPSET}; onnx only)"
    )
    parser.add_argument("--float16", action="store_true", help="store the kernels in float16 (safetensors only)")
    command_line.add_views_argument(parser)
    arguments = parser.parse_args(argv)
    beside = arguments.run.with_suffix("") if shipped.find(arguments.run).is_file() else arguments.run / "model"
    path = arguments.output or Path(f"{beside}.{arguments.format}")
    if shipped.is_file_of(arguments.run, path):
        raise UserError(f"the export would replace {arguments.run}: give another file with --output")
    if path.suffix != f".{arguments.format}":
        raise UserError(f"--output {path}: the file name must end in .{arguments.format}")
    if arguments.fold and arguments.format != "onnx":
        raise UserError("--fold-batch-norm needs --format onnx")
    if arguments.opset is not None and arguments.format != "onnx":
        raise UserError("--opset needs --format onnx")
    if arguments.float16 and arguments.format != "safetensors":
        raise UserError("--float16 needs --format safetensors")
    if arguments.views > 1 and arguments.format == "safetensors":
        raise UserError(f"--views={arguments.views} needs --format onnx or stablehlo: weights alone average nothing")
    say_loading(arguments.run)
    from resnet_jax.inference import trained_model  # after the checks, because JAX takes seconds to import

    model = trained_model.load(arguments.run, arguments.checkpoint)
    settings = {name: value for name in ("fold", "float16", "opset") if (value := getattr(arguments, name))}
    if arguments.views > 1:
        settings["views"] = arguments.views
    difference = write(model, arguments.format, path, **settings)
    if arguments.float16:
        difference = largest_difference(model, trained_model.load(path).logits)  # rounding included
    print(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB, differs from the network by at most {difference:.1e} of the largest logit"
    )
