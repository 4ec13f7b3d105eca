"""Whether a Metal kernel computes on this GPU what the reference does: found out when it is first used.

Our kernels are checked on the CPU in every run of the tests, but not by Apple's compiler, nor on every chip. So the
first product of each kind in a process is preceded by a small seeded one (milliseconds, mostly those of a compiler that
had to run anyway), compared with NumPy's. A kernel that is wrong, or does not compile, is not used again.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from mlxq.formats import ggml
from mlxq.formats.floats import dtype_of, from_float32, to_float32
from mlxq.formats.geometry import block_format
from mlxq.ops.arrays import import_mlx, to_mlx, to_numpy
from mlxq.ops.dispatch import launches_on_gpu

#: Largest error of a product, as a part of its largest output: half floats round the result, float32 the sums.
TOLERANCE = {"F32": 1e-6, "F16": 5e-4, "BF16": 4e-3}

#: Outputs of the products: not a multiple of any tile.
_N = 37
_EXPERTS = 3
#: Sorts of kernels by the rows of x: up to how many each takes, and how many it is checked with. The last is tiled.
_SORTS = {"1 row": (1, 1), "2 to 8 rows": (8, 4), "9 to 16 rows": (16, 12), "more rows": (None, 19)}
#: Random blocks of which those are taken whose weights are of a common size.
_POOL = 512
_LEAST, _LARGEST = 2.0**-3, 2.0**3


class Blocks(NamedTuple):
    """What a kernel on ggml blocks is made for: their type, the dtype of x (or of decoded weights), bytes of a row."""

    type_name: str
    dtype: str
    row_bytes: int


class _Kernel(NamedTuple):
    """Calls that share a verdict. `n_blocks` of a row are few, and let weights be loaded in pieces of the same size."""

    op: str
    type_name: str
    dtype: str
    rows: str
    n_blocks: int

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"{self.op} of {self.type_name}", self.dtype, self.rows)))


_verdicts: dict[_Kernel, bool] = {}
_lock = threading.Lock()


def passes(op: str, blocks: Blocks, rows: int) -> bool:
    """Whether the Metal kernel of a call on ggml blocks agrees with NumPy; warns once of one that does not.

    Where something stands in for `mx.fast.metal_kernel`, in tests, there is nothing to find out.

    Args:
        op: `block_dequantize`, `block_matmul` or `gather_block_matmul`.
        blocks: of a type in `dispatch.METAL_TYPES`.
        rows: of x; 0 where there is no x.
    """
    kernel = _kernel(op, blocks, rows)
    verdict = _verdicts.get(kernel)
    if verdict is None:
        if not launches_on_gpu():
            return True
        with _lock:
            verdict = _verdicts.get(kernel)
            if verdict is None:
                verdict = _verdicts[kernel] = _check(kernel)
    return verdict


def _kernel(op: str, blocks: Blocks, rows: int) -> _Kernel:
    f = block_format(blocks.type_name)
    # An odd multiple: the largest power of two up to 16 that divides the bytes of a row stays what it is.
    n_blocks = gcd(blocks.row_bytes // f.type_size, 16) * (1 if f.block_size > 32 else 5)
    sort = ""
    if op == "block_matmul":
        sort = next(name for name, (most, _) in _SORTS.items() if most is None or rows <= most)
    return _Kernel(op, blocks.type_name, blocks.dtype, sort, n_blocks)


def _check(kernel: _Kernel) -> bool:
    try:
        wrong = _mismatch(kernel)
    except Exception as error:  # whatever keeps it from running: the Metal compiler, mlx, the driver
        wrong = _told_by(error)
    if wrong:
        chip = import_mlx().device_info().get("device_name", "this GPU")
        warnings.warn(
            f"the Metal kernel for {kernel} is not used on {chip}, NumPy decodes the blocks instead: {wrong}",
            stacklevel=5,
        )
    return not wrong


def _told_by(error: Exception) -> str:
    """One line of an error: of a compiler's many the first that names one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "error:" in line), lines[0])


def _mismatch(kernel: _Kernel) -> str:
    """What is wrong with a kernel's results; empty if nothing is."""
    for y, expected in _results(kernel):
        if kernel.op == "block_dequantize":
            n = int((y.view(np.uint8) != expected.view(np.uint8)).sum())
            if n:
                return f"{n} of {expected.nbytes} bytes differ from the reference"
            continue
        error, largest = float(np.abs(y - expected).max()), float(np.abs(expected).max())
        if not error <= TOLERANCE[kernel.dtype] * largest:
            return f"error {error / largest:.2g} of the largest output, allowed {TOLERANCE[kernel.dtype]:g}"
    return ""


def _results(kernel: _Kernel) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A kernel's results, and what they should be: bytes of weights, or float64 outputs."""
    from mlxq.ops import metal_blocks

    rng = np.random.default_rng(0)
    type_name, dtype = kernel.type_name, kernel.dtype
    if kernel.op == "block_dequantize":
        blocks = _random_blocks(rng, type_name, (_N, kernel.n_blocks))
        expected = from_float32(ggml.dequantize(blocks, type_name), dtype)
        yield _stored(metal_blocks.block_dequantize(to_mlx(blocks), type_name, dtype)), expected
    elif kernel.op == "block_matmul":
        blocks = _random_blocks(rng, type_name, (_N, kernel.n_blocks))
        w = ggml.dequantize(blocks, type_name).astype(np.float64)
        x = _random_x(rng, (_SORTS[kernel.rows][1], w.shape[-1]), dtype)
        yield _wide(metal_blocks.block_matmul(to_mlx(x), to_mlx(blocks), type_name)), _wide(x) @ w.T
    else:
        blocks = _random_blocks(rng, type_name, (_EXPERTS, _N, kernel.n_blocks))
        w = ggml.dequantize(blocks, type_name).astype(np.float64)
        # Few products go one by one, many sorted by expert and in tiles.
        for n in (2, 40):
            experts = rng.integers(0, _EXPERTS, n).astype(np.uint32)
            x = _random_x(rng, (n, 1, w.shape[-1]), dtype)
            y = metal_blocks.gather_block_matmul(to_mlx(x), to_mlx(blocks), import_mlx().array(experts), type_name)
            with_all = (_wide(x)[:, 0] @ w.reshape(_EXPERTS * _N, -1).T).reshape(n, _EXPERTS, 1, _N)
            yield _wide(y), with_all[np.arange(n), experts]


def _random_blocks(rng: np.random.Generator, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of random bytes, uint8 `[..., row_bytes]` for a `shape` in blocks, none too large nor too small."""
    f = block_format(type_name)
    pool = rng.integers(0, 256, (_POOL, f.type_size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        size = np.abs(ggml.dequantize(pool, type_name)).max(axis=1)
    fit = pool[(size >= _LEAST) & (size <= _LARGEST)]
    chosen = fit[rng.integers(0, len(fit), shape)]
    return np.ascontiguousarray(chosen).reshape(*shape[:-1], shape[-1] * f.type_size)


def _random_x(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return from_float32(rng.standard_normal(shape).astype(np.float32), dtype)


def _stored(a: Any) -> np.ndarray:
    return np.array(to_numpy(a))


def _wide(a: Any) -> np.ndarray:
    a = to_numpy(a)
    return to_float32(a, dtype_of(a)).astype(np.float64)
