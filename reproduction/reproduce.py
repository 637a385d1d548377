r"""Measure the report's figures again and write results/*.json: `python -m reproduction.reproduce [PART ...] [--config.FIELD=VALUE ...]`.

On a GPU it runs all of these, in bfloat16 unless stated otherwise, with the data on the device:

    final         configs/final.py, one run per seed                         -> final-<gpu>-seed<seed>.json
    final_f32     the same in float32, the first seed                    -> final-f32-<gpu>.json
    sgd           configs/sgd.py, one run per seed                           -> sgd-<gpu>-seed<seed>.json
    autoaugment   final.py:full with AutoAugment, the first seed         -> final-autoaugment-<gpu>.json
    best          configs/best.py, one run per seed                          -> best-<gpu>-seed<seed>.json
    speedrun      configs/speedrun.py, one run per seed                      -> speedrun-<gpu>-seed<seed>.json
    step          the train step over batch sizes, against PyTorch       -> step-<gpu>.json
    resnet18      ResNet-18 and the model                                -> resnet18-<gpu>.json

`best` and `speedrun` are also evaluated on six views of each test image: "test_accuracy_over_views" and
"evaluation_seconds", which is the time of the whole command. "total_seconds" counts that and the training but for the startup of its
last session.

On a CPU, where the others take days, it runs resnet18 and speedrun in float32, and these:

    narrow        configs/narrow.py: SGD, AdamW, each also plain; one run per seed -> cpu-narrow-<variant>-seed<seed>.json
    ladder        configs/ladder.py: each of its changes; one run per seed, added to  -> ladder-<device>.json

Each part can be rerun: runs resume, and batch sizes are added to the file. The first run compiles unless the
compilation cache is warm; the others use the cache. A `--config.FIELD=VALUE` changes the config of every part, whose results then need a
folder of their own. To test the GPU's parts on a CPU with a tiny network:

    JAX_PLATFORMS=cpu python -m reproduction.reproduce final sgd autoaugment best speedrun step --data digits --epochs 12 --seeds 0 \
        --batch-sizes 32 64 --seconds 0.1 --no-torch --runs /tmp/runs --results /tmp/results \
        --config.model.channel_list='(8,8,8)' --config.model.block_list='(0,0,0)' --config.data.image_size=16
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.disk import files
from resnet_jax.errors import UserError

ROOT = Path(__file__).parent.parent
_FLAGS = {"seed": "--seeds", "num_epochs": "--epochs", "data.name": "--data", "model.dtype": "--dtype"}  # by field


def run(*command: object) -> None:
    """Run a Python command in the repository's folder; if it fails, exit with its exit code."""
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def benchmark(*flags: object) -> dict[str, Any]:
    """Run a benchmark and return its result."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "result.json"
        run("-m", "resnet_jax", "benchmark", *flags, f"--output={output}")
        return json.loads(output.read_text("utf-8"))


def config_flags(arguments: argparse.Namespace, config: str | None = None, dtype: str | None = None) -> list[str]:
    """Return the flags of a config on this machine."""
    return [
        f"--config={config or arguments.config}",
        f"--config.data.name={arguments.data}",
        f"--config.model.dtype={dtype or arguments.dtype}",
        "--config.pipeline=device",
        *arguments.overrides,
    ]


def result_path(arguments: argparse.Namespace, part: str, environment: dict[str, Any], suffix: str = "") -> Path:
    """Return the path of a result, with a short name of the device: "NVIDIA H100 80GB HBM3" -> h100."""
    kind = environment["devices"][0]
    gpu = re.search(r"\b[A-Z]{1,3}\d+\w*", kind)
    return arguments.results / f"{part}-{(gpu[0] if gpu else kind.split()[-1]).lower()}{suffix}.json"


def check_machine(results: Path) -> str:
    """Check, before anything is measured, that the packages are installed and the results can be written.

    Returns:
        JAX's backend.
    """
    probe = "import resnet_jax.setup, resnet_jax.reporting.report, jax; print(jax.default_backend())"
    probed = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    if probed.returncode:
        reason = (probed.stderr.splitlines() or ["it ended"])[-1]
        raise UserError(
            f"{sys.executable}: {reason}: run pip install -e '.[cuda,tfds]' there, or give make GPU_PYTHON=PYTHON"
        )
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {results}: {error.strerror}: give a folder that can be written") from error
    return probed.stdout.split()[-1]


def has_torch() -> bool:
    """Return whether this Python has PyTorch."""
    return importlib.util.find_spec("torch") is not None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result and print its path."""
    files.write_json(path, result)
    print(path, flush=True)


