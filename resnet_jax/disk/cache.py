"""The user's cache folder, for decoded images and compiled programs."""

import contextlib
import functools
import os
import sys
import tempfile
import zlib
from pathlib import Path

_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how JAX's entries begin where Python has zstandard; elsewhere zlib compresses them


def folder() -> Path | None:
    """Return the user's cache folder for this project, made if necessary; None, said once, if it cannot be used.

    It holds compiled programs, which run as they are, so it is used only if no other user can write to it.
    """
    try:
        path = _private(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_jax")
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # the latter without HOME and without an entry for the user in passwd
        _say_once(f"running without caches ({error}): to keep them, set XDG_CACHE_HOME to a folder that you can write")
        return None
    return path


def keep_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder, unless it keeps them elsewhere already."""
    import jax  # here, because those who only look for data need not wait for it

    if jax.config.values["jax_compilation_cache_dir"] or not (path := folder()):
        return
    try:
        programs = _private(path / "xla")
        _remove_torn(programs)
    except OSError as error:
        _say_once(f"running without compiled programs of earlier runs ({error})")
        return
    jax.config.update("jax_compilation_cache_dir", str(programs))
    # The default leaves out what compiles within a second, such as a network's forward pass.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _private(path: Path) -> Path:
    """Make a folder that only this user can read and write.

    Raises:
        PermissionError: if it exists, and belongs to another user or others can write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError(f"other users can write to {path}, and its programs would run: delete it")
    path.chmod(0o700)
    return path


def _remove_torn(programs: Path) -> None:
    """Remove incomplete programs, such as those of a killed process, which JAX would neither read nor replace.

    Programs unchanged since the last check are not read again.
    """
    checked, now = programs / ".checked", programs / f".checked-{os.getpid()}"
    now.touch()  # the time of the file system, which dates the programs too
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    for program in programs.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            if program.stat().st_ctime_ns >= since and not _is_whole(program.read_bytes()):
                program.unlink()
                print(f"removed {program}, a compiled program that is incomplete", file=sys.stderr, flush=True)
    now.replace(checked)


def _is_whole(program: bytes) -> bool:
    if program.startswith(_ZSTANDARD):  # cannot be checked without the library
        return True
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(program)
    except zlib.error:
        return False
    return decompressor.eof


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
