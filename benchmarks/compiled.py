"""Compile the training loop of a config for accelerators that are not in this machine, and count what the programs do.

    pip install --no-deps --target accelerators 'jax-cuda13-plugin==VERSION' 'jax-cuda13-pjrt==VERSION' 'libtpu==LIBTPU'
    PYTHONPATH=accelerators python -m benchmarks.compiled --config configs/final.py --output results/compiled.json

VERSION is that of jaxlib, and LIBTPU the one of jax's extra `tpu`, which this prints:

    python -c 'import importlib.metadata as m; print([r for r in m.requires("jax") if "libtpu" in r])'

XLA compiles for a description of the device. Nothing is run, so cuDNN's algorithms, which are chosen by their speed, are not
known. The images are taken to be those of CIFAR-10.
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import measure, tool
from resnet_jax import config as config_lib
from resnet_jax import steps, train_state
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.data import augment_jax, feed, pipelines
from resnet_jax.data.datasets import Split
from resnet_jax.errors import UserError

NUM_EXAMPLES, IMAGE_SHAPE, NUM_CLASSES = 45_000, (32, 32, 3), 10

# What XLA asks of a GPU before it compiles for it; from NVIDIA's data sheet and the CUDA programming guide.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """Accelerators to compile for.

    Attributes:
        device: what they are called.
        devices: how many share a batch.
        bytes_per_second: that the memory of one moves; from the maker.
        flops: bfloat16 operations a second of one; from the maker.
    """

    device: str
    devices: int
    bytes_per_second: float
    flops: float


TARGETS = {
    "h100": Target("NVIDIA H100", 1, 3.35e12, 989e12),
    "h100-8": Target("NVIDIA H100", 8, 3.35e12, 989e12),
    "v5e-4": Target("TPU v5e", 4, 0.82e12, 197e12),
}
BATCH_SIZES = {"h100": (128, 256, 512, 1024, 2048, 4096), "h100-8": (1024,), "v5e-4": (128,)}


def make_mesh(name: str) -> Mesh:
    """Return the mesh of a target's devices, which can be compiled for but not run on.

    Raises:
        UserError: if the package that compiles for them is not installed.
    """
    target = TARGETS[name]
    try:
        if target.device.startswith("TPU"):
            described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        else:
            settings = {"target_config": _H100, "topology": f"1x1x{target.devices}"}
            described = topologies.get_topology_desc(platform="cuda", topology_name=name, **settings)
    except Exception as error:  # jax raises what its plug-ins raise
        raise UserError(
            f"nothing here compiles for {target.device} ({str(error).splitlines()[0][:200]}): install the packages that "
            "python -m benchmarks.compiled --help names"
        ) from error
    return Mesh(np.array(described.devices).ravel()[: target.devices], ("data",))


def _images() -> Split:
    return Split(np.zeros((NUM_EXAMPLES, *IMAGE_SHAPE), np.uint8), np.zeros(NUM_EXAMPLES, np.int32))


def compile_loop(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Compiled, train_state.TrainState]:
    """Compile the training loop of the device pipeline; return it and the shapes of its state."""
    train = _images()
    create = partial(train_state.create, config, NUM_CLASSES, IMAGE_SHAPE, NUM_EXAMPLES / config.batch_size, mesh)
    state = jax.eval_shape(create)
    data, draws = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
        (train._asdict(), pipelines.train_draws(train, config, 0, feed.STEPS_PER_CALL)),
    )
    build_batch = partial(augment_jax.build_batch, config=config.augment)
    return steps.jit_train_steps(config, mesh, build_batch).lower(state, data, draws).compile(), state


class Instruction(NamedTuple):
    """A line of a compiled program: `%name = shape opcode(%operand, ...), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\]")


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the dtype and the sizes of each array of a shape: `(f32[3,3], u8[0])`."""
    return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in _ARRAY.findall(shape)]


def bytes_by_array(shape: str) -> list[tuple[int, int]]:
    """Return the leading size, 0 of a scalar, and the bytes of each array of a shape."""
    widths = {dtype: max(1, int(re.sub(r"\D", "", dtype) or 8) // 8) for dtype, _ in arrays(shape)}
    return [((*sizes, 0)[0], math.prod(sizes) * widths[dtype]) for dtype, sizes in arrays(shape)]


def num_bytes(shape: str) -> int:
    """Return the bytes of all arrays of a shape."""
    return sum(size for _, size in bytes_by_array(shape))


def _end_of_parentheses(text: str) -> int:
    """Return where the parenthesis that opens `text` is closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation of a compiled program, and the name of the first one to run."""
    computations: dict[str, list[Instruction]] = {}
    entry, instructions = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            instructions = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            instructions = None
        elif instructions is not None and (start := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)):
            rest = line[start.end() :]
            length = _end_of_parentheses(rest) if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:length], rest[length + 1 :]
            opcode, _, rest = rest.partition("(")
            length = _end_of_parentheses("(" + rest) - 1
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:length]))
            instructions.append(Instruction(start[1], shape, opcode, operands, rest[length:]))
    return computations, entry


_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
_TO_HOST = {"infeed", "outfeed", "send", "recv"}


def _loop(computations: dict[str, list[Instruction]], entry: str) -> list[Instruction]:
    """Return the instructions of one step: the body of the largest loop."""
    bodies = re.findall(
        r"body=%?([\w.\-]+)", " ".join(i.attributes for i in computations[entry] if i.opcode == "while")
    )
    return max((computations[body] for body in bodies), key=len)


def _work(body: list[Instruction]) -> list[Instruction]:
    """Return the instructions that read or write memory, or compute; the end of one that is asynchronous does not count again."""
    return [i for i in body if i.opcode not in _NO_WORK and not i.opcode.endswith("-done")]


def _moved(body: list[Instruction], config: ConfigDict) -> Iterator[int]:
    """Yield the bytes that each operation reads and writes; of all images or draws, only those of a step."""
    shapes = {instruction.name: instruction.shape for instruction in body}
    share = {NUM_EXAMPLES: config.batch_size / NUM_EXAMPLES, feed.STEPS_PER_CALL: 1 / feed.STEPS_PER_CALL}
    for instruction in _work(body):
        for shape in (instruction.shape, *(shapes[name] for name in instruction.operands if name in shapes)):
            for leading, size in bytes_by_array(shape):
                yield round(size * share.get(leading, 1))


def facts(compiled: jax.stages.Compiled, state: train_state.TrainState, config: ConfigDict) -> dict[str, Any]:
    """Return what a compiled training loop does in one step.

    Returns:
        operations: that the device starts one by one: on a GPU, kernels and calls of cuDNN.
        convolutions: how many, by dtype and by the order of the dimensions of their input.
        transposed_activations: transposes and copies of arrays larger than the largest parameter.
        bfloat16_sums: reductions over an array that return bfloat16.
        all_reduces: by dtype, how many, and their bytes.
        to_host: transfers to the host, or calls of it.
        bytes: of all that the operations of one device read and write, as if there were no caches.
        donated: whether the new state takes the memory of the old one.
        temporary_bytes: memory that the program needs beside its arguments.
    """
    text = compiled.as_text() or ""
    computations, entry = parse(text)
    body = _loop(computations, entry)
    everything = [instruction for instructions in computations.values() for instruction in instructions]
    shapes = {instruction.name: instruction.shape for instruction in everything}
    convolutions: dict[str, int] = {}
    for i in everything:
        if i.opcode == "convolution" or "__cudnn$conv" in i.attributes:
            dtype, _ = arrays(shapes[i.operands[0]])[0]
            labels = re.findall(r"dim_labels=(\w+?)_", i.attributes)
            kind = f"{dtype} {labels[0]}"
            convolutions[kind] = convolutions.get(kind, 0) + 1
    largest = max(leaf.size for leaf in jax.tree.leaves(state.params))
    all_reduces: dict[str, list[int]] = {}
    for i in body:
        if i.opcode in ("all-reduce", "all-reduce-start"):
            of_dtype = all_reduces.setdefault(arrays(i.shape)[0][0], [0, 0])
            of_dtype[0] += 1
            of_dtype[1] += num_bytes(i.shape)
    memory = compiled.memory_analysis()
    return {
        "operations": len(_work(body)),
        "convolutions": convolutions,
        "transposed_activations": sum(
            i.opcode in ("transpose", "copy") and math.prod(arrays(i.shape)[0][1]) > largest for i in everything
        ),
        "bfloat16_sums": sum(i.opcode == "reduce" and arrays(i.shape)[0][0] == "bf16" for i in everything),
        "all_reduces": all_reduces,
        "to_host": sum(i.opcode in _TO_HOST or "callback" in i.attributes for i in everything),
        "bytes": sum(_moved(body, config)),
        "donated": memory.alias_size_in_bytes
        >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m benchmarks.compiled", __doc__)
    command_line.add_config_arguments(parser)
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="NAMES", help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "--batch-sizes", type=tool.whole_numbers, metavar="SIZES", help="for each target, instead of those of the docs"
    )
    tool.add_output_argument(parser)
    arguments, config = command_line.parse_config(parser, argv)
    names = arguments.targets.split(",")
    if not set(names) <= set(TARGETS):
        parser.error(f"argument --targets: must be names from {','.join(TARGETS)}, got {arguments.targets!r}")
    tool.check_output(arguments.output)
    config = config_lib.replaced(config, {"pipeline": "device", "model.dtype": "bfloat16"})
    programs = []
    for name in names:
        mesh = make_mesh(name)
        for batch_size in arguments.batch_sizes or BATCH_SIZES[name]:
            sized = config_lib.replaced(config, {"batch_size": batch_size})
            compiled, state = compile_loop(sized, mesh)
            target = {"target": name, **TARGETS[name]._asdict(), "batch_size": batch_size}
            programs.append({**target, **facts(compiled, state, sized)})
            print(f"{name}, batch {batch_size}: {programs[-1]['operations']} operations a step", flush=True)
    flops = measure.flops_per_image(config, _images(), state, NUM_CLASSES)
    tool.write_result(arguments.output, {"compiled": programs, "train_flops_per_image": flops}, config)


if __name__ == "__main__":
    command_line.run(main)
