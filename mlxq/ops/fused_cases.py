"""Small seeded calls of the fused Metal kernels, for `ops.kernel_check`: see `ops.kernel_cases`."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from mlxq.formats import ggml
from mlxq.formats.geometry import block_format
from mlxq.ops import kernel_cases
from mlxq.ops.arrays import to_mlx
from mlxq.ops.kernel_cases import TOLERANCE, Affine, Blocks, Outcome

_N = 37


class FusedCase(NamedTuple):
    """A small call that stands for all that share its kernel; without an activation it is one of `projections`."""

    activation: str
    weights: tuple[Affine | Blocks, ...]
    rows: str
    permuted: bool

    def __str__(self) -> str:
        what = f"gated_projection with {self.activation}" if self.activation else "projections"
        names = dict.fromkeys(_name(w) for w in self.weights)
        order = "columns of x permuted" if self.permuted else ""
        return ", ".join(filter(None, (f"{what} of {' and '.join(names)}", self.weights[0].dtype, self.rows, order)))


def case_of(activation: str, weights: tuple[Affine | Blocks, ...], rows: int, permuted: bool) -> FusedCase:
    """The case that stands for a call with `rows` rows of x."""
    ops = ["block_matmul" if isinstance(w, Blocks) else "quantized_matmul" for w in weights]
    cases = [kernel_cases.case_of(op, w, rows) for op, w in zip(ops, weights, strict=True)]
    return FusedCase(activation, tuple(c.weights for c in cases), cases[0].rows, permuted)


def outcomes(case: FusedCase) -> Iterator[Outcome]:
    """Run a case's kernel."""
    from mlxq.ops import fused

    rng = np.random.default_rng(0)
    # Small rows of blocks of several types need not be equally long.
    K = lcm(*(_columns(w) for w in case.weights))
    made = [_made(rng, w, K) for w in case.weights]
    x = kernel_cases.random_x(rng, (kernel_cases.rows_of(case.rows), K), case.weights[0].dtype)
    order = rng.permutation(K).astype(np.int32) if case.permuted else None
    wide = kernel_cases.wide(x)[:, order] if case.permuted else kernel_cases.wide(x)
    expected = [wide @ w.T for _, w in made]
    options: dict[str, Any] = {"g_idx": order, "backend": "metal"}
    held = [w for w, _ in made]
    tolerance = [TOLERANCE[_dtype(w)] for w in case.weights]
    if not case.activation:
        for y, e, t in zip(fused.projections(to_mlx(x), held, **options), expected, tolerance, strict=True):
            yield Outcome(kernel_cases.wide(y), e, t * float(np.abs(e).max()))
        return
    g, u = expected
    a = fused.ACTIVATIONS[case.activation](g)
    y = fused.gated_projection(to_mlx(x), *held, activation=case.activation, **options)
    # Float32's error of both factors, the activation's slope being at most 1.13; and the rounding of the product.
    factors = TOLERANCE["F32"] * (1.13 * np.abs(g).max() * np.abs(u) + np.abs(a) * np.abs(u).max())
    yield Outcome(kernel_cases.wide(y), a * u, factors + tolerance[0] * float(np.abs(a * u).max()))


def _made(rng: np.random.Generator, how: Affine | Blocks, K: int) -> tuple[Any, np.ndarray]:
    """Random weights `[N, K]`, in mlx, and what they stand for in float64."""
    from mlxq.ops import fused

    if isinstance(how, Blocks):
        blocks = kernel_cases.random_blocks(rng, how.type_name, (_N, K // block_format(how.type_name).block_size))
        return fused.BlockWeights(to_mlx(blocks), how.type_name), ggml.dequantize(blocks, how.type_name).astype(float)
    packed = kernel_cases.random_affine(rng, (how.N, K), how.bits, how.group_size, how.scales_dtype)
    held = [to_mlx(a) for a in packed]
    return fused.PackedWeights(*held, how.bits, how.group_size), kernel_cases.decoded(packed, how)


def _columns(how: Affine | Blocks) -> int:
    if isinstance(how, Affine):
        return how.K
    f = block_format(how.type_name)
    return how.row_bytes // f.type_size * f.block_size


def _dtype(how: Affine | Blocks) -> str:
    """Of the result."""
    return how.dtype if isinstance(how, Blocks) or how.dtype == how.scales_dtype else "F32"


def _name(how: Affine | Blocks) -> str:
    return how.type_name if isinstance(how, Blocks) else f"{how.bits}-bit group {how.group_size}"
