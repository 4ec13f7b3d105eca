"""Gradients of products with respect to x, where mlx does not know what computes them: NumPy, or our Metal kernels.

The gradient of `x @ w_hat.T` is the other product with the same weights, `cotangent @ w_hat`, by the same back end:
packed weights are constants. Those in ggml blocks are decoded for it, some at a time, as no kernel multiplies them
untransposed. Float weights have a gradient too. The mlx back end needs none of this: mlx differentiates its own
operations.

Nothing here evaluates an array, so with Metal kernels all of it may be inside `mx.compile`. NumPy evaluates x.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlxq.ops.arrays import Kind, indices_to_kind, to_kind, to_mlx

#: Weights in blocks that are decoded for one product: 256 MB of float32.
_DECODED = 1 << 26

#: Weights float32 `[..., K]` of blocks `[..., row_bytes]` of a type.
Decode = Callable[[mx.array, str], mx.array]


class Differentiable:
    """The products of a back end on mlx arrays, with their gradients; signatures as in `mlxq.ops.mlx_backend`.

    Args:
        module: the back end.
        kind: the arrays it takes.
        decode: what decodes blocks for a gradient.
    """

    def __init__(self, module: ModuleType, kind: Kind, decode: Decode):
        self._module = module
        self._kind = kind
        self._decode = decode

    def quantized_matmul(
        self,
        x: mx.array,
        w_q: mx.array,
        scales: mx.array,
        biases: mx.array,
        transpose: bool,
        bits: int,
        group_size: int,
    ) -> mx.array:
        def product(x: mx.array, transpose: bool = transpose) -> mx.array:
            return self._compute("quantized_matmul", (x, w_q, scales, biases), transpose, bits, group_size)

        return with_gradient(product, lambda cotangent: product(cotangent, not transpose))(x)

    def gather_quantized_matmul(
        self,
        x: mx.array,
        w_q: mx.array,
        scales: mx.array,
        biases: mx.array,
        rhs_indices: mx.array,
        transpose: bool,
        bits: int,
        group_size: int,
        sorted_indices: bool,
    ) -> mx.array:
        indices = indices_to_kind(rhs_indices, self._kind)
        grid = bits, group_size, sorted_indices

        def product(x: mx.array, transpose: bool = transpose) -> mx.array:
            return self._compute("gather_quantized_matmul", (x, w_q, scales, biases), indices, transpose, *grid)

        return with_gradient(product, lambda cotangent: product(cotangent, not transpose))(x)

    def matmul(self, x: mx.array, w: mx.array) -> mx.array:
        @mx.custom_function
        def product(x: mx.array, w: mx.array) -> mx.array:
            return self._compute("matmul", (x, w))

        @product.vjp
        def gradient(primals: list, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
            # What is not asked for is never computed: most often the gradient of the weights.
            of_w = _by_mlx(lambda x, w: x @ w.T, primals, cotangent)[1]
            return self._compute("matmul", (cotangent, w.T)).astype(x.dtype), of_w

        return product(x, w)

    def gather_matmul(self, x: mx.array, w: mx.array, rhs_indices: mx.array, sorted_indices: bool) -> mx.array:
        indices = indices_to_kind(rhs_indices, self._kind)

        @mx.custom_function
        def product(x: mx.array, w: mx.array) -> mx.array:
            return self._compute("gather_matmul", (x, w), indices, sorted_indices)

        @product.vjp
        def gradient(primals: list, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
            def plain(x: mx.array, w: mx.array) -> mx.array:
                return mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=rhs_indices, sorted_indices=sorted_indices)

            return _by_mlx(plain, primals, cotangent)

        return product(x, w)

    def block_matmul(self, x: mx.array, blocks: mx.array, type_name: str) -> mx.array:
        def gradient(cotangent: mx.array) -> mx.array:
            return _through_blocks(cotangent, blocks, lambda some: self._decode(some, type_name), x.shape[-1])

        return with_gradient(lambda x: self._compute("block_matmul", (x, blocks), type_name), gradient)(x)

    def gather_block_matmul(
        self, x: mx.array, blocks: mx.array, rhs_indices: mx.array, type_name: str, sorted_indices: bool
    ) -> mx.array:
        indices = indices_to_kind(rhs_indices, self._kind)

        def product(x: mx.array) -> mx.array:
            return self._compute("gather_block_matmul", (x, blocks), indices, type_name, sorted_indices)

        def gradient(cotangent: mx.array) -> mx.array:
            def decode(some: mx.array) -> mx.array:
                return self._decode(some, type_name)

            return _through_experts(cotangent, blocks, rhs_indices, decode, x.shape[-1], sorted_indices)

        return with_gradient(product, gradient)(x)

    def _compute(self, op: str, arrays: tuple[mx.array, ...], *rest: Any) -> mx.array:
        return to_mlx(getattr(self._module, op)(*(to_kind(a, self._kind) for a in arrays), *rest))


def with_gradient(
    product: Callable[[mx.array], mx.array], gradient: Callable[[mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """`product`, a linear function of x, with its gradient: of the cotangent, before x's broadcast axes are summed."""
    function = mx.custom_function(product)

    @function.vjp
    def vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _summed_to(gradient(cotangent), x.shape).astype(x.dtype)

    return function


