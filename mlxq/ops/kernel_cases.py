"""Small seeded calls of our Metal kernels, with what the NumPy reference says of each: `ops.kernel_check` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from mlxq.formats import affine, ggml
from mlxq.formats.floats import dtype_of, from_float32, to_float32
from mlxq.formats.geometry import block_format, packed_words
from mlxq.ops.arrays import import_mlx, to_mlx, to_numpy

#: Largest error of a product, as a part of its largest output: half floats round the result, float32 the sums.
TOLERANCE = {"F32": 1e-6, "F16": 5e-4, "BF16": 4e-3}

#: Rows of weights where none are asked for: not a multiple of any tile.
_N = 37
_EXPERTS = 3
#: Sorts of kernels by the rows of x: up to how many each takes, and how many it is checked with. The last is tiled.
_SORTS = {"1 row": (1, 1), "2 to 8 rows": (8, 4), "9 to 16 rows": (16, 12), "more rows": (None, 19)}
#: Random blocks of which those are taken whose weights are of a common size.
_POOL = 512
_LEAST, _LARGEST = 2.0**-3, 2.0**3
#: Affine kernels treat sizes alike that differ by these; what is left over decides how a kernel ends.
_PERIOD_N, _PERIOD_K = 256, 1024
#: Steps of the grid within which `quantize` stays: one of rounding and clipping, one of bfloat16's scales and biases.
_STEPS = 2


class Blocks(NamedTuple):
    """What a kernel on ggml blocks is made for: their type, the dtype of x (or of decoded weights), bytes of a row."""

    type_name: str
    dtype: str
    row_bytes: int


class Affine(NamedTuple):
    """What a kernel on affine weights `[N, K]` is made for: their grid, and the dtypes of x (`""` where there is none)
    and of scales and biases; N is 0 where it does not matter."""

    bits: int
    group_size: int
    dtype: str
    scales_dtype: str
    K: int
    N: int = 0
    transpose: bool = True


class Case(NamedTuple):
    """A small call that stands for all that share its kernel: those have the same case, and so one verdict."""

    op: str
    weights: Blocks | Affine
    rows: str

    def __str__(self) -> str:
        w = self.weights
        name = w.type_name if isinstance(w, Blocks) else f"{w.bits}-bit group {w.group_size}"
        dtype = w.dtype if isinstance(w, Blocks) else w.dtype or w.scales_dtype
        turned = "" if isinstance(w, Blocks) or w.transpose else "not transposed"
        return ", ".join(filter(None, (f"{self.op} of {name}", dtype, self.rows, turned)))


class Outcome(NamedTuple):
    """A kernel's result, and what it should be: the same bits where `allowed` is None, else values that are at most
    `allowed` away."""

    y: np.ndarray
    expected: np.ndarray
    allowed: Any = None

    @property
    def complaint(self) -> str:
        """What is wrong with the result; empty if nothing is."""
        y, expected, allowed = self
        if allowed is None:
            n = int((y.view(np.uint8) != expected.view(np.uint8)).sum())
            return f"{n} of {expected.nbytes} bytes differ from the reference" if n else ""
        error = np.abs(y - expected)
        if (error <= allowed).all():
            return ""
        largest = float(np.abs(expected).max())
        limit = float(np.max(allowed)) / largest
        return f"error {float(error.max()) / largest:.2g} of the largest output, allowed {limit:.2g}"


@lru_cache(maxsize=1024)
def case_of(op: str, weights: Blocks | Affine, rows: int) -> Case:
    """The case that stands for a call with `rows` rows of x."""
    sort = ""
    if op in ("block_matmul", "quantized_matmul"):
        sort = next(name for name, (most, _) in _SORTS.items() if most is None or rows <= most)
    if isinstance(weights, Affine):
        small = weights._replace(N=_alike(weights.N, _PERIOD_N), K=_alike(weights.K, _PERIOD_K))
        return Case(op, small, sort)
    f = block_format(weights.type_name)
    # An odd multiple: the largest power of two up to 16 that divides the bytes of a row stays what it is.
    n_blocks = gcd(weights.row_bytes // f.type_size, 16) * (1 if f.block_size > 32 else 5)
    return Case(op, weights._replace(row_bytes=n_blocks * f.type_size), sort)


def _alike(size: int, period: int) -> int:
    return size if size < 2 * period else period + size % period


def rows_of(sort: str) -> int:
    """How many rows of x a sort of kernels (`Case.rows`) is checked with."""
    return _SORTS[sort][1]


def outcomes(case: Case) -> Iterator[Outcome]:
    """Run a case's kernels."""
    compute = _of_blocks if isinstance(case.weights, Blocks) else _of_affine
    return compute(case, case.weights, np.random.default_rng(0))


