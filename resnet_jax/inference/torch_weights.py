"""Convert weights from and to PyTorch state dicts with the report's names (conv1, bn1, layer1.0.conv1 ... fc).

    python -m resnet_jax weights load model.pt --config configs/final.py --workdir runs/torch
    python -m resnet_jax weights save runs/final model.safetensors

`load` makes a workdir with a checkpoint of step 0: evaluate it with `eval`, or train from it with `train` and the same
config. `save` writes the weights of a checkpoint. The suffix of the file sets its format: .safetensors, .npz, .pt or
.pth. The last two need PyTorch and are read with `weights_only=True`. Weights are copied bit for bit both ways,
the running variance of batch norm too, although PyTorch's estimate of it is unbiased and this project's is biased.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.disk import files
from resnet_jax.errors import UserError, reason
from resnet_jax.inference import shipped

_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
_MODULES = {
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "shortcut_conv": "shortcut.0",
    "shortcut_norm": "shortcut.1",
    "norm1": "bn1",
    "norm2": "bn2",
    "norm3": "bn3",
    "classifier": "fc",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO -> OIHW, [in, out] -> [out, in]
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_COUNTER = "num_batches_tracked"  # the step counter of PyTorch's batch norm, which only uses it without a momentum
_NAMED = 10  # names that a message lists; it counts the rest

Weights = dict[str, np.ndarray]


def torch_name(path: tuple[str, ...]) -> str:
    """Return PyTorch's name: ("params", "stage1_block2", "shortcut_norm", "scale") -> "layer1.1.shortcut.1.weight".

    The convolution and batch norm before a stage's max-pool, "stage2_conv" and "stage2_norm", are "down2.0" and "down2.1".
    """
    *modules, leaf = path[1:]

    def of_module(module: str) -> str:
        if stage := re.fullmatch(r"stage(\d+)_block(\d+)", module):
            return f"layer{stage[1]}.{int(stage[2]) - 1}"
        if stage := re.fullmatch(r"stage(\d+)_(conv|norm)", module):
            return f"down{stage[1]}.{('conv', 'norm').index(stage[2])}"
        return _MODULES.get(module, module)

    names = map(of_module, modules)
    return ".".join([*names, _LEAVES.get(leaf, leaf)])


def to_torch(variables: Mapping[str, Any], step: int) -> Weights:
    """Convert the variables of a network to a PyTorch state dict.

    Args:
        variables: {"params": ..., "batch_stats": ...}, as `ResNet` takes them.
        step: number of steps done, the value of batch norm's counters.

    Returns:
        PyTorch's name -> array: convolutions OIHW, the classifier [out, in], counters int64 [].
    """
    weights: Weights = {}
    for path, leaf in _leaves(variables):
        name = torch_name(path)
        weights[name] = np.ascontiguousarray(np.asarray(leaf).transpose(_TO_TORCH[leaf.ndim]))
        if path[-1] == "var":
            weights[f"{name.rpartition('.')[0]}.{_COUNTER}"] = np.array(step, np.int64)
    return weights


def from_torch(weights: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a PyTorch state dict to the variables of a network.

    Args:
        weights: as `to_torch` returns them; counters may be missing. All names may share a prefix, such as
            DataParallel's "module.".
        like: variables with the structure, shapes and dtypes of the network.

    Raises:
        UserError: if a weight is missing, unknown, of another shape or not finite; the message names it.
    """
    from flax import traverse_util

    weights = _without_prefix({name: array for name, array in weights.items() if not name.endswith(_COUNTER)})
    expected = {torch_name(path): (path, leaf) for path, leaf in _leaves(like)}
    wrong = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - expected.keys()),
    }
    shapes, values = [], []
    variables = {}
    for name in expected.keys() & weights.keys():
        path, leaf = expected[name]
        array = weights[name]
        shape = tuple(leaf.shape[axis] for axis in _TO_TORCH[leaf.ndim])
        if array.shape != shape:
            shapes.append(f"{name} {list(array.shape)} instead of {list(shape)}")
        elif not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            values.append(name)
        else:
            variables[path] = array.transpose(_FROM_TORCH[leaf.ndim]).astype(leaf.dtype)
    wrong |= {"wrong shape": sorted(shapes), "not finite floating-point numbers": sorted(values)}
    if any(wrong.values()):
        raise UserError("; ".join(f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names))
    return traverse_util.unflatten_dict(variables)