def _by_mlx(product: Callable[..., mx.array], primals: list, cotangent: mx.array) -> tuple[mx.array, ...]:
    """The gradients that mlx knows, in float32: on the CPU it would round every step of a half-float sum."""
    wide = [a.astype(mx.float32) for a in primals]
    _, gradients = mx.vjp(product, wide, [cotangent.astype(mx.float32)])
    return tuple(g.astype(a.dtype) for g, a in zip(gradients, primals, strict=True))


def _through_blocks(cotangent: mx.array, blocks: mx.array, decode: Callable[[mx.array], mx.array], K: int) -> mx.array:
    """`cotangent @ w`: float32 `[..., K]` of `[..., N]` and blocks `[N, row_bytes]`."""
    cotangent = cotangent.astype(mx.float32)
    total = mx.zeros((*cotangent.shape[:-1], K))
    step = max(_DECODED // max(K, 1), 1)
    for start in range(0, blocks.shape[0] if total.size else 0, step):
        total = total + cotangent[..., start : start + step] @ decode(blocks[start : start + step])
    return total


def _through_experts(
    cotangent: mx.array,
    blocks: mx.array,
    rhs_indices: mx.array,
    decode: Callable[[mx.array], mx.array],
    K: int,
    sorted_indices: bool,
) -> mx.array:
    """The same for `[*batch, M, N]` and experts' blocks `[experts, N, row_bytes]`: float32 `[*batch, M, K]`.

    All products are computed for each part of the experts, and those kept that it has.
    """
    cotangent = cotangent.astype(mx.float32)
    total = mx.zeros((*cotangent.shape[:-1], K))
    experts, N = blocks.shape[:2]
    step = max(_DECODED // max(N * K, 1), 1)
    rhs_indices = rhs_indices.astype(mx.int32)
    for start in range(0, experts if total.size and N else 0, step):
        some = blocks[start : start + step]
        index = rhs_indices - start
        inside = (index >= 0) & (index < len(some))
        index = mx.clip(index, 0, len(some) - 1).astype(mx.uint32)
        part = mx.gather_mm(cotangent, decode(some), rhs_indices=index, sorted_indices=sorted_indices)
        total = total + mx.where(inside[..., None, None], part, 0)
    return total


def _summed_to(a: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The sum over the axes along which an array of `shape` was broadcast to a's."""
    extra = a.ndim - len(shape)
    if extra:
        a = a.sum(axis=tuple(range(extra)))
    spread = tuple(i for i, (have, want) in enumerate(zip(a.shape, shape, strict=True)) if have != want)
    return a.sum(axis=spread, keepdims=True) if spread else a
