"""The matrices that a model multiplies by, and products with random ones like them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.formats.floats import from_float32
from mlxq.formats.geometry import AFFINE_BITS, block_format
from mlxq.ops import mlx_backend, numpy_backend
from mlxq.ops.arrays import to_mlx
from mlxq.ops.kernel_cases import random_affine, random_blocks
from mlxq.runtime.layers import install_layers, keeps_blocks
from mlxq.runtime.weights import default_compute_dtype
from mlxq.types import FLOAT_BYTES, QuantSpec

#: Rows of x, each with an expert, from which mlx-lm sorts them (`SwitchGLU` in mlx_lm/models/switch_layers.py).
_SORTED_ROWS = 64
_YARDSTICK_GROUP = 32
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@dataclass(frozen=True)
class Matrix:
    """A kind of matrix `[N, K]`, or of stacks of `experts` such (0 is no stack).

    Attributes:
        spec: its affine grid, or None for ggml blocks of `type_name`.
        dtype: of x, and of an affine grid's scales and biases.
        count: matrices of the model that are like this.
    """

    spec: QuantSpec | None
    type_name: str | None
    dtype: str
    N: int
    K: int
    experts: int = 0
    count: int = 1

    def __str__(self) -> str:
        stack = f"{self.experts} x " if self.experts else ""
        return f"{self.spec or self.type_name} {self.dtype} {stack}{self.N} x {self.K}"

    @property
    def nbytes(self) -> int:
        """Of one `[N, K]` matrix, scales and biases included."""
        if self.type_name is not None:
            f = block_format(self.type_name)
            return self.N * (self.K // f.block_size) * f.type_size
        grids = 2 * FLOAT_BYTES[self.dtype] * (self.K // self.spec.group_size)
        return self.N * (self.K * self.spec.bits // 8 + grids)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.type_name or "affine",
            "bits": self.spec.bits if self.spec else None,
            "group_size": self.spec.group_size if self.spec else None,
            "dtype": self.dtype,
            "N": self.N,
            "K": self.K,
            "experts": self.experts or None,
            "count": self.count,
        }


class Weights(NamedTuple):
    """Copies of one random matrix, each in memory of its own: `w_q`, `scales`, `biases`, or blocks alone."""

    matrix: Matrix
    copies: list[list[Any]]


class Product(NamedTuple):
    """A product of rows of x with one of several copies of the weights.

    `run` takes the copy's number. What it returns is to be evaluated where `lazy`; else it is done. `nbytes` counts the
    weights that are read.
    """

    run: Callable[[int], Any]
    n_copies: int
    lazy: bool
    nbytes: int


def matrices_of(parameters: ParameterMap) -> tuple[list[Matrix], list[str]]:
    """The distinct quantized matrices that a model multiplies by, as the runtime holds them here, the largest first;
    and what is left out, with the reason.

    An embedding is one of them where the model has no head of its own.
    """
    tensors = parameters.tensors
    install_layers(parameters.model, tensors)
    dtype = _NAMES.get(default_compute_dtype(parameters))
    tied = not parameters.has_output_projection
    counts: dict[Matrix, int] = {}
    left_out = []
    for name, info in tensors.items():
        is_multiplied = info.module in ("linear", "switch") or (info.module == "embedding" and tied)
        if info.dtype in FLOAT_BYTES or not is_multiplied:
            continue
        in_blocks = keeps_blocks(info)
        if info.spec is not None and info.spec.mode != "affine":
            left_out.append(f"{name}: mlx alone multiplies by {info.spec}")
            continue
        if not in_blocks and info.spec is None:
            left_out.append(f"{name}: nothing multiplies by {info.dtype} here, it is decoded when it is loaded")
            continue
        *lead, N, K = info.shape
        grid, type_name = (None, info.dtype) if in_blocks else (info.spec, None)
        matrix = Matrix(grid, type_name, dtype or info.scales_dtype or "F16", N, K, lead[0] if lead else 0)
        counts[matrix] = counts.get(matrix, 0) + 1
    found = [Matrix(**{**vars(m), "count": n}) for m, n in counts.items()]
    return sorted(found, key=lambda m: (-m.nbytes, str(m))), left_out


def yardstick(matrix: Matrix) -> Matrix:
    """What mlx multiplies by in the place of blocks: an affine grid of as many bits, in groups of 32."""
    f = block_format(matrix.type_name)
    bits = max([b for b in AFFINE_BITS if b * f.block_size <= 8 * f.type_size], default=AFFINE_BITS[0])
    return Matrix(QuantSpec(bits, _YARDSTICK_GROUP), None, matrix.dtype, matrix.N, matrix.K, matrix.experts)


def random_weights(matrix: Matrix, working_set: int, *, for_numpy: bool) -> Weights:
    """As many copies as fill `working_set` bytes, two at least."""
    rng = np.random.default_rng(0)
    lead = (matrix.experts,) if matrix.experts else ()
    if matrix.spec is not None:
        grid = matrix.spec.bits, matrix.spec.group_size
        parts = random_affine(rng, (*lead, matrix.N, matrix.K), *grid, matrix.dtype)
    else:
        n_blocks = matrix.K // block_format(matrix.type_name).block_size
        parts = [random_blocks(rng, matrix.type_name, (*lead, matrix.N, n_blocks))]
    n_copies = max(2, -(-working_set // (matrix.nbytes * max(matrix.experts, 1))))
    copies = [[p.copy() if for_numpy else to_mlx(p) for p in parts] for _ in range(n_copies)]
    if not for_numpy:
        mx.eval(copies)
    return Weights(matrix, copies)


def product(weights: Weights, rows: int, backend: str) -> Product:
    """`rows` rows of x times the weights, by `metal`, `mlx` or `numpy`; with a stack each row has an expert."""
    matrix, copies = weights
    rng = np.random.default_rng(rows)
    shape = (rows, 1, matrix.K) if matrix.experts else (rows, matrix.K)
    x: Any = from_float32(rng.standard_normal(shape).astype(np.float32), matrix.dtype)
    indices: Any = rng.integers(0, max(matrix.experts, 1), rows)
    is_sorted = rows >= _SORTED_ROWS
    indices = np.sort(indices) if is_sorted else indices
    n_read = len(np.unique(indices)) if matrix.experts else 1
    if backend != "numpy":
        x, indices = to_mlx(x), mx.array(indices.astype(np.uint32))
        mx.eval(x, indices)
    module, spec = _module(backend, matrix), matrix.spec
    if spec is None and matrix.experts:

        def run(i: int) -> Any:
            return module.gather_block_matmul(x, *copies[i], indices, matrix.type_name, is_sorted)

    elif spec is None:

        def run(i: int) -> Any:
            return module.block_matmul(x, *copies[i], matrix.type_name)

    elif matrix.experts:

        def run(i: int) -> Any:
            grid = spec.bits, spec.group_size
            return module.gather_quantized_matmul(x, *copies[i], indices, True, *grid, is_sorted)

    else:

        def run(i: int) -> Any:
            return module.quantized_matmul(x, *copies[i], True, spec.bits, spec.group_size)

    return Product(run, len(copies), backend != "numpy", n_read * matrix.nbytes)


def _module(backend: str, matrix: Matrix) -> Any:
    if backend == "numpy":
        return numpy_backend
    if backend == "mlx":
        return mlx_backend
    from mlxq.ops import metal_backend, metal_blocks

    return metal_backend if matrix.spec else metal_blocks