def launch(arguments: argparse.Namespace, name: str, seed: int, flags: list[str]) -> Path:
    """Train or evaluate a run by its flags, and return its workdir."""
    directory = (arguments.runs / f"{name}-seed{seed}").absolute()
    epochs = [] if arguments.epochs is None else [f"--config.num_epochs={arguments.epochs}"]
    run("launch.py", *flags, f"--config.seed={seed}", *epochs, f"--workdir={directory}")
    return directory


def train(arguments: argparse.Namespace, name: str, seed: int, flags: list[str]) -> dict[str, Any]:
    """Train or resume a run, and return its summary."""
    directory = launch(arguments, name, seed, flags)
    with tempfile.TemporaryDirectory() as scratch:
        summary = Path(scratch) / "summary.json"
        run("-m", "resnet_jax", "report", directory, f"--summary={summary}")
        return json.loads(summary.read_text("utf-8"))


def speeds_of(name: str, result: dict[str, Any]) -> list[float]:
    """Return the images per second of a run, row by row."""
    speeds = [row["images_per_second"] for row in result["metrics"] if row.get("images_per_second")]
    if not speeds:
        raise UserError(f"{name}: the run is too short to log its speed: give more --epochs")
    return speeds


def over_views(arguments: argparse.Namespace, name: str, seed: int, flags: list[str], views: int) -> dict[str, float]:
    """Evaluate a run on several views of each test image: the accuracy, and the seconds of the whole command."""
    started = time.monotonic()
    directory = launch(arguments, name, seed, [*flags, "--mode=eval", f"--views={views}"])
    evaluation = json.loads((directory / f"eval-{views}-views.json").read_text("utf-8"))
    return {
        "views": views,
        "test_accuracy_over_views": evaluation["test"]["accuracy"],
        "evaluation_seconds": time.monotonic() - started,
    }


def train_with_speed(
    arguments: argparse.Namespace, name: str, flags: list[str], one_seed: bool = False, views: int = 1
) -> None:
    """Train with each seed, or only the first, and add the speed to each summary, and the accuracy over several views."""
    flops = None
    for seed in arguments.seeds[:1] if one_seed else arguments.seeds:
        result = train(arguments, name, seed, flags)
        if flops is None:
            (case,) = benchmark(*flags, "--only=save", "--repeats=1")["cases"]
            flops = case["train_flops_per_image"]
        speed = statistics.median(speeds_of(name, result))
        result |= {
            "seconds_after_startup": result["seconds"] - (result["startup_seconds"] or 0.0),
            "images_per_second": speed,
            "train_flops_per_image": flops,
        }
        if peak := arguments.peak_tflops:
            result |= {"peak_tflops": peak, "share_of_peak": speed * flops / 1e12 / peak}
        if views > 1:
            result |= over_views(arguments, name, seed, flags, views)
            result["total_seconds"] = result["seconds_after_startup"] + result["evaluation_seconds"]
        write(result_path(arguments, name, result["environment"], "" if one_seed else f"-seed{seed}"), result)


def final(arguments: argparse.Namespace) -> None:
    """Train the report's model with its recipe."""
    train_with_speed(arguments, "final", config_flags(arguments))


def final_f32(arguments: argparse.Namespace) -> None:
    """Train the same in float32, to compare with bfloat16."""
    train_with_speed(arguments, "final-f32", config_flags(arguments, dtype="float32"), one_seed=True)


def sgd(arguments: argparse.Namespace) -> None:
    """The report's baseline."""
    train_with_speed(arguments, "sgd", config_flags(arguments, "configs/sgd.py"))


def autoaugment(arguments: argparse.Namespace) -> None:
    """Train as in the authors' notebook: AutoAugment, all 50,000 images, the last checkpoint."""
    flags = [*config_flags(arguments, "configs/final.py:full"), "--config.augment.policy=cifar10"]
    train_with_speed(arguments, "final-autoaugment", flags, one_seed=True)


def best(arguments: argparse.Namespace) -> None:
    """Train the recipe for the highest accuracy with fewer than 5,000,000 parameters."""
    train_with_speed(arguments, "best", config_flags(arguments, "configs/best.py"), views=6)


