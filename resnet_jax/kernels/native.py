"""The functions of `convolution.cc` for JAX, with their gradients.

Images are float32 [B, H, W, C], sharded by their first axis over a mesh of CPU devices; each device computes its share. An
`affine` [2, C] holds a scale and a shift by channel.
"""

import ctypes
import hashlib
import os
import re
import sysconfig
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

_LIBRARY = Path(__file__).with_name(f"_convolution{sysconfig.get_config_var('EXT_SUFFIX')}")
SOURCES = ("convolution.cc", "convolution_simd.h")
_TARGETS = (
    "convolve",
    "input_gradient",
    "kernel_gradient",
    "add_activate",
    "add_activate_gradient",
    "activate_max_pool",
    "activate_max_pool_gradient",
)
_SHARDED, _REPLICATED = P("data"), P()


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled functions and register them with XLA; None if `unavailable` says why not."""
    if unavailable():
        return None
    functions = ctypes.CDLL(str(_LIBRARY))
    for name in _TARGETS:
        jax.ffi.register_ffi_target(f"resnet_jax_{name}", jax.ffi.pycapsule(getattr(functions, name)), platform="cpu")
    return functions


@cache
def unavailable() -> str:
    """Return why the compiled functions cannot be used, or an empty string."""
    if os.environ.get("RESNET_JAX_NATIVE") == "0":
        return "RESNET_JAX_NATIVE is 0"
    if not _LIBRARY.exists():
        return "they were not compiled: install a C++ compiler, then resnet_jax again"
    try:
        functions = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:  # built with another C++ library than this machine's
        return f"they cannot be loaded ({error}): install resnet_jax again"
    functions.sources_digest.restype = ctypes.c_char_p
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    if all(source.exists() for source in sources):
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        if functions.sources_digest() != digest.encode():
            return "they were compiled from other sources: install resnet_jax again"
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text("utf-8")
    if functions.ffi_api_version() > int(re.findall(r"define XLA_FFI_API_MINOR (\d+)", header)[0]):
        return "they were compiled for a later version of JAX: install resnet_jax again"
    return ""


def supports(w: jax.Array, padding: int) -> bool:
    """Whether `convolve` takes a kernel: a square of odd size up to 7, for channels that vectors of 8 floats divide."""
    height, width, inputs, outputs = w.shape
    return (
        height == width <= 7
        and padding == height // 2
        and height % 2 == 1
        and outputs % 8 == 0
        and (inputs % 8 == 0 or inputs < 8)
    )


def uses_winograd(x: Any, w: jax.Array, stride: int, mesh: Mesh) -> bool:
    """Whether `convolve` uses Winograd: for 3x3 kernels of stride 1 and at least 16 tiles, as fewer cost more than they save."""
    batch, height, width, channels = x.shape
    tiles = batch // _shares(x, mesh) * -(-height // 4) * -(-width // 4)
    return w.shape[0] == 3 and stride == 1 and channels % 8 == 0 and tiles >= 16


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def convolve(
    x: jax.Array,
    affine: jax.Array | None,
    w: jax.Array,
    stride: int,
    mesh: Mesh,
    activation: str = "relu",
    pool: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Convolve images, or the activation of x * scale + shift where an affine is given, padded by half the size of the kernel.

    Args:
        x: [B, H, W, C].
        affine: [2, C] where `uses_winograd`, or None.
        w: [size, size, C, K].
        stride: of the outputs, along both axes.
        mesh: the devices that x is sharded over.
        activation: one of `models.ACTIVATIONS`.
        pool: return the largest of each 2x2 outputs; where `uses_winograd`, and H and W are even. The first of several that
            are equally large has the whole gradient.

    Returns:
        The outputs y [B, ceil(H / stride), ceil(W / stride), K], or [B, H / 2, W / 2, K], and [2, K], the sums of y and of
        y^2 by channel.
    """
    return _convolve_forward(x, affine, w, stride, mesh, activation, pool)[0]


