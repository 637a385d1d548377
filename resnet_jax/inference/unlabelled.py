"""Images without labels, as the report's authors were given them: a pickled dict, of which nothing but arrays is read."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import UserError

_PLAIN_DTYPE = re.compile(r"[<>|=]?[biufSU]\d+")  # numbers, bytes and text: no objects, no fields


class _Dtype:
    """Stands in for `numpy.dtype`, whose own state can make NumPy read memory that is not the array's."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        text = _text(name)
        if not _PLAIN_DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"it has arrays of {text}, and only those of numbers and text are read")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order alone."""
        self.dtype = self.dtype.newbyteorder(_text(state[1]))  # type: ignore[arg-type]


class _Array:
    """Stands in for `numpy.ndarray`, which takes any memory for objects where a pickle says so."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take shape, dtype, order and bytes."""
        _, shape, dtype, is_fortran, raw = state
        self.array = _from_bytes(raw, dtype, shape, "F" if is_fortran else "C")


def _text(value: str | bytes) -> str:
    """Text as Python 2 and 3 have pickled it."""
    return value.decode("ascii") if isinstance(value, bytes) else value


def _from_bytes(
    raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any = "C", axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """As NumPy's own, which turns arrays by `axes` where their order is neither C's nor Fortran's."""
    flat = np.frombuffer(raw, dtype.dtype)
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


_MAKERS: dict[tuple[str, str], Any] = {  # all that a pickle of arrays, scalars and byte strings asks for
    ("numpy", "ndarray"): None,  # is named to `_reconstruct`, and never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}
for _core in ("numpy.core", "numpy._core"):
    _MAKERS[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _MAKERS[f"{_core}.multiarray", "scalar"] = lambda dtype, raw: _from_bytes(raw, dtype, ()).item()
    _MAKERS[f"{_core}.numeric", "_frombuffer"] = _from_bytes


class _ArraysOnly(pickle.Unpickler):
    """Reads plain values and NumPy arrays, and refuses whatever else a pickle would have built or called."""

    def find_class(self, module: str, name: str) -> Any:
        """What makes an array, by this module."""
        if (module, name) not in _MAKERS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, and only NumPy arrays are read")
        return _MAKERS[module, name]


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """The images uint8 [N, H, W, 3] and N ids of the authors' pickled dict (`b"data"`, `b"ids"`), or of an `.npz` with both.

    Raises:
        UserError: where it is no such file; nothing that it asks for is called.
    """
    hint = "give a pickled dict with b'data' and b'ids', or an .npz with data and ids"
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                held: Any = dict(arrays)
        else:
            with path.open("rb") as file:
                held = _ArraysOnly(file, encoding="bytes").load()
        if not isinstance(held, dict):
            raise ValueError(f"it holds a {type(held).__name__}")
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in held.items()}
        if missing := {"data", "ids"} - named.keys():
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        data, ids = (getattr(named[name], "array", named[name]) for name in ("data", "ids"))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 4 or data.shape[3] != 3:
            what = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
            raise ValueError(f"its data are {what}, not uint8 [N, H, W, 3]")
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if not isinstance(ids, list) or len(ids) != len(data):
            raise ValueError(f"its ids are no list of one an image, of which there are {len(data)}")
        if wrong := {type(i).__name__ for i in ids if isinstance(i, bool) or not isinstance(i, int | str | bytes)}:
            raise ValueError(f"its ids are of type {', '.join(sorted(wrong))}, not whole numbers or text")
        texts = [i.decode() if isinstance(i, bytes) else str(i) for i in ids]
        "".join(texts).encode()  # as the file will be
    except Exception as error:  # what a hostile pickle makes NumPy raise is of every kind
        raise UserError(f"--unlabelled {path} cannot be used ({error or type(error).__name__}): {hint}") from error
    return data, texts
