"""Builds `resnet_jax/kernels/convolution.cc`, where a C++ compiler is at hand; pyproject.toml holds all else."""

import hashlib
from pathlib import Path

import jaxlib
from setuptools import Extension, setup

SOURCES = ["resnet_jax/kernels/convolution.cc", "resnet_jax/kernels/convolution_simd.h"]
digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in SOURCES)).hexdigest()

setup(
    ext_modules=[
        Extension(
            "resnet_jax.kernels._convolution",
            SOURCES[:1],
            depends=SOURCES[1:],
            define_macros=[("SOURCES_DIGEST", f'"{digest}"')],  # so that `native.py` knows those that are out of date
            include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
            extra_compile_args=["-std=c++17", "-Wno-psabi"],
            language="c++",
            optional=True,
        )
    ]
)