def _convolve_forward(
    x: jax.Array, affine: jax.Array | None, w: jax.Array, stride: int, mesh: Mesh, activation: str, pool: bool
) -> tuple[Any, Any]:
    winograd = uses_winograd(x, w, stride, mesh)
    if (affine is not None or pool) and not winograd:
        raise ValueError("only Winograd applies an affine, and pools")
    if pool and (x.shape[1] % 2 or x.shape[2] % 2):
        raise ValueError(f"only images of even height and width are pooled, not {x.shape}")
    height, width = (-(-size // (2 if pool else stride)) for size in x.shape[1:3])
    shape = (len(x), height, width, w.shape[3])
    y, which, sums = _call(
        "convolve",
        mesh,
        [(x, _SHARDED), (_or_empty(affine), _REPLICATED), (w, _REPLICATED)],
        [
            (_float32(shape), _SHARDED),
            (_bytes(shape if pool else (0,)), _SHARDED),
            (_float32((2, shape[3])), _REPLICATED),
        ],
        activation,
        stride=np.int64(stride),
        winograd=winograd,
    )
    return (y, sums), (x, affine, w, y, which)


def _convolve_backward(
    stride: int, mesh: Mesh, activation: str, pool: bool, residuals: Any, gradients: Any
) -> tuple[Any, ...]:
    x, affine, w, y, which = residuals
    dy, dsums = gradients
    winograd = uses_winograd(x, w, stride, mesh)
    if not winograd:
        dsum, dsquares = dsums.reshape(2, 1, 1, 1, -1)
        dy, dsums = dy + dsum + 2 * y * dsquares, None
    attributes = {"stride": np.int64(stride), "winograd": winograd}
    inputs = [(x, _SHARDED), (_or_empty(affine), _REPLICATED)]
    outputs = [(y, _SHARDED), (which, _SHARDED), (dy, _SHARDED), (_or_empty(dsums), _REPLICATED)]
    results = [(x, _SHARDED), (_or_empty(affine), _REPLICATED)]
    dx, daffine = _call(
        "input_gradient", mesh, [*inputs, (w, _REPLICATED), *outputs], results, activation, **attributes
    )
    (dw,) = _call("kernel_gradient", mesh, [*inputs, *outputs], [(w, _REPLICATED)], activation, **attributes)
    return dx, None if affine is None else daffine, dw


convolve.defvjp(_convolve_forward, _convolve_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_activate(
    y: jax.Array, affine: jax.Array, shortcut: jax.Array, mesh: Mesh, activation: str = "relu"
) -> jax.Array:
    """Return the activation of y * scale + shift + shortcut, for y and the shortcut [B, H, W, C]."""
    arguments = [(y, _SHARDED), (affine, _REPLICATED), (shortcut, _SHARDED)]
    out: jax.Array
    (out,) = _call("add_activate", mesh, arguments, [(y, _SHARDED)], activation)
    return out


def _add_activate_forward(
    y: jax.Array, affine: jax.Array, shortcut: jax.Array, mesh: Mesh, activation: str
) -> tuple[jax.Array, Any]:
    return add_activate(y, affine, shortcut, mesh, activation), (y, affine, shortcut)


def _add_activate_backward(mesh: Mesh, activation: str, residuals: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    y, affine, shortcut = residuals
    arguments = [(y, _SHARDED), (affine, _REPLICATED), (shortcut, _SHARDED), (dout, _SHARDED)]
    results = [(y, _SHARDED), (y, _SHARDED), (affine, _REPLICATED)]
    dy, dshortcut, daffine = _call("add_activate_gradient", mesh, arguments, results, activation)
    return dy, daffine, dshortcut


add_activate.defvjp(_add_activate_forward, _add_activate_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def activate_max_pool(y: jax.Array, affine: jax.Array, mesh: Mesh, activation: str = "relu") -> jax.Array:
    """Return the largest activation of y * scale + shift of each 2x2 pixels: [B, H, W, C] -> [B, H/2, W/2, C], H and W even.

    The first of several pixels that are equally large has the whole gradient.
    """
    batch, height, width, channels = y.shape
    shape = (batch, height // 2, width // 2, channels)
    arguments = [(y, _SHARDED), (affine, _REPLICATED)]
    out: jax.Array
    (out,) = _call("activate_max_pool", mesh, arguments, [(_float32(shape), _SHARDED)], activation)
    return out


def _activate_max_pool_forward(y: jax.Array, affine: jax.Array, mesh: Mesh, activation: str) -> tuple[jax.Array, Any]:
    return activate_max_pool(y, affine, mesh, activation), (y, affine)


def _activate_max_pool_backward(mesh: Mesh, activation: str, residuals: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    y, affine = residuals
    arguments = [(y, _SHARDED), (affine, _REPLICATED), (dout, _SHARDED)]
    results = [(y, _SHARDED), (affine, _REPLICATED)]
    dy, daffine = _call("activate_max_pool_gradient", mesh, arguments, results, activation)
    return dy, daffine


activate_max_pool.defvjp(_activate_max_pool_forward, _activate_max_pool_backward)


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _bytes(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.uint8)


def _or_empty(array: jax.Array | None) -> jax.Array:
    return jnp.zeros((0,)) if array is None else array


def _shares(x: jax.Array, mesh: Mesh) -> int:
    """How many devices share a batch: all that it can be divided among, or none."""
    return mesh.size if len(x) % mesh.size == 0 else 1


def _call(
    name: str,
    mesh: Mesh,
    arguments: list[tuple[jax.Array, P]],
    results: list[tuple[jax.Array | jax.ShapeDtypeStruct, P]],
    activation: str,
    **attributes: Any,
) -> Any:
    """Call a function on each device for its share of the batch; results that are not sharded are summed over the devices.

    Args:
        name: of the function.
        mesh: the devices.
        arguments: arrays, each with how it is sharded.
        results: what has the shapes and dtypes of the results, likewise.
        activation: one of `models.ACTIVATIONS`.
        attributes: of the function, besides.
    """
    library()
    in_specs, out_specs = tuple(spec for _, spec in arguments), [spec for _, spec in results]
    shares = _shares(arguments[0][0], mesh)
    outputs = [
        jax.ShapeDtypeStruct((a.shape[0] // shares, *a.shape[1:]) if spec == _SHARDED else a.shape, a.dtype)
        for a, spec in results
    ]
    call = jax.ffi.ffi_call(f"resnet_jax_{name}", outputs)
    arrays = [array for array, _ in arguments]
    attributes["gelu"] = activation == "gelu"
    if shares == 1:
        return call(*arrays, **attributes)

    def on_one_device(*arrays: jax.Array) -> list[jax.Array]:
        outputs = zip(call(*arrays, **attributes), out_specs, strict=True)
        return [output if spec == _SHARDED else jax.lax.psum(output, "data") for output, spec in outputs]

    return jax.shard_map(on_one_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)
