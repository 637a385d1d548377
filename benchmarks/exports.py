"""Measure the size and speed of a run's exports, for one image and for a batch, compared with PyTorch.

    python -m benchmarks.exports RUN --torch-python=PYTHON --output results/exports-NAME-cpu.json

It measures alternately, on a CPU: the network of `resnet_jax.load`, its StableHLO program, its ONNX file in
onnxruntime, with and without batch norm folded, and the same network in PyTorch, eager, channels_last
(`benchmarks/torch_step.py`). Each takes uint8 images and returns logits as a NumPy array. PyTorch's network has other weights of the same speed.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure, timing, tool
from resnet_jax import config as config_lib
from resnet_jax import train_state
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser, run
from resnet_jax.inference import export, trained_model

BATCH_SIZES = (1, 128)
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "stablehlo": ("stablehlo", {}),
    "onnx": ("onnx", {}),
    "onnx_folded": ("onnx", {"fold": True}),
    "safetensors": ("safetensors", {}),
}


def written(model: trained_model.Model, directory: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Write each export of a model; return their paths and differences, as `export.write` returns them."""
    paths, differences = {}, {}
    for name, (kind, settings) in WRITTEN.items():
        paths[name] = directory / f"{name}.{kind}"
        differences[name] = export.write(model, kind, paths[name], **settings)
    return paths, differences


def runners(model: trained_model.Model, paths: dict[str, Path]) -> dict[str, export.Run]:
    """Return functions that compute logits: the model and the exports that are programs."""
    import onnxruntime

    program = jax.jit(jax.export.deserialize(bytearray(paths["stablehlo"].read_bytes())).call)
    programs: dict[str, export.Run] = {
        "load": model.logits,
        "stablehlo": lambda images: np.asarray(program(images)),
    }
    for name in ("onnx", "onnx_folded"):
        session = onnxruntime.InferenceSession(paths[name], providers=["CPUExecutionProvider"])
        programs[name] = lambda images, session=session: session.run(["logits"], {"images": images})[0]
    return programs


def contender(run: export.Run, images: np.ndarray) -> timing.Contender:
    """Return a contender for a function that returns when it is done."""
    return partial(timing.throughput, partial(run, images), lambda logits: None, len(images))


def case(
    model: trained_model.Model,
    programs: dict[str, export.Run],
    batch_size: int,
    torch: Any,
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    """Measure a case of the result: the milliseconds of a batch, and the ratio to PyTorch's."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *model.image_shape), np.uint8)
    contenders: dict[str, Callable[[float], float]] = {name: contender(run, images) for name, run in programs.items()}
    rates = timing.interleave(contenders | {"torch": torch}, repeats, seconds)
    figures = {
        name: timing.summary([1000 * batch_size / rate for rate in repeated], "ms") for name, repeated in rates.items()
    }
    for name in programs:
        rounds = zip(rates["torch"], rates[name], strict=True)
        figures[f"{name} / torch"] = timing.summary([torch_rate / rate for torch_rate, rate in rounds], "ratio")
    return {
        "batch_size": batch_size,
        "dtype": model.config.model.dtype,
        "devices": 1,
        "num_params": train_state.num_params(model.variables["params"]),
        "figures": figures,
    }


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m benchmarks.exports", __doc__)
    parser.add_argument("run", metavar="RUN", help="workdir of a run")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument(
        "--repeats", type=command_line.whole_number(1), default=5, help="measurements of each (default: 5)"
    )
    parser.add_argument(
        "--seconds", type=command_line.seconds, default=5.0, help="minimum seconds of each measurement (default: 5)"
    )
    tool.add_output_argument(parser)
    arguments = parser.parse_args(argv)
    tool.check_output(arguments.output)
    python = tool.find_torch_python(arguments.torch_python)
    with tempfile.TemporaryDirectory() as scratch:
        model = trained_model.load(arguments.run)
        paths, differences = written(model, Path(scratch))
        programs, cases = runners(model, paths), []
        for batch_size in BATCH_SIZES:
            config = config_lib.replaced(model.config, {"batch_size": batch_size})
            torch_process = measure.torch_step(config, len(model.class_names), model.image_shape, python, "predict")
            with torch_process as (torch, about_torch):
                cases.append(case(model, programs, batch_size, torch, arguments.repeats, arguments.seconds))
        result = {
            "cases": cases,
            "bytes": {name: path.stat().st_size for name, path in paths.items()} | {"torch": about_torch["bytes"]},
            "differences": differences,
            "torch": about_torch,
        }
        tool.write_result(arguments.output, result, model.config)


if __name__ == "__main__":
    run(main)