def _of_blocks(case: Case, weights: Blocks, rng: np.random.Generator) -> Iterator[Outcome]:
    from mlxq.ops import metal_blocks

    type_name, dtype, row_bytes = weights
    n_blocks = row_bytes // block_format(type_name).type_size
    if case.op == "block_dequantize":
        blocks = random_blocks(rng, type_name, (_N, n_blocks))
        expected = from_float32(ggml.dequantize(blocks, type_name), dtype)
        yield Outcome(_stored(metal_blocks.block_dequantize(to_mlx(blocks), type_name, dtype)), expected)
    elif case.op == "block_matmul":
        blocks = random_blocks(rng, type_name, (_N, n_blocks))
        w = ggml.dequantize(blocks, type_name).astype(np.float64)
        x = random_x(rng, (rows_of(case.rows), w.shape[-1]), dtype)
        yield _product(metal_blocks.block_matmul(to_mlx(x), to_mlx(blocks), type_name), wide(x) @ w.T, dtype)
    else:
        blocks = random_blocks(rng, type_name, (_EXPERTS, _N, n_blocks))
        w = ggml.dequantize(blocks, type_name).astype(np.float64)
        # Few products go one by one, many sorted by expert and in tiles.
        for n in (2, 40):
            experts = rng.integers(0, _EXPERTS, n).astype(np.uint32)
            x = random_x(rng, (n, 1, w.shape[-1]), dtype)
            y = metal_blocks.gather_block_matmul(to_mlx(x), to_mlx(blocks), import_mlx().array(experts), type_name)
            yield _product(y, _gathered(wide(x), w, experts), dtype)


def _of_affine(case: Case, how: Affine, rng: np.random.Generator) -> Iterator[Outcome]:
    from mlxq.ops import metal_backend

    grid = how.bits, how.group_size
    if case.op == "quantize":
        w = random_x(rng, (_N, how.K), how.scales_dtype)
        packed = [_stored(a) for a in metal_backend.quantize(to_mlx(w), *grid)]
        steps = np.repeat(np.abs(wide(packed[1])), how.group_size, axis=-1)
        yield Outcome(decoded(packed, how), wide(w), _STEPS * steps)
        return
    lead = (_EXPERTS,) if case.op == "gather_quantized_matmul" else ()
    packed = random_affine(rng, (*lead, how.N or _N, how.K), *grid, how.scales_dtype)
    held = [to_mlx(a) for a in packed]
    if case.op == "dequantize":
        codes = affine.unpack(packed[0], how.bits, how.K)
        yield Outcome(
            _stored(metal_backend.dequantize(*held, *grid, None)), affine.dequantize(codes, *packed[1:], *grid)
        )
        return
    w = decoded(packed, how)
    w = w if how.transpose else w.swapaxes(-1, -2)
    out = how.dtype if how.dtype == how.scales_dtype else "F32"
    if case.op == "quantized_matmul":
        x = random_x(rng, (rows_of(case.rows), w.shape[-1]), how.dtype)
        yield _product(metal_backend.quantized_matmul(to_mlx(x), *held, how.transpose, *grid), wide(x) @ w.T, out)
        return
    # Few products go one by one, many sorted by expert and in tiles.
    for n in (2, metal_backend.MIN_SORTED_ROWS + 6):
        experts = np.sort(rng.integers(0, _EXPERTS, n)).astype(np.uint32)
        x = random_x(rng, (n, 1, w.shape[-1]), how.dtype)
        indices = import_mlx().array(experts)
        y = metal_backend.gather_quantized_matmul(to_mlx(x), *held, indices, how.transpose, *grid, True)
        yield _product(y, _gathered(wide(x), w, experts), out)


def _product(y: Any, expected: np.ndarray, dtype: str) -> Outcome:
    return Outcome(wide(y), expected, TOLERANCE[dtype] * float(np.abs(expected).max()))


def _gathered(x: np.ndarray, w: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Rows x `[n, 1, K]` times the matrices `w` `[experts, N, K]` that were chosen for them."""
    n = len(experts)
    with_all = (x[:, 0] @ w.reshape(-1, w.shape[-1]).T).reshape(n, len(w), 1, w.shape[1])
    return with_all[np.arange(n), experts]


def random_blocks(rng: np.random.Generator, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of random bytes, uint8 `[..., row_bytes]` for a `shape` in blocks, none too large nor too small."""
    f = block_format(type_name)
    pool = rng.integers(0, 256, (_POOL, f.type_size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        size = np.abs(ggml.dequantize(pool, type_name)).max(axis=1)
    fit = pool[(size >= _LEAST) & (size <= _LARGEST)]
    chosen = fit[rng.integers(0, len(fit), shape)]
    return np.ascontiguousarray(chosen).reshape(*shape[:-1], shape[-1] * f.type_size)


def random_affine(
    rng: np.random.Generator, shape: tuple[int, ...], bits: int, group_size: int, dtype: str
) -> list[np.ndarray]:
    """Random codes, and scales and biases that put the weights around zero, for weights of a `shape` `[..., N, K]`."""
    *lead, K = shape
    words = (*lead, packed_words(K, bits))
    w_q = rng.integers(0, 1 << 32, words, dtype=np.uint32)
    scales = (rng.standard_normal((*lead, K // group_size)) / 2**bits).astype(np.float32)
    biases = -scales * ((2**bits - 1) / 2)
    return [w_q, from_float32(scales, dtype), from_float32(biases, dtype)]


def random_x(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return from_float32(rng.standard_normal(shape).astype(np.float32), dtype)


def decoded(packed: list[np.ndarray], how: Affine) -> np.ndarray:
    """`scales * q + biases` in float64, not rounded."""
    scales, biases = (np.repeat(wide(a), how.group_size, axis=-1) for a in packed[1:])
    return affine.unpack(packed[0], how.bits, how.K) * scales + biases


def _stored(a: Any) -> np.ndarray:
    return np.array(to_numpy(a))


def wide(a: Any) -> np.ndarray:
    a = to_numpy(a)
    return to_float32(a, dtype_of(a)).astype(np.float64)
