"""Read images without labels from the pickled dict of the report's authors, without running code in the file."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.disk import files
from resnet_jax.errors import UserError, reason

_PLAIN_DTYPE = re.compile(r"[<>|=]?[biufSU]\d+")  # numbers, bytes and text: no objects, no fields


class _Dtype:
    """Replaces `numpy.dtype`, whose pickled state can make NumPy read memory outside the array."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        text = _text(name)
        if not _PLAIN_DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"it has arrays of {text}, but only numbers and text are supported")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Use only the byte order."""
        self.dtype = self.dtype.newbyteorder(_text(state[1]))  # type: ignore[arg-type]


class _Array:
    """Replaces `numpy.ndarray`, which can be made to treat any bytes as objects."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Use shape, dtype, order and bytes."""
        _, shape, dtype, is_fortran, raw = state
        self.array = _from_bytes(raw, dtype, shape, "F" if is_fortran else "C")


def _text(value: str | bytes) -> str:
    """Return text as str; Python 2 pickles it as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else value


def _from_bytes(
    raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any = "C", axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """Replaces NumPy's `_frombuffer`, which transposes arrays by `axes` if their order is neither C nor Fortran."""
    flat = np.frombuffer(raw, dtype.dtype)
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


_MAKERS: dict[tuple[str, str], Any] = {  # everything that a pickle of arrays, scalars and byte strings needs
    ("numpy", "ndarray"): None,  # an argument of `_reconstruct`, never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}
for _core in ("numpy.core", "numpy._core"):
    _MAKERS[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _MAKERS[f"{_core}.multiarray", "scalar"] = lambda dtype, raw: _from_bytes(raw, dtype, ()).item()
    _MAKERS[f"{_core}.numeric", "_frombuffer"] = _from_bytes


class _Maker:
    """A constructor that a pickle can call, and cannot change: it may set attributes of anything that it is given."""

    __slots__ = ("_make",)
    _make: Any

    def __init__(self, make: Any) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        """Make the value."""
        return self._make(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse it."""
        raise pickle.UnpicklingError(f"it would change {name} of a function")

    def __setstate__(self, state: object) -> None:
        """Refuse it."""
        raise pickle.UnpicklingError("it would change a function")


class _ArraysOnly(pickle._Unpickler):  # in Python: that in C makes room for as many objects as a file claims to number
    """Reads plain values and NumPy arrays, and refuses to build or call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return this module's replacement for a constructor of arrays."""
        if (module, name) not in _MAKERS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, but only NumPy arrays are supported")
        return _Maker(_MAKERS[module, name])


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read images, uint8 [N, H, W, 3], and N ids from a pickled dict (`b"data"`, `b"ids"`) or an `.npz` with both.

    Raises:
        UserError: if the file holds anything else; no code in it is run.
    """
    hint = "give a pickled dict with b'data' and b'ids', or an .npz with data and ids"
    try:
        if path.suffix.lower() == ".npz":
            with np.load(files.readable(path), allow_pickle=False) as arrays:
                content: Any = dict(arrays)
        else:
            with files.readable(path).open("rb") as file:
                content = _ArraysOnly(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        if missing := {"data", "ids"} - named.keys():
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        data, ids = (getattr(named[name], "array", named[name]) for name in ("data", "ids"))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 4 or data.shape[3] != 3:
            what = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
            raise ValueError(f"its data are {what}, not uint8 [N, H, W, 3]")
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if not isinstance(ids, list) or len(ids) != len(data):
            raise ValueError(f"its ids are not a list of {len(data)} entries, one for each image")
        if wrong := {type(i).__name__ for i in ids if isinstance(i, bool) or not isinstance(i, int | str | bytes)}:
            raise ValueError(f"its ids have type {', '.join(sorted(wrong))}, not whole numbers or text")
        texts = [i.decode() if isinstance(i, bytes) else str(i) for i in ids]
        "".join(texts).encode()  # fails if a text cannot be written as UTF-8
    except Exception as error:  # NumPy can raise anything for a hostile pickle
        raise UserError(f"--unlabelled {path} cannot be used ({reason(error)}): {hint}") from error
    return data, texts
