"""Encoders of K types by the project's own Metal kernels (`metal/ggml_quantize_*.h`), on mlx's default device.

How far they look is the caller's to say (`quantizers.ggml`): these are the searches of `line_search` and `scale_search`
there, with sums in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxq.errors import BackendError, FormatError
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES, SUPER_BLOCK
from mlxq.ops.metal_source import kernel, kernel_name

_THREADS = 64


def quantize_lines(
    w: mx.array,
    type_name: str,
    importance: mx.array | None = None,
    *,
    levels: Sequence[float],
    shifts: Sequence[float],
    factors: Sequence[float],
) -> mx.array:
    """Blocks with scales and mins, by the search of `LineSearch` with one refinement and one round.

    Args:
        w: float32 `[N, K]`, finite, `K` a multiple of 256. Weights whose steps are beyond float16 give infinite ones.
        type_name: `Q2_K`, `Q4_K` or `Q5_K`.
        importance: float32 `[K]`, positive, or None.
        levels, shifts, factors: those of `LineSearch`.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        BackendError: a type without such an encoder.
        FormatError: another dtype or shape, or rows that are not whole blocks.
    """
    _check("quantize_lines", w, type_name, importance, mins=True)
    sizes = {"levels": len(levels), "shifts": len(shifts), "factors": len(factors)}
    return _launch("ggml_quantize_lines", w, type_name, importance, sizes, [*levels, *shifts, *factors])


def quantize_scales(
    w: mx.array,
    type_name: str,
    importance: mx.array | None = None,
    *,
    room: float,
    steps: Sequence[int],
    opposite: Sequence[float] = (),
    rounds: int = 0,
) -> mx.array:
    """Blocks with scales alone, by the search of `BlockSearch`; what lies on a grid already is not looked for.

    Args:
        w: float32 `[N, K]`, `K` a multiple of 256, no weight beyond what `scale_search.check_range` allows.
        type_name: `Q3_K` or `Q6_K`.
        importance: float32 `[K]`, positive, its mean about 1; or None.
        room, steps, opposite, rounds: those of `BlockSearch`.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        BackendError: a type without such an encoder.
        FormatError: another dtype or shape, or rows that are not whole blocks.
    """
    _check("quantize_scales", w, type_name, importance, mins=False)
    sizes = {"steps": len(steps), "opposite": len(opposite), "rounds": rounds}
    top = 2 ** (K_TYPES[type_name].scale_bits - 1) - 1
    return _launch("ggml_quantize_scales", w, type_name, importance, sizes, [room / top, *steps, *opposite])


def _launch(
    function: str, w: mx.array, type_name: str, importance: mx.array | None, sizes: dict[str, int], search: list[float]
) -> mx.array:
    f = block_format(type_name)
    n_blocks = w.size // f.block_size
    shape = (w.shape[0], w.shape[1] // f.block_size * f.type_size)
    if not n_blocks:
        return mx.zeros(shape, mx.uint8)
    sizes = {**sizes, "weighted": importance is not None}
    launch = kernel(
        kernel_name(f"ggml_quantize_{type_name.lower()}", w.dtype, **sizes),
        ["w", "importance", "search"],
        ["blocks"],
        f"{function}<{K_TYPES[type_name].bits}, {', '.join(sizes).upper()}>(w, importance, search, blocks, w_shape[1], "
        "thread_position_in_grid.y, thread_index_in_simdgroup);",
        function,
    )
    (blocks,) = launch(
        inputs=[w, mx.ones((1,)) if importance is None else importance, mx.array(search, mx.float32)],
        template=[(key.upper(), value) for key, value in sizes.items()],
        grid=(32, n_blocks, 1),
        threadgroup=(32, _THREADS // 32, 1),
        output_shapes=[shape],
        output_dtypes=[mx.uint8],
    )
    return blocks


def _check(op: str, w: mx.array, type_name: str, importance: mx.array | None, *, mins: bool) -> None:
    types = [name for name, geometry in K_TYPES.items() if geometry.has_mins == mins]
    if type_name not in types:
        raise BackendError(
            f"{op}: the metal back end has no such encoder for {type_name!r}; it has for {', '.join(types)}"
        )
    if w.dtype != mx.float32 or w.ndim != 2 or w.shape[1] % SUPER_BLOCK:
        got = f"{w.dtype} {list(w.shape)}"
        raise FormatError(f"{op}: w must be float32 [N, K], K a multiple of {SUPER_BLOCK}; got {got}")
    if importance is not None and (importance.dtype != mx.float32 or importance.shape != w.shape[1:]):
        got = f"{importance.dtype} {list(importance.shape)}"
        raise FormatError(f"{op}: importance must be float32 [{w.shape[1]}], got {got}")