def speedrun(arguments: argparse.Namespace) -> None:
    """Train the recipe for 94 % in little time."""
    train_with_speed(arguments, "speedrun", config_flags(arguments, "configs/speedrun.py"), views=6)


def narrow(arguments: argparse.Namespace) -> None:
    """Train the comparisons of optimizers and augmentation that are feasible on a CPU."""
    size = ["--config.data.image_size=0"] * (arguments.data == "digits")  # already small
    for seed in arguments.seeds:
        for variant in ("adamw", "sgd", "adamw_plain", "sgd_plain"):
            flags = [
                f"--config=configs/narrow.py:{variant}",
                f"--config.data.name={arguments.data}",
                f"--config.model.dtype={arguments.dtype}",
                *size,
                *arguments.overrides,
            ]
            summary = train(arguments, f"narrow-{variant}", seed, flags)
            write(arguments.results / f"cpu-narrow-{variant}-seed{seed}.json", summary)


def ladder(arguments: argparse.Namespace) -> None:
    """Train the short runs with one change each, and add the accuracy and speed of each to one file."""
    from configs.ladder import CHANGES  # not before a missing package is named in one line
    from resnet_jax.runs import stored_config

    _, *overrides = config_flags(arguments)
    unchanged = stored_config.to_json(command_line.load_config("configs/ladder.py", overrides))
    for seed in arguments.seeds:  # a seed's runs follow each other, so that their speeds can be compared
        for change in arguments.changes or CHANGES:
            flags = config_flags(arguments, f"configs/ladder.py:{change}")
            name = f"ladder-{change}"
            result = train(arguments, name, seed, flags)
            environment = result["environment"]
            path = result_path(arguments, "ladder", environment)
            protocol = {
                "config": unchanged,
                "cpu": environment["cpu"],
                "versions": environment["versions"],
            }
            before = json.loads(path.read_text("utf-8")) if path.exists() else {}
            if before and before["protocol"] != protocol:
                print(f"{path} has another protocol: overwriting it")
                before = {}
            changes = before.get("changes", {})
            runs = changes.get(change, {}).get("runs", {})
            runs[str(seed)] = {
                "validation_accuracy": result["validation_accuracy"],
                "images_per_second": max(speeds_of(name, result)),  # where other programs disturbed the run least
            }
            changes[change] = {"fields": CHANGES[change], "runs": runs}
            write(path, {"protocol": protocol, "changes": changes, "environment": environment})


