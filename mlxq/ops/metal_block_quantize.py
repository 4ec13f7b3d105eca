"""Encoders of K types by the project's own Metal kernel (`metal/ggml_quantize.h`), on mlx's default device."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxq.errors import BackendError, FormatError
from mlxq.formats.geometry import block_format
from mlxq.ops.metal_source import kernel, kernel_name

#: ggml types that have an encoder, and the bits of their codes.
ENCODED_BITS = {"Q2_K": 2, "Q4_K": 4, "Q5_K": 5}

_THREADS = 64


def block_quantize(
    w: mx.array,
    type_name: str,
    importance: mx.array | None = None,
    *,
    levels: Sequence[float],
    shifts: Sequence[float],
    factors: Sequence[float],
) -> mx.array:
    """Blocks of rows of weights, by the search of `quantizers.ggml.line_search` with one refinement and one round.

    Args:
        w: float32 `[N, K]`, finite, `K` a multiple of 256. Weights whose steps are beyond float16 give infinite ones.
        type_name: `Q2_K`, `Q4_K` or `Q5_K`.
        importance: float32 `[K]`, positive, or None.
        levels, shifts, factors: those of `LineSearch`.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        BackendError: a type without an encoder.
        FormatError: another dtype or shape, or rows that are not whole blocks.
    """
    op = "block_quantize"
    if type_name not in ENCODED_BITS:
        raise BackendError(
            f"{op}: the metal back end has no encoder for {type_name!r}; it has for {', '.join(ENCODED_BITS)}"
        )
    _check(op, w, importance)
    f = block_format(type_name)
    N, K = w.shape
    n_blocks = N * K // f.block_size
    shape = (N, K // f.block_size * f.type_size)
    if not n_blocks:
        return mx.zeros(shape, mx.uint8)
    weighted = importance is not None
    sizes = {"levels": len(levels), "shifts": len(shifts), "factors": len(factors), "weighted": weighted}
    launch = kernel(
        kernel_name(f"ggml_quantize_{type_name.lower()}", w.dtype, **sizes),
        ["w", "importance", "search"],
        ["blocks"],
        f"ggml_quantize<{ENCODED_BITS[type_name]}, LEVELS, SHIFTS, FACTORS, WEIGHTED>(w, importance, search, blocks, "
        "w_shape[1], thread_position_in_grid.y, thread_index_in_simdgroup);",
        "ggml_quantize",
    )
    (blocks,) = launch(
        inputs=[w, importance if weighted else mx.ones((1,)), mx.array([*levels, *shifts, *factors], mx.float32)],
        template=[(key.upper(), value) for key, value in sizes.items()],
        grid=(32, n_blocks, 1),
        threadgroup=(32, _THREADS // 32, 1),
        output_shapes=[shape],
        output_dtypes=[mx.uint8],
    )
    return blocks


def _check(op: str, w: mx.array, importance: mx.array | None) -> None:
    if w.dtype != mx.float32 or w.ndim != 2 or w.shape[1] % 256:
        raise FormatError(f"{op}: w must be float32 [N, K], K a multiple of 256; got {w.dtype} {list(w.shape)}")
    if importance is not None and (importance.dtype != mx.float32 or importance.shape != w.shape[1:]):
        got = f"{importance.dtype} {list(importance.shape)}"
        raise FormatError(f"{op}: importance must be float32 [{w.shape[1]}], got {got}")