def _leaves(variables: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    from flax import traverse_util

    return list(traverse_util.flatten_dict(dict(variables)).items())


def _without_prefix(weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Remove the prefix that wrappers add to every name: `DataParallel` "module.", `torch.compile` "_orig_mod."."""
    for prefix in ("module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            return _without_prefix({name.removeprefix(prefix): array for name, array in weights.items()})
    return weights


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def read(path: Path) -> Weights:
    """Read a state dict; no code in the file is run.

    In a `.pt` or `.pth`, the state dict may be inside another dictionary, as training scripts save it.

    Raises:
        UserError: if it cannot be read, or PyTorch is needed and not installed.
    """
    try:
        if path.suffix == ".npz":
            with files.readable(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return dict(file)
        if path.suffix == ".safetensors":
            import safetensors.numpy

            return safetensors.numpy.load_file(files.readable(path))
        torch = _torch(path)
        return {
            name: _as_array(tensor)
            for name, tensor in _state_dict(torch, torch.load(files.readable(path), "cpu", weights_only=True))
        }
    except UserError:
        raise
    except Exception as error:  # three libraries raise a dozen kinds of errors
        raise UserError(f"{path} cannot be read ({reason(error)}): give a state dict") from error


def _state_dict(torch: Any, loaded: Any) -> list[tuple[str, Any]]:
    """Return the items of the state dict in a file: the file's object or one of its values."""
    candidates = [loaded, *(loaded.values() if isinstance(loaded, Mapping) else ())]
    dicts = [c for c in candidates if isinstance(c, Mapping) and c and all(map(torch.is_tensor, c.values()))]
    if len(dicts) != 1:
        raise ValueError(f"it holds {len(dicts)} dictionaries of tensors instead of 1")
    return list(dicts[0].items())


def _as_array(tensor: Any) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} needs PyTorch: install it, or use .safetensors or .npz") from error
    return torch


def write(path: Path, weights: Weights) -> None:
    """Write a state dict atomically.

    Raises:
        UserError: if it cannot be written, or PyTorch is needed and not installed.
    """
    try:
        with files.atomic_file(path) as new:
            if path.suffix == ".npz":
                np.savez(new, **weights)  # type: ignore[arg-type]
            elif path.suffix == ".safetensors":
                import safetensors.numpy

                new.write_bytes(safetensors.numpy.save(weights, {"format": "pt"}))
            else:
                torch, content = _torch(path), BytesIO()
                torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, content)
                new.write_bytes(content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another file") from error


def load(config: ConfigDict, directory: Path, path: Path) -> None:
    """Make a workdir for a run with this config that starts from the weights of a file.

    Raises:
        UserError: if the folder exists, or the weights do not fit `config.model`.
    """
    from resnet_jax.runs import workdir
    from resnet_jax.setup import setup

    if directory.exists():
        raise UserError(f"--workdir {directory} already exists: choose another")
    if config.init_from:
        raise UserError(f"config.init_from is {config.init_from!r}, but the weights are those of {path}: leave it out")
    weights = read(path)
    start = setup(config)
    config = start.config
    try:
        variables = from_torch(weights, start.state.variables)
    except UserError as error:
        raise UserError(f"{path} does not fit config.model: {error}") from error
    state = start.state.with_variables(variables)
    workdir.check(directory, config)
    with files.atomic_directory(directory) as scratch, workdir.open_workdir(scratch, config, start.meta) as folder:
        folder.start_from(state, {"file": path.name, "sha256": _sha256(path)})
    print(f"{directory} holds the weights of {path} as step 0; to evaluate them: python -m resnet_jax eval {directory}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(source: Path, which: str, path: Path) -> None:
    """Write the weights of a run's checkpoint, or of a `.safetensors` export, as a state dict."""
    from resnet_jax.inference import trained_model

    model = trained_model.load(source, which)
    write(path, to_torch(model.variables, model.step))
    print(f"{path}: the weights of {source}, step {model.step}")


def main_load(argv: Sequence[str]) -> None:
    """Run the tool `weights load`."""
    parser = ArgumentParser("python -m resnet_jax weights load", __doc__)
    parser.add_argument("file", metavar="FILE", help="state dict to read")
    command_line.add_config_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the new run")
    arguments, config = command_line.parse_config(parser, argv)
    load(config, command_line.folder(arguments.workdir), _checked(arguments.file))


def main_save(argv: Sequence[str]) -> None:
    """Run the tool `weights save`."""
    parser = ArgumentParser("python -m resnet_jax weights save", __doc__)
    parser.add_argument(
        "run", type=command_line.local_path, metavar="RUN", help="workdir of a run, or its .safetensors export"
    )
    parser.add_argument("file", metavar="FILE", help="state dict to write")
    command_line.add_checkpoint_argument(parser)
    arguments = parser.parse_args(argv)
    path = _checked(arguments.file)
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{path} cannot be written: give a file in a folder that exists")
    if shipped.is_file_of(arguments.run, path):
        raise UserError(f"the weights would replace {arguments.run}: give another file")
    save(arguments.run, arguments.checkpoint, path)


def _checked(file: str) -> Path:
    """Return the path of a file of weights; check that this machine can read and write its format."""
    path = Path(os.path.expanduser(file))
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{file}: its suffix must be one of {', '.join(_SUFFIXES)}")
    if path.suffix in (".pt", ".pth"):
        _torch(path)
    return path
