"""NumPy and mlx arrays behind one description, and the way from one to the other without copying where possible.

bfloat16 is a uint16 array of its bits in NumPy and a dtype of its own in mlx. mlx is never imported for NumPy arrays.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from mlxq.errors import BackendError, FormatError

Kind = Literal["numpy", "mlx"]

#: The float dtypes of NumPy and of mlx, as their names read.
_FLOAT_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "mlx.core.float32": "F32",
    "mlx.core.float16": "F16",
    "mlx.core.bfloat16": "BF16",
}
_MLX_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def import_mlx() -> ModuleType:
    """`mlx.core`.

    Raises:
        BackendError: mlx is not installed.
    """
    try:
        import mlx.core as mx
    except ImportError as error:
        raise BackendError(f"the mlx back end needs the package mlx, which cannot be imported: {error}") from error
    return mx


class Operand(NamedTuple):
    """What the rules of an operation look at: the kind of array, its shape, and its dtype as `dtype_name` says it."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        return len(self.shape)


def describe(op: str, name: str, a: Any) -> Operand:
    """The description of an argument of an operation.

    Raises:
        FormatError: neither a NumPy nor an mlx array.
    """
    kind = _kind(type(a))
    if kind is None:
        raise FormatError(f"{op}: {name} must be a NumPy or mlx array, got {type(a).__name__}")
    return Operand(kind, a.shape, _name(a.dtype))


@cache
def _kind(cls: type) -> Kind | None:
    if issubclass(cls, np.ndarray):
        return "numpy"
    return "mlx" if (cls.__module__, cls.__name__) == ("mlx.core", "array") else None


def dtype_name(a: Any) -> str:
    """`F32`, `F16`, `BF16`, or the plain name of another dtype, such as `uint32`."""
    return _name(a.dtype)


@cache
def _name(dtype: Any) -> str:
    name = str(dtype)
    return _FLOAT_NAMES.get(name, name.removeprefix("mlx.core."))


def mlx_dtype(name: str) -> Any:
    """The mlx dtype of `F32`, `F16` or `BF16`."""
    return getattr(import_mlx(), _MLX_TYPES[name])


def to_numpy(a: Any) -> np.ndarray:
    """The array in NumPy storage; an mlx array is evaluated, and shared, not copied, where its layout allows."""
    if isinstance(a, np.ndarray):
        return a
    if dtype_name(a) != "BF16":
        return np.asarray(a)
    if a.size and memoryview(a).c_contiguous:
        return np.frombuffer(a, np.uint16).reshape(a.shape)
    return np.asarray(a.view(import_mlx().uint16))


def to_mlx(a: Any) -> Any:
    """The array as mlx array; copies NumPy's memory. uint16 becomes bfloat16."""
    if not isinstance(a, np.ndarray):
        return a
    mx = import_mlx()
    return mx.array(a).view(mx.bfloat16) if a.dtype == np.uint16 else mx.array(a)


def to_kind(a: Any, kind: Kind) -> Any:
    """`to_numpy` or `to_mlx`."""
    return to_numpy(a) if kind == "numpy" else to_mlx(a)


def indices_to_kind(indices: Any, kind: Kind) -> Any:
    """Integer indices as int64 NumPy or uint32 mlx array."""
    if kind == "numpy":
        return np.asarray(indices).astype(np.int64, copy=False)
    mx = import_mlx()
    return (mx.array(indices) if isinstance(indices, np.ndarray) else indices).astype(mx.uint32)
