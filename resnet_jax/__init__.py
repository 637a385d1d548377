"""resnet_jax: a small, exact, fast trainer for CIFAR-scale image classifiers in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_jax.inference.trained_model import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Model`, imported only when they are asked for: JAX takes seconds, and a command line shows mistakes at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_jax.inference import trained_model

    return getattr(trained_model, name)
