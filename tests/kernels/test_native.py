"""The compiled functions: the values and gradients of the definition, whatever the processor, the threads and the devices."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resnet_jax import models, train_state
from resnet_jax.kernels import native

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=f"the compiled functions: {native.unavailable()}")

SHAPES = {  # batch, height, width, channels, channels of the output, size of the kernel, stride
    "stage 1": (6, 32, 32, 64, 64, 3, 1),
    "stage 2": (3, 16, 16, 128, 128, 3, 1),
    "stage 3": (10, 8, 8, 256, 256, 3, 1),
    "one image": (1, 8, 8, 256, 256, 3, 1),
    "one large image": (1, 16, 16, 64, 64, 3, 1),
    "one pixel": (1, 1, 1, 8, 8, 3, 1),
    "sizes that tiles of 4 do not divide": (5, 7, 9, 24, 88, 3, 1),
    "more channels than outputs": (3, 6, 5, 48, 16, 3, 1),
    "the first of stage 2": (6, 32, 32, 64, 128, 3, 2),
    "strided, odd sizes": (5, 7, 9, 24, 48, 3, 2),
    "strided, one row": (3, 1, 9, 24, 48, 3, 2),
    "strided, one column": (3, 9, 1, 24, 48, 3, 2),
    "shortcut, one pixel": (3, 1, 1, 16, 24, 1, 2),
    "shortcut": (6, 16, 16, 64, 128, 1, 2),
    "shortcut, odd sizes": (5, 7, 9, 16, 24, 1, 2),
    "bottleneck": (6, 8, 8, 64, 32, 1, 1),
    "stem": (4, 32, 32, 3, 64, 3, 1),
    "stem for large images": (2, 33, 31, 3, 64, 7, 2),
}
POOLED = {  # batch, height, width, channels, channels of the output
    "stage 1": (4, 32, 32, 32, 64),
    "stage 3": (10, 8, 8, 256, 256),
    "sizes that tiles of 4 do not divide": (5, 6, 10, 24, 88),
    "two pixels": (9, 2, 6, 8, 16),
}
BLOCK_ENDS = [(5, 7, 9, 24), (2, 32, 32, 64), (1, 1, 1, 8)]  # batch, height, width, channels
POOLS = [(3, 6, 10, 24), (2, 32, 32, 64), (1, 2, 2, 8)]


@pytest.fixture(params=[4, 8, 16])
def lanes(request):
    """Floats of a vector: each instruction set that this processor has."""
    functions = native.library()
    most = functions.vector_lanes()
    if request.param > most:
        pytest.skip(f"this processor's vectors have {most} floats")
    functions.set_vector_lanes(ctypes.c_int64(request.param))
    yield request.param
    functions.set_vector_lanes(ctypes.c_int64(most))


def normalized(x, affine):
    """x * scale + shift."""
    scale, shift = affine.reshape(2, 1, 1, 1, -1)
    return x * scale + shift


def definition(x, affine, w, stride, activation):
    """What `native.convolve` computes, in the words of `lax`."""
    x = x if affine is None else models.ACTIVATIONS[activation](normalized(x, affine))
    padding = ((w.shape[0] // 2,) * 2,) * 2
    y = lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y, jnp.stack([y.sum((0, 1, 2)), (y * y).sum((0, 1, 2))])


def random_case(batch, height, width, channels, outputs, size, stride, with_affine):
    """(x, affine, w), and the gradients of the two results."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, channels))
    affine = rng.standard_normal((2, channels)) if with_affine else None
    w = rng.standard_normal((size, size, channels, outputs)) / (size * np.sqrt(channels))
    dy = rng.standard_normal((batch, -(-height // stride), -(-width // stride), outputs))
    dsums = rng.standard_normal((2, outputs)) * np.array([[1.0], [0.1]])
    return jax.tree.map(lambda a: a.astype(np.float32), ((x, affine, w), (dy, dsums)))


def results(function, arguments, gradients):
    """The values and gradients of a function, as a flat list."""
    values, vjp = jax.vjp(function, *arguments)
    return jax.tree.leaves((values, vjp(gradients)))


def assert_equal_but_for_rounding(got, want, limit=4e-6):
    """Compare 2-norms with float64. XLA's own float32 has up to 4e-7 for the output and 2e-6 for the kernel's gradient."""
    for ours, truth in zip(got, want, strict=True):
        assert ours.shape == truth.shape
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - np.asarray(truth)) <= limit * np.linalg.norm(truth)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
def test_a_convolution_and_its_gradients_are_those_of_the_definition(lanes, shape, activation):
    stride, mesh = shape[-1], train_state.make_mesh(1)
    arguments, gradients = random_case(*shape, bool(activation))
    if activation and not native.uses_winograd(arguments[0], arguments[2], stride, mesh):
        pytest.skip("only Winograd applies an affine")
    got = results(lambda *arrays: native.convolve(*arrays, stride, mesh, activation), arguments, gradients)
    with jax.enable_x64(True):
        arguments, gradients = jax.tree.map(lambda a: jnp.array(a, jnp.float64), (arguments, gradients))
        want = results(lambda *arrays: definition(*arrays, stride, activation), arguments, gradients)
    assert_equal_but_for_rounding(got, want)


@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize("shape", POOLED.values(), ids=POOLED)
def test_a_convolution_that_pools_and_its_gradients_are_those_of_the_definition(lanes, shape, activation):
    mesh, (batch, height, width, _, outputs) = train_state.make_mesh(1), shape
    arguments, _ = random_case(*shape, 3, 1, bool(activation))
    rng = np.random.default_rng(1)
    dy = rng.standard_normal((batch, height // 2, width // 2, outputs)).astype(np.float32)
    gradients = dy, np.float32([[1.0], [0.1]]) * rng.standard_normal((2, outputs)).astype(np.float32)
    got = results(lambda *arrays: native.convolve(*arrays, 1, mesh, activation, True), arguments, gradients)

    def pooled(*arrays):
        y = models.max_pool(definition(*arrays, 1, activation)[0])
        return y, jnp.stack([y.sum((0, 1, 2)), (y * y).sum((0, 1, 2))])

    with jax.enable_x64(True):
        arguments, gradients = jax.tree.map(lambda a: jnp.array(a, jnp.float64), (arguments, gradients))
        want = results(pooled, arguments, gradients)
    assert_equal_but_for_rounding(got, want)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("shape", BLOCK_ENDS)
def test_the_end_of_a_block_and_its_gradients_are_those_of_the_definition(lanes, shape, activation):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in (shape, (2, shape[-1]), shape, shape)]
    mesh = train_state.make_mesh(1)
    got = results(lambda *a: native.add_activate(*a, mesh, activation), arrays[:3], arrays[3])
    with jax.enable_x64(True):
        exact = [jnp.array(a, jnp.float64) for a in arrays]
        function = models.ACTIVATIONS[activation]
        want = results(lambda y, affine, x: function(normalized(y, affine) + x), exact[:3], exact[3])
    assert_equal_but_for_rounding(got, want, limit=1e-6)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("shape", POOLS)
def test_a_max_pool_and_its_gradients_are_those_of_the_definition(lanes, shape, activation):
    batch, height, width, channels = shape
    rng = np.random.default_rng(0)
    shapes = shape, (2, channels), (batch, height // 2, width // 2, channels)
    *arrays, dout = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    got = results(lambda *a: native.activate_max_pool(*a, train_state.make_mesh(1), activation), arrays, dout)
    with jax.enable_x64(True):
        *exact, dout = (jnp.array(a, jnp.float64) for a in (*arrays, dout))
        function = models.ACTIVATIONS[activation]
        want = results(lambda y, affine: models.max_pool(function(normalized(y, affine))), exact, dout)
    assert_equal_but_for_rounding(got, want, limit=1e-6)


def test_the_first_of_equal_pixels_has_the_gradient_of_a_max_pool():
    affine, dout = np.array([[2.0] * 8, [0.5] * 8], np.float32), np.full((1, 1, 1, 8), 3, np.float32)
    _, dy, daffine = results(
        lambda *a: native.activate_max_pool(*a, train_state.make_mesh(1)),
        (np.ones((1, 2, 2, 8), np.float32), affine),
        dout,
    )
    np.testing.assert_array_equal(dy[0, :, :, 0], [[6, 0], [0, 0]])
    np.testing.assert_array_equal(daffine, np.full((2, 8), 3))


@pytest.mark.parametrize("size", [7, 8, 16])
def test_an_images_result_does_not_depend_on_the_batch_it_is_in(size):
    (x, affine, w), _ = random_case(9, size, size, 64, 64, 3, 1, True)
    mesh = train_state.make_mesh(1)
    together, _ = native.convolve(x, affine, w, 1, mesh)
    others = np.roll(x, 1, axis=0) * np.float32([2, 2, 2, 2, 2, 1, 2, 2, 2]).reshape(9, 1, 1, 1)
    among_others, _ = native.convolve(others, affine, w, 1, mesh)
    np.testing.assert_array_equal(together[4], among_others[5])
    if size == 16:  # alone it has the 16 tiles that Winograd is worth
        alone, _ = native.convolve(x[4:5], affine, w, 1, mesh)
        np.testing.assert_array_equal(together[4:5], alone)


def test_what_is_not_a_number_stays_so():
    (x, affine, w), _ = random_case(1, 16, 16, 16, 16, 3, 1, True)
    x[0, 3, 3, 5] = np.nan
    mesh = train_state.make_mesh(1)
    y, sums = native.convolve(x, affine, w, 1, mesh)
    assert np.isnan(y[0, 3, 3]).all()
    assert np.isnan(sums).all()
    pooled, _ = native.convolve(x, affine, w, 1, mesh, "relu", True)
    assert np.isnan(pooled[0, 1, 1]).all()
    for activation in models.ACTIVATIONS:
        assert np.isnan(native.add_activate(x, affine, x, mesh, activation)[0, 3, 3, 5])
        assert np.isnan(native.activate_max_pool(x, affine, mesh, activation)[0, 1, 1, 5])


def test_gelu_is_right_far_from_zero_too():
    """Up to where float32's exponential ends, and beyond; [N, 8] values as the shortcut of zeros."""
    z = np.concatenate([np.linspace(-100, 100, 20_001), np.linspace(-1, 1, 20_003), [-3e38, 3e38]]).astype(np.float32)
    z = np.resize(z, (len(z) // 8 + 1, 1, 1, 8))
    zeros, affine, mesh = np.zeros_like(z), np.zeros((2, 8), np.float32), train_state.make_mesh(1)
    ours, vjp = jax.vjp(lambda z: native.add_activate(zeros, affine, z, mesh, "gelu"), z)
    with jax.enable_x64(True):
        exact, exact_vjp = jax.vjp(models.ACTIVATIONS["gelu"], jnp.array(z, jnp.float64))
        slope = exact_vjp(jnp.ones_like(exact))[0]
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(vjp(np.ones_like(z))[0], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "pool"),
    [((16, 8, 8, 16, 24, 3, 1), False), ((16, 8, 8, 16, 24, 3, 1), True), ((6, 9, 7, 16, 24, 3, 2), False)],
)
def test_two_devices_compute_the_same_each_on_its_share(shape, pool):
    *_, stride = shape
    arguments, (dy, dsums) = random_case(*shape, with_affine=stride == 1)
    gradients = dy[:, ::2, ::2] if pool else dy, dsums

    def convolve(*arrays, mesh):
        return native.convolve(*arrays, stride, mesh, "gelu", pool)

    one, two = (
        results(jax.jit(partial(convolve, mesh=mesh)), arguments, gradients)
        for mesh in (train_state.make_mesh(1), train_state.make_mesh(2))
    )
    np.testing.assert_array_equal(one[0], two[0])  # the output
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


_DIGESTS = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import numpy as np
from test_native import BLOCK_ENDS, POOLED, POOLS, SHAPES, native, random_case, results
from resnet_jax import train_state
for shape in SHAPES.values():
    stride, mesh = shape[-1], train_state.make_mesh(1)
    (x, affine, w), gradients = random_case(40, *shape[1:], True)
    arguments = x, affine if native.uses_winograd(x, w, stride, mesh) else None, w
    print(train_state.digest(results(lambda *a: native.convolve(*a, stride, mesh), arguments, gradients)))
for shape in POOLED.values():
    arguments, (dy, dsums) = random_case(40, *shape[1:], 3, 1, True)
    gradients = dy[:, ::2, ::2], dsums
    print(train_state.digest(results(lambda *a: native.convolve(*a, 1, mesh, "gelu", True), arguments, gradients)))
rng = np.random.default_rng(0)
for shape in BLOCK_ENDS:
    y, x, dy = (rng.standard_normal((40, *shape[1:])).astype(np.float32) for _ in range(3))
    affine = rng.standard_normal((2, shape[-1])).astype(np.float32)
    print(train_state.digest(results(lambda *a: native.add_activate(*a, mesh), (y, affine, x), dy)))
for shape in POOLS:
    y = rng.standard_normal((40, *shape[1:])).astype(np.float32)
    dy = rng.standard_normal((40, shape[1] // 2, shape[2] // 2, shape[3])).astype(np.float32)
    affine = rng.standard_normal((2, shape[-1])).astype(np.float32)
    print(train_state.digest(results(lambda *a: native.activate_max_pool(*a, mesh), (y, affine), dy)))
"""


def test_no_result_depends_on_the_number_of_threads(request):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one processor")
    one, two = (
        subprocess.run(
            [sys.executable, "-c", _DIGESTS, threads],
            cwd=request.path.parent,
            capture_output=True,
            text=True,
            timeout=600,
        )
        for threads in ("1", "2")
    )
    assert len(one.stdout.split()) == sum(map(len, (SHAPES, POOLED, BLOCK_ENDS, POOLS))), one.stderr
    assert one.stdout == two.stdout


_SANITIZED = """
import ctypes, pathlib, sys
import jax
from resnet_jax.kernels import native
native._LIBRARY = pathlib.Path(sys.argv[1])
from test_native import SHAPES, random_case, results, train_state
for lanes in 4, 8, 16:
    native.library().set_vector_lanes(ctypes.c_int64(lanes))
    for shape in SHAPES.values():
        stride, mesh = shape[-1], train_state.make_mesh(1)
        (x, affine, w), gradients = random_case(*shape, True)
        arguments = x, affine if native.uses_winograd(x, w, stride, mesh) else None, w
        y, _ = native.convolve(*arguments, stride, mesh)
        jax.block_until_ready(results(lambda *a: native.convolve(*a, stride, mesh), arguments, gradients))
        if native.uses_winograd(x, w, stride, mesh) and shape[1] % 2 == shape[2] % 2 == 0:
            pooled = gradients[0][:, ::2, ::2], gradients[1]
            function = lambda *a: native.convolve(*a, stride, mesh, "gelu", True)
            jax.block_until_ready(results(function, arguments, pooled))
        if shape[4] % 8 == 0:
            arguments = y, jax.numpy.ones((2, shape[4])), y
            jax.block_until_ready(results(lambda *a: native.add_activate(*a, mesh), arguments, y))
            if shape[1] % 2 == shape[2] % 2 == 0 and y.shape[1] % 2 == y.shape[2] % 2 == 0:
                pooled = native.activate_max_pool(*arguments[:2], mesh)
                jax.block_until_ready(results(lambda *a: native.activate_max_pool(*a, mesh), arguments[:2], pooled))
print("no error")
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed here")
def test_the_sanitizers_find_no_error_in_memory_or_arithmetic(request, tmp_path):
    kernels = Path(native.__file__).parent
    library = tmp_path / "sanitized.so"
    digest = hashlib.sha256(b"".join((kernels / name).read_bytes() for name in native.SOURCES)).hexdigest()
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi",
         f'-DSOURCES_DIGEST="{digest}"', "-isystem", jax.ffi.include_dir(), "-fPIC", "-shared",
         kernels / "convolution.cc", "-o", library],
        check=True, timeout=1800,
    )  # fmt: skip
    preload = (
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    done = subprocess.run(
        [sys.executable, "-c", _SANITIZED, library], cwd=request.path.parent, capture_output=True, text=True, timeout=1800,
        env={**os.environ, "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert done.stdout == "no error\n", done.stderr