def setting(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what all cases of one result have in common: config, commit and versions."""
    return result["config"], result["environment"]["git"], result["environment"]["versions"]


def step(arguments: argparse.Namespace) -> None:
    """Time the train step at each batch size; add each to the result of the same config and commit."""
    for batch_size in arguments.batch_sizes:
        flags = ["--only=train_step", f"--batch-sizes={batch_size}", f"--seconds={arguments.seconds}"]
        result = benchmark(*config_flags(arguments), *flags, *["--against-torch"] * arguments.torch)
        path = result_path(arguments, "step", result["environment"])
        before = json.loads(path.read_text("utf-8")) if path.exists() else result
        if setting(before) != setting(result):
            before = result
            print(f"{path} has another config or commit: overwriting it")
        others = [case for case in before["cases"] if case["batch_size"] != batch_size]
        write(path, result | {"cases": sorted(others + result["cases"], key=lambda case: case["batch_size"])})


def resnet18(arguments: argparse.Namespace) -> None:
    """Compare the model with ResNet-18, alternately: parameters, operations, seconds per epoch."""
    network = [f"--config.model.channel_list={tuple(arguments.channels)}", "--config.model.block_list=(2,2,2,2)"]
    flags = [*config_flags(arguments), "--only=end_to_end", "--repeats=1", f"--seconds={arguments.seconds}"]
    shared = [
        flag for flag in flags if not flag.startswith(("--config.model.channel_list=", "--config.model.block_list="))
    ]
    flags_of = {"final": flags, "resnet18": [*shared, *network, "--config.model.max_params=0"]}
    rounds = [{name: benchmark(*flags_of[name]) for name in flags_of} for _ in range(arguments.rounds)]
    figures = {}
    for name in flags_of:
        cases = [case for results in rounds for case in results[name]["cases"]]
        images = cases[0]["dataset"]["splits"]["train"]
        seconds = [images / case["figures"]["end_to_end"]["median"] for case in cases]
        figures[name] = {
            "num_params": cases[0]["num_params"],
            "train_flops_per_image": cases[0]["train_flops_per_image"],
            "seconds_per_epoch": statistics.median(seconds),
            "seconds_per_epoch_by_round": seconds,
        }
    ours, theirs = figures["final"], figures["resnet18"]
    fewer = {name: 1 - ours[name] / theirs[name] for name in ("num_params", "train_flops_per_image")}
    by_round = zip(ours["seconds_per_epoch_by_round"], theirs["seconds_per_epoch_by_round"], strict=True)
    less = [1 - our / their for our, their in by_round]
    fewer |= {"seconds_per_epoch": statistics.median(less), "seconds_per_epoch_by_round": less}
    comparison = figures | {"final_has_less_by": fewer, "benchmarks": rounds[-1]}
    write(result_path(arguments, "resnet18", rounds[-1]["final"]["environment"]), comparison)


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    on_gpu = {part.__name__: part for part in (final, final_f32, sgd, autoaugment, best, speedrun, step, resnet18)}
    on_cpu = {part.__name__: part for part in (narrow, speedrun, ladder, resnet18)}
    parser = ArgumentParser("python -m reproduction.reproduce", __doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="what to measure (default: everything that this machine can measure)"
    )
    parser.add_argument(
        "--config", default="configs/final.py", help="config of final, step and resnet18 (default: configs/final.py)"
    )
    parser.add_argument("--data", help="config.data.name (default: npz:cifar10.npz if that file exists, else cifar10)")
    parser.add_argument("--dtype", help="config.model.dtype (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--epochs", type=float, help="epochs of each run (default: as in its config)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--changes", nargs="+", metavar="CHANGE", help="changes of ladder (default: all)")
    parser.add_argument(
        "--seconds", type=command_line.seconds, default=2.0, help="seconds of each measurement (default: 2)"
    )
    parser.add_argument(
        "--rounds", type=command_line.whole_number(1), default=5, help="rounds of resnet18 (default: 5)"
    )
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch too")
    parser.add_argument(
        "--peak-tflops", type=float, help="peak of a matrix product on this GPU, to state the share that was reached"
    )
    parser.add_argument(
        "--channels", type=int, nargs=4, default=[64, 128, 256, 512], help="channels of ResNet-18's stages"
    )
    parser.add_argument(
        "--runs", type=command_line.local_path, default=Path("runs/reproduce"), help="folder of the runs"
    )
    parser.add_argument(
        "--results", type=command_line.local_path, default=Path("results"), help="folder of the results"
    )
    argv, overrides = command_line.split_overrides(argv)
    arguments = parser.parse_args(argv)
    arguments.overrides = overrides
    for override in overrides:
        if flag := _FLAGS.get(override.removeprefix("--config.").partition("=")[0]):
            raise UserError(f"{override} does not change all parts: give {flag}")
    for folder in ("runs", "results") if overrides else ():
        if (ROOT / getattr(arguments, folder)).resolve() == (ROOT / parser.get_default(folder)).resolve():
            raise UserError(
                f"{overrides[0]} makes other {folder} than those of the configs: give another folder as --{folder}"
            )
    known = on_cpu | on_gpu
    for part in arguments.parts:
        if part not in known:
            raise UserError(f"unknown PART {part!r}: choose from {', '.join(known)}")
    backend = check_machine(arguments.results)
    only_gpu = [part for part in arguments.parts if part not in on_cpu]
    if backend == "cpu" and only_gpu and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError(
            f"{only_gpu[0]} needs a GPU, but JAX finds none: install jax[cuda], or set JAX_PLATFORMS=cpu to test it on a CPU"
        )
    if backend != "cpu" and "narrow" in arguments.parts:
        raise UserError("narrow is measured on a CPU: set JAX_PLATFORMS=cpu")
    arguments.data = arguments.data or ("npz:cifar10.npz" if (ROOT / "cifar10.npz").exists() else "cifar10")
    arguments.dtype = arguments.dtype or ("float32" if backend == "cpu" else "bfloat16")
    parts = arguments.parts or list(on_cpu if backend == "cpu" else on_gpu)
    if arguments.torch and "step" in parts and not has_torch():
        raise UserError(
            f"step compares with PyTorch, which {sys.executable} lacks: install it there, or give --no-torch"
        )
    for part in parts:
        known[part](arguments)


if __name__ == "__main__":
    command_line.run(main)
