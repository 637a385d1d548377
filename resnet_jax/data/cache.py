"""The user's cache folder, for decoded images and compiled programs."""

import functools
import os
import sys
import tempfile
from pathlib import Path


def folder() -> Path | None:
    """Return the user's cache folder for this project, made if necessary; None, said once, if it cannot be written."""
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_jax"
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # the latter without HOME and without an entry for the user in passwd
        _say_once(f"running without caches ({error}): to keep them, set XDG_CACHE_HOME to a folder that you can write")
        return None
    return path


def keep_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder, unless it keeps them elsewhere already."""
    import jax  # here, because those who only look for data need not wait for it

    if not jax.config.values["jax_compilation_cache_dir"] and (path := folder()):
        jax.config.update("jax_compilation_cache_dir", str(path / "xla"))
        # The default leaves out what compiles within a second, such as a network's forward pass.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
