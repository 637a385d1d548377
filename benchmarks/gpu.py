r"""Measure the report's model on a GPU and write results/*.json: `python -m benchmarks.gpu PART ...`, `make gpu` for all.

    final       train it, bfloat16, data on the device, a run a seed   -> final-<gpu>-seed<seed>.json
    step        the train step over batch sizes, against PyTorch       -> step-<gpu>.json
    resnet18    ResNet-18 beside it                                    -> resnet18-<gpu>.json

Each part can be started again: a run goes on where it was, and batch sizes join those that are in the file. The first run
compiles, unless the compilation cache is warm; the others load what it compiled. On a CPU, to see that it works:

    JAX_PLATFORMS=cpu python -m benchmarks.gpu final step resnet18 --config configs/final.py:smoke --data digits --epochs 1 --seeds 0 \
        --batch-sizes 32 64 --seconds 0.1 --no-torch --channels 8 8 8 8 --runs /tmp/runs --results /tmp/results
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parent.parent


def run(*command: object) -> None:
    """Run a Python command in the repository's folder; where it fails this ends too, with its exit code."""
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def benchmark(*flags: object) -> dict[str, Any]:
    """The result of `resnet_jax.benchmark`."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "result.json"
        run("-m", "resnet_jax.benchmark", *flags, f"--output={output}")
        return json.loads(output.read_text())


def config_flags(arguments: argparse.Namespace) -> list[str]:
    """The config that every part measures."""
    return [
        f"--config={arguments.config}",
        f"--config.data.name={arguments.data}",
        "--config.model.dtype=bfloat16",
        "--config.pipeline=device",
    ]


def result_path(arguments: argparse.Namespace, part: str, environment: dict[str, Any], suffix: str = "") -> Path:
    """Where a result goes: the GPU is named as its kind does, "NVIDIA H100 80GB HBM3" -> h100."""
    kind = environment["devices"][0]
    gpu = re.search(r"\b[A-Z]{1,3}\d+\w*", kind)
    return arguments.results / f"{part}-{(gpu[0] if gpu else kind.split()[-1]).lower()}{suffix}.json"


def check_machine(results: Path) -> None:
    """Refuse, before anything is measured, a Python without the packages or a GPU, and results that could not be written."""
    probe = "import resnet_jax.setup, resnet_jax.workdir, jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.splitlines() or ["it ended"])[-1]
        raise UserError(
            f"{sys.executable}: {reason}: run pip install -e '.[cuda]' there, or give make GPU_PYTHON=PYTHON"
        )
    if found.stdout.split()[-1] == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError("JAX finds no GPU: install jax[cuda], or set JAX_PLATFORMS=cpu to see that it works")
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {results}: {error.strerror}: give a folder that can be written") from error


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    new = path.with_suffix(".incomplete")
    new.write_text(json.dumps(result, indent=2) + "\n")
    new.replace(path)
    print(path, flush=True)


def final(arguments: argparse.Namespace) -> None:
    """Train with each seed; to what each run says of itself, add its speed."""
    flops = None
    for seed in arguments.seeds:
        directory = (arguments.runs / f"final-seed{seed}").absolute()
        flags = [f"--config.seed={seed}", f"--config.num_epochs={arguments.epochs}", f"--workdir={directory}"]
        run("launch.py", *config_flags(arguments), *flags)
        if flops is None:
            (case,) = benchmark(*config_flags(arguments), "--only=save", "--repeats=1")["cases"]
            flops = case["train_flops_per_image"]
        result = json.loads((directory / "result.json").read_text())
        rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        speed = statistics.median(row["images_per_second"] for row in rows if row.get("images_per_second"))
        result |= {
            "seconds_after_startup": result["seconds"] - result["startup_seconds"],
            "images_per_second": speed,
            "train_flops_per_image": flops,
            "peak_tflops": arguments.peak_tflops,
            "share_of_peak": speed * flops / 1e12 / arguments.peak_tflops,
        }
        write(result_path(arguments, "final", result["environment"], f"-seed{seed}"), result)


def of_what(result: dict[str, Any]) -> tuple[Any, ...]:
    """What cases must share to stand in one result."""
    return result["config"], result["environment"]["git"], result["environment"]["versions"]


def step(arguments: argparse.Namespace) -> None:
    """Time the train step at each batch size; a result is written after each, with the others of the same config and commit."""
    for batch_size in arguments.batch_sizes:
        flags = ["--only=train_step", f"--batch-sizes={batch_size}", f"--seconds={arguments.seconds}"]
        result = benchmark(*config_flags(arguments), *flags, *["--against-torch"] * arguments.torch)
        path = result_path(arguments, "step", result["environment"])
        before = json.loads(path.read_text()) if path.exists() else result
        if of_what(before) != of_what(result):
            before = result
            print(f"{path} was of another config or commit: begun anew")
        others = [case for case in before["cases"] if case["batch_size"] != batch_size]
        write(path, result | {"cases": sorted(others + result["cases"], key=lambda case: case["batch_size"])})


def resnet18(arguments: argparse.Namespace) -> None:
    """Compare the model with ResNet-18: parameters, operations, seconds an epoch."""
    network = [f"--config.model.channel_list={tuple(arguments.channels)}", "--config.model.block_list=(2,2,2,2)"]
    flags = [*config_flags(arguments), "--only=train_step,end_to_end", f"--seconds={arguments.seconds}"]
    results = {
        "final": benchmark(*flags),
        "resnet18": benchmark(*flags, *network, "--config.model.max_params=0"),
    }
    figures = {}
    for name, result in results.items():
        (case,) = result["cases"]
        rate = case["figures"]["end_to_end"]["median"]
        figures[name] = {
            "num_params": case["num_params"],
            "train_flops_per_image": case["train_flops_per_image"],
            "seconds_per_epoch": case["dataset"]["splits"]["train"] / rate,
        }
    fewer = {name: 1 - figures["final"][name] / figures["resnet18"][name] for name in figures["final"]}
    comparison = figures | {"final_has_less_by": fewer, "benchmarks": results}
    write(result_path(arguments, "resnet18", results["final"]["environment"]), comparison)


def main() -> None:
    """The command line."""
    parts = {"final": final, "step": step, "resnet18": resnet18}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--config", default="configs/final.py", help="what to measure")
    parser.add_argument("--data", default="npz:cifar10.npz", help="config.data.name")
    parser.add_argument("--epochs", type=float, default=50.0, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of the benchmark")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch too")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of a bfloat16 matrix product on this GPU")
    parser.add_argument("--channels", type=int, nargs=4, default=[64, 128, 256, 512], help="of ResNet-18's stages")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()
    with exit_on_user_error():
        check_machine(arguments.results)
    for part in arguments.parts:
        parts[part](arguments)


if __name__ == "__main__":
    main()
