"""The tools of the one command, by name."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from resnet_jax import host
from resnet_jax.cli import command_line
from resnet_jax.errors import UserError
from resnet_jax.runs.exits import report

# Tool -> where its function is, imported only to run it, because JAX takes seconds; and what it does.
TOOLS = {
    "train": ("resnet_jax.cli.train_and_eval:train", "train a run, or resume it"),
    "eval": ("resnet_jax.cli.train_and_eval:evaluate", "evaluate a checkpoint of a run"),
    "predict": ("resnet_jax.inference.predict:main", "classify image files"),
    "export": ("resnet_jax.inference.export:main", "write a trained network as one file: ONNX, StableHLO, safetensors"),
    "serve": ("resnet_jax.inference.serve:main", "try a trained network in the browser"),
    "report": ("resnet_jax.reporting.report:main", "write a page about runs"),
    "card": ("resnet_jax.reporting.model_card:main", "write the model card of a run"),
    "weights load": ("resnet_jax.inference.torch_weights:main_load", "start a run from a PyTorch state dict"),
    "weights save": (
        "resnet_jax.inference.torch_weights:main_save",
        "write the weights of a run as a PyTorch state dict",
    ),
    "search": ("resnet_jax.search.command:main", "search for a network and a recipe under a budget"),
    "search report": ("resnet_jax.search.command:main_report", "write a page about a search, and the config it found"),
    "benchmark": ("benchmarks.benchmark:main", "measure the speed of a config (needs a checkout of the repository)"),
}
_RENAMED = {"demo": "serve", "model_card": "card", "torch_weights": "weights"}


def main(argv: Sequence[str]) -> None:
    """Run a tool.

    Args:
        argv: the name of the tool and its arguments.

    Raises:
        UserError: for what a person can fix.
    """
    names = (" ".join(argv[:count]) for count in (2, 1))
    name = next((name for name in names if name in TOOLS), None)
    if name:
        longer = [other for other in TOOLS if other.startswith(f"{name} ")]
        if near := difflib.get_close_matches(" ".join(argv[:2]), longer, 1, cutoff=0.8):
            raise UserError(f"there is no tool {' '.join(argv[:2])!r}: did you mean {near[0]}?")
        tool = _function(name)
        tool(argv[len(name.split()) :])
    elif not argv or "--help" in argv or "-h" in argv:
        print("usage: python -m resnet_jax TOOL ...\n")
        for name, (_, summary) in TOOLS.items():
            print(f"  {name:<14} {summary}")
        print("\npython -m resnet_jax TOOL --help describes a tool and its flags.")
    else:
        similar = [name for name in TOOLS if name.split()[0] == argv[0]] or difflib.get_close_matches(argv[0], TOOLS, 1)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"give one of {', '.join(TOOLS)}"
        raise UserError(f"there is no tool {' '.join(argv[: 2 if similar[1:] else 1])!r}: {hint}")


def _function(name: str) -> command_line.Tool:
    """Import the function of a tool."""
    module, _, function = TOOLS[name][0].partition(":")
    if module.startswith("benchmarks."):  # which is not installed
        sys.path.append(str(host.CHECKOUT))
    try:
        tool: command_line.Tool = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.benchmark"):
            raise
        raise UserError(
            f"{name} needs a checkout: clone the repository and run python -m resnet_jax {name} in it"
        ) from error
    return tool


def refuse_old_spelling() -> None:
    """Exit with code 2 if the command is `python -m resnet_jax.MODULE`, which earlier versions had, and say what to type.

    To be called while Python looks for that module, when `sys.argv` is "-m" and the arguments after the module.
    """
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if not module.startswith("resnet_jax.") or module == "resnet_jax.__main__":
        return
    name = module.rpartition(".")[2]
    tool = _RENAMED.get(name, name)
    known = any(tool == other.split()[0] for other in TOOLS)
    report(f"python -m {module} is not a command: run python -m resnet_jax {tool if known else '--help'}")
    sys.exit(2)


def run() -> None:
    """The entry point `resnet-jax`."""
    command_line.run(main)
