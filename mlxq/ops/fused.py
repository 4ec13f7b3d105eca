"""Several products with the same x as one operation: q, k and v; gate and up with the function between them.

Up to 16 rows of x are multiplied by one Metal kernel where the table in `mlxq.ops.dispatch` chooses `metal` for each
product; everywhere else, and for more rows, the products are computed one by one by the operations of `mlxq.ops`. With
NumPy arrays and the NumPy back end this is the reference: float32 until the result is rounded.

`g_idx`, as GPTQ stores it, says which column of x each column of the weights multiplies. The kernels follow it while
they load x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import erf, pi, prod, sqrt
from typing import Any, NamedTuple

import numpy as np

from mlxq.api import public
from mlxq.errors import FormatError
from mlxq.formats.floats import dtype_of, from_float32, to_float32
from mlxq.ops import fused_cases, kernel_check, validation
from mlxq.ops.arrays import Operand, describe, indices_to_kind, to_kind
from mlxq.ops.choices import Product
from mlxq.ops.dispatch import METAL_TYPES, asked, call_on, choose
from mlxq.ops.kernel_cases import Affine, Blocks

#: Rows of x up to which one kernel computes all products, and how many products.
MAX_ROWS = 16
MAX_PRODUCTS = 4


class PackedWeights(NamedTuple):
    """An affine matrix `[N, K]`: `w_q` uint32 `[N, K * bits // 32]`, `scales` and `biases` `[N, K // group_size]`."""

    w_q: Any
    scales: Any
    biases: Any
    bits: int
    group_size: int


class BlockWeights(NamedTuple):
    """A matrix `[N, K]` in ggml blocks: uint8 `[N, row_bytes]` of the type `type_name`."""

    blocks: Any
    type_name: str


Weights = PackedWeights | BlockWeights


def _gelu(g: np.ndarray) -> np.ndarray:
    error = np.frompyfunc(erf, 1, 1)(g.astype(np.float64) / sqrt(2)).astype(g.dtype)
    return g * (1 + error) / 2


def _gelu_approx(g: np.ndarray) -> np.ndarray:
    return 0.5 * g * (1 + np.tanh(sqrt(2 / pi) * (g + 0.044715 * g**3)))


def _silu(g: np.ndarray) -> np.ndarray:
    return g / (1 + np.exp(-g))


#: The functions of mlx.nn that may stand between gate and up, in NumPy.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "gelu_approx": _gelu_approx,
    "gelu": _gelu,
}


@public
def projections(
    x: Any, weights: Sequence[Weights], *, g_idx: Any = None, backend: str | None = None
) -> tuple[Any, ...]:
    """`x @ w.T` for each matrix, in one launch where a kernel takes them together.

    Args:
        x: float `[..., K]`.
        weights: matrices with K columns; each may have a grid or type of its own.
        g_idx: integers `[K]`, a permutation: column k of every matrix multiplies column `g_idx[k]` of x.

    Returns:
        `[..., N]` for each matrix, dtypes as in `quantized_matmul` and `block_matmul`; differentiable in x.

    Raises:
        FormatError: an argument breaks a rule of those operations, or `g_idx` is no permutation of K columns (of an
            mlx array only dtype and shape are checked: an index past K then means column K - 1).
        BackendError: as there.
    """
    weights = tuple(weights)
    checked = _check("projections", x, weights, g_idx)
    if _on_metal(checked, "", backend):
        return _launched(partial(_launch_each, weights), partial(_each, weights, backend), x, checked, g_idx)
    return _each(weights, backend, _in_order(x, g_idx))


@public
def gated_projection(
    x: Any, gate: Weights, up: Weights, *, activation: str, g_idx: Any = None, backend: str | None = None
) -> Any:
    """`activation(x @ gate.T) * (x @ up.T)`, the first half of a feed-forward layer.

    Args:
        x: float `[..., K]`.
        gate, up: two matrices `[N, K]`. A kernel computes both if they have one grid or one type.
        activation: `silu` (SwiGLU), `gelu_approx` or `gelu` (GeGLU), as in mlx.nn.
        g_idx: as in `projections`.

    Returns:
        `[..., N]`, dtype as that of a product; differentiable in x. The kernels and NumPy round once, mlx
        at each step.

    Raises:
        FormatError, BackendError: as `projections`; also where gate and up differ in N, or the activation is unknown.
    """
    op = "gated_projection"
    if activation not in ACTIVATIONS:
        raise FormatError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    checked = _check(op, x, (gate, up), g_idx)
    outputs = [len(w[0]) for w in (gate, up)]
    if outputs[0] != outputs[1]:
        raise FormatError(f"{op}: gate and up must have as many outputs, got {outputs[0]} and {outputs[1]}")
    composed = partial(_gated, gate, up, activation, backend)
    if checked.alike and _on_metal(checked, activation, backend):
        return _launched(partial(_launch_gated, gate, up, activation), composed, x, checked, g_idx)[0]
    return composed(_in_order(x, g_idx))[0]


class _Checked(NamedTuple):
    """What the choice of a kernel depends on."""

    kind: str
    rows: int
    weights: tuple[Affine | Blocks, ...]
    empty: bool
    permuted: bool

    @property
    def alike(self) -> bool:
        return len(set(self.weights)) == 1


def _check(op: str, x: Any, weights: tuple[Weights, ...], g_idx: Any) -> _Checked:
    """Apply the rules of the products, and those of `g_idx`."""
    if not 0 < len(weights) <= MAX_PRODUCTS:
        raise FormatError(f"{op}: 1 to {MAX_PRODUCTS} matrices, got {len(weights)}")
    described, kernels, rows = describe(op, "x", x), [], 0
    for w in weights:
        if isinstance(w, BlockWeights):
            blocks = describe(op, "blocks", w.blocks)
            rows = validation.block_matmul(described, blocks, w.type_name)
            kernels.append(Blocks(w.type_name, described.dtype, blocks.shape[-1]))
        elif isinstance(w, PackedWeights):
            w_q, scales, biases = (describe(op, n, a) for n, a in zip(w._fields, w[:3], strict=False))
            rows = validation.quantized_matmul(described, w_q, scales, biases, True, w.bits, w.group_size, "affine")
            N, K = w_q.shape[0], described.shape[-1]
            kernels.append(Affine(w.bits, w.group_size, described.dtype, scales.dtype, K, N))
        else:
            raise FormatError(f"{op}: weights must be PackedWeights or BlockWeights, got {type(w).__name__}")
    if g_idx is not None:
        _check_order(op, describe(op, "g_idx", g_idx), g_idx, described.shape[-1])
    empty = not (rows and described.shape[-1] and all(prod(w[0].shape) for w in weights))
    return _Checked(described.kind, rows, tuple(kernels), empty, g_idx is not None)


def _check_order(op: str, described: Operand, g_idx: Any, K: int) -> None:
    if not described.dtype.startswith(("int", "uint")) or described.shape != (K,):
        raise FormatError(
            f"{op}: g_idx must be integers [{K}], one for each column of x, got {described.dtype} {described.shape}"
        )
    if described.kind == "numpy" and not np.array_equal(np.sort(g_idx), np.arange(K)):
        raise FormatError(f"{op}: g_idx must have each of 0..{K - 1} once")


def _on_metal(checked: _Checked, activation: str, backend: str | None) -> bool:
    """Whether one launch computes it: the table, or who asks for it, wants `metal` for each product, and there is a
    kernel, which is right."""
    kinds = {type(w) for w in checked.weights}
    if checked.empty or checked.rows > MAX_ROWS or len(kinds) > 1:
        return False
    if not all(_choice(checked, w, backend) == "metal" for w in checked.weights):
        return False
    if kinds == {Blocks} and not all(w.type_name in METAL_TYPES for w in checked.weights):
        return False  # the product says so
    return bool(asked(backend)) or kernel_check.agrees(
        fused_cases.case_of(activation, checked.weights, checked.rows, checked.permuted),
        fused_cases.outcomes,
        "each product is computed alone",
    )


def _choice(checked: _Checked, w: Affine | Blocks, backend: str | None) -> str:
    if isinstance(w, Blocks):
        return choose(call_on(checked.kind, "block_matmul", checked.rows, w.type_name), backend)
    measured = None
    if checked.kind == "mlx" and w.dtype == w.scales_dtype:
        measured = Product(w.bits, w.group_size, w.dtype, w.N, w.K)
    call = call_on(checked.kind, "quantized_matmul", checked.rows, group_size=w.group_size, product=measured)
    return choose(call, backend)


def _launched(launch: Callable, composed: Callable, x: Any, checked: _Checked, g_idx: Any) -> tuple[Any, ...]:
    """The results of a kernel, in the kind of x; their gradient is that of `composed`, which mlx can differentiate."""
    import mlx.core as mx

    order = None if g_idx is None else indices_to_kind(g_idx, "mlx").astype(mx.int32)

    @mx.custom_function
    def run(x: mx.array) -> tuple[mx.array, ...]:
        results = launch(x.reshape(checked.rows, x.shape[-1]), order)
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in results)

    @run.vjp
    def gradient(x: mx.array, cotangents: tuple, _: tuple) -> mx.array:
        return mx.vjp(lambda x: list(composed(_in_order(x, order))), [x], list(cotangents))[1][0]

    return tuple(to_kind(y, checked.kind) for y in run(to_kind(x, "mlx")))


def _launch_each(weights: tuple[Weights, ...], x: Any, order: Any) -> Sequence[Any]:
    from mlxq.ops import metal_fused

    held = [_on_mlx(w) for w in weights]
    if isinstance(weights[0], BlockWeights):
        return metal_fused.block_each(x, [w[0] for w in held], [w.type_name for w in weights], order)
    return metal_fused.affine_each(x, held, [w[3:] for w in weights], order)


def _launch_gated(gate: Weights, up: Weights, activation: str, x: Any, order: Any) -> Sequence[Any]:
    from mlxq.ops import metal_fused

    held = _on_mlx(gate), _on_mlx(up)
    if isinstance(gate, BlockWeights):
        return [metal_fused.block_gated(x, held[0][0], held[1][0], gate.type_name, activation, order)]
    return [metal_fused.affine_gated(x, *held, gate[3:], activation, order)]


def _on_mlx(w: Weights) -> tuple:
    return tuple(to_kind(a, "mlx") for a in (w[:1] if isinstance(w, BlockWeights) else w[:3]))


def _each(weights: tuple[Weights, ...], backend: str | None, x: Any) -> tuple[Any, ...]:
    return tuple(_product(w, backend, x) for w in weights)


def _gated(gate: Weights, up: Weights, activation: str, backend: str | None, x: Any) -> tuple[Any]:
    if isinstance(x, np.ndarray):
        dtype = dtype_of(x)
        x = to_float32(x, dtype)
        g, u = _product(gate, backend, x), _product(up, backend, x)
        with np.errstate(over="ignore", invalid="ignore"):
            y = ACTIVATIONS[activation](g) * u
        return (from_float32(y, _dtype_of_product(dtype, gate)),)
    import mlx.nn as nn

    return (getattr(nn, activation)(_product(gate, backend, x)) * _product(up, backend, x),)


def _product(w: Weights, backend: str | None, x: Any) -> Any:
    from mlxq import ops

    if isinstance(w, BlockWeights):
        return ops.block_matmul(x, w.blocks, type_name=w.type_name, backend=backend)
    w_q, scales, biases, bits, group_size = w
    return ops.quantized_matmul(x, w_q, scales, biases, bits=bits, group_size=group_size, backend=backend)


def _dtype_of_product(dtype: str, w: Weights) -> str:
    if isinstance(w, BlockWeights):
        return dtype
    return dtype if dtype == describe("gated_projection", "scales", w.scales).dtype else "F32"


def _in_order(x: Any, g_idx: Any) -> Any:
    """x with its columns as the weights have them."""
    if g_idx is None:
        return x
    if isinstance(x, np.ndarray):
        return np.take(x, indices_to_kind(g_idx, "numpy"), axis=-1)
    return x[..., indices_to_kind(g_idx, "mlx")]
