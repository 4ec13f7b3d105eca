"""Several products with the same rows of x in one launch (`metal/affine_fused.h`, `metal/ggml_fused.h`).

For 1 to 16 rows of x, which is where reading weights is all the work; arguments are those that
`mlxq.ops.fused` checked. A permutation of x's columns is applied as x is loaded, with no copy of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxq.ops.metal_affine import SIMD, blocks_of
from mlxq.ops.metal_blocks import piece, qmv_rows, steps_of
from mlxq.ops.metal_source import at_device, check_sizes, kernel, kernel_name

#: mlx.nn's name of an activation -> its struct in `metal/activations.h`.
ACTIVATIONS = {"silu": "Silu", "gelu_approx": "GeluApprox", "gelu": "Gelu"}

_SIMD_GROUPS = 2
_THREADS = _SIMD_GROUPS * SIMD
_AT = "threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"

Packed = tuple[mx.array, mx.array, mx.array]


def affine_each(
    x: mx.array, packed: Sequence[Packed], grids: Sequence[tuple[int, int]], g_idx: mx.array | None
) -> list[mx.array]:
    """`x @ w_hat.T` for each of some affine matrices.

    Args:
        x: `[M, K]`.
        packed: `(w_q, scales, biases)` of matrices `[N, K]`.
        grids: `(bits, group_size)` of each.
        g_idx: int32 `[K]`: column k of a matrix multiplies column `g_idx[k]` of x; None for k itself.

    Returns:
        `[M, N]` of each, in the dtype of x and its scales when they are the same, else float32.
    """
    M, K = x.shape
    sizes = [w_q.shape[0] for w_q, _, _ in packed]
    dtypes = [_promoted(x, scales) for _, scales, _ in packed]
    template: dict[str, Any] = {"X": x.dtype, "K": K, "M": M}
    inputs: dict[str, mx.array] = {}
    products = []
    for i, (arrays, (bits, group_size)) in enumerate(zip(packed, grids, strict=True)):
        template |= {
            f"S{i}": arrays[1].dtype,
            f"Y{i}": dtypes[i],
            f"GS{i}": group_size,
            f"B{i}": bits,
            f"N{i}": sizes[i],
        }
        names = [f"w_q{i}", f"scales{i}", f"biases{i}"]
        inputs |= dict(zip(names, map(at_device, arrays), strict=True))
        products.append(f"AffineProduct<S{i}, Y{i}, GS{i}, B{i}, N{i}>{{{', '.join(names)}, y{i}}}")
    outputs = _rows(M) * _SIMD_GROUPS
    return _launch(
        _named("affine_qmv_each", [f"gs_{gs}_b_{bits}" for bits, gs in grids]),
        f"affine_qmv_each<X, K, M>({_x('X', 'K', g_idx)}, {_AT}, {', '.join(products)});",
        "affine_fused",
        x,
        inputs,
        g_idx,
        template,
        sum(blocks_of(N, outputs) for N in sizes),
        [((M, N), dtype) for N, dtype in zip(sizes, dtypes, strict=True)],
    )


def affine_gated(
    x: mx.array, gate: Packed, up: Packed, grid: tuple[int, int], activation: str, g_idx: mx.array | None
) -> mx.array:
    """`activation(x @ gate.T) * (x @ up.T)` for two affine matrices `[N, K]` of one grid; as `affine_each`."""
    (M, K), N, (bits, group_size) = x.shape, gate[0].shape[0], grid
    dtype = _promoted(x, gate[1])
    template = {"X": x.dtype, "S": gate[1].dtype, "Y": dtype, "GROUP_SIZE": group_size, "BITS": bits, "N": N}
    template |= {"K": K, "M": M}
    names = [f"{m}_{part}" for m in ("gate", "up") for part in ("w_q", "scales", "biases")]
    inputs = dict(zip(names, map(at_device, (*gate, *up)), strict=True))
    arguments = f"{', '.join(names)}, {_x('X', 'K', g_idx)}, y0, {_AT}"
    (y,) = _launch(
        kernel_name(f"affine_qmv_gated_{activation}", gs=group_size, b=bits),
        f"affine_qmv_gated<{', '.join(template)}, {ACTIVATIONS[activation]}>({arguments});",
        "affine_fused",
        x,
        inputs,
        g_idx,
        template,
        blocks_of(N, affine_gated_rows(M) * _SIMD_GROUPS),
        [((M, N), dtype)],
    )
    return y


def block_each(
    x: mx.array, blocks: Sequence[mx.array], type_names: Sequence[str], g_idx: mx.array | None
) -> list[mx.array]:
    """`x @ w.T` for each of some matrices of ggml blocks `[N, row_bytes]`; results `[M, N]` in the dtype of x."""
    M, rows = x.shape[0], qmv_rows(x.shape[0])
    widths = [piece(b.shape[-1]) for b in blocks]
    types = [f"ggml_product<T, {t}, {steps_of(t)}, {w}>" for t, w in zip(type_names, widths, strict=True)]
    products = [f"{t}{{w{i}, y{i}, w{i}_shape[0]}}" for i, t in enumerate(types)]
    room = f"threadgroup uint4 room[ggml_each_room<ROWS, {', '.join(types)}>()];"
    arguments = f"{_x('T', 'x_shape[1]', g_idx)}, x_shape[1], room, {_AT}, {', '.join(products)}"
    return _launch(
        _named("ggml_qmv_each", [f"{t.lower()}_w_{w}" for t, w in zip(type_names, widths, strict=True)]),
        f"{room}\nggml_qmv_each<M, ROWS>({arguments});",
        "ggml_fused",
        x,
        {f"w{i}": b for i, b in enumerate(blocks)},
        g_idx,
        {"T": x.dtype, "M": M, "ROWS": rows},
        sum(blocks_of(b.shape[0], rows * _SIMD_GROUPS) for b in blocks),
        [((M, b.shape[0]), x.dtype) for b in blocks],
    )


def block_gated(
    x: mx.array, gate: mx.array, up: mx.array, type_name: str, activation: str, g_idx: mx.array | None
) -> mx.array:
    """`activation(x @ gate.T) * (x @ up.T)` for two matrices of blocks of one type and shape, in the dtype of x."""
    M, N = x.shape[0], gate.shape[0]
    rows = block_gated_rows(M, type_name)
    template = {"T": x.dtype, "M": M, "ROWS": rows, "STEPS": steps_of(type_name), "WIDTH": piece(gate.shape[-1])}
    room = f"threadgroup uint4 room[ggml_gated_room<{type_name}, M, ROWS, STEPS>()];"
    arguments = f"{_x('T', 'x_shape[1]', g_idx)}, gate, up, y0, x_shape[1], gate_shape[0], room, {_AT}"
    (y,) = _launch(
        kernel_name(f"ggml_qmv_gated_{activation}_{type_name.lower()}", w=template["WIDTH"]),
        f"{room}\nggml_qmv_gated<T, {type_name}, {ACTIVATIONS[activation]}, M, ROWS, STEPS, WIDTH>({arguments});",
        "ggml_fused",
        x,
        {"gate": gate, "up": up},
        g_idx,
        template,
        blocks_of(N, rows * _SIMD_GROUPS),
        [((M, N), x.dtype)],
    )
    return y


def affine_gated_rows(M: int) -> int:
    """Outputs of a SIMD-group, as `affine_gated_rows` in `metal/affine_fused.h`."""
    return 4 if M == 1 else 2 if M <= 8 else 1


def block_gated_rows(M: int, type_name: str) -> int:
    """Outputs of a SIMD-group, each of two weight rows: four where a lane can keep its part of x, see
    `ggml_gated_passes` in `metal/ggml_fused.h`; else as many weight rows as `ggml_qmv` has."""
    return 4 if M == 1 and steps_of(type_name) <= 2 else qmv_rows(M) // 2


def _launch(
    name: str,
    source: str,
    header: str,
    x: mx.array,
    weights: dict[str, mx.array],
    g_idx: mx.array | None,
    template: dict[str, Any],
    threadgroups: int,
    results: list[tuple[tuple[int, int], mx.Dtype]],
) -> list[mx.array]:
    # Every output is counted as if all were of one matrix.
    check_sizes(name, sum(shape[1] for shape, _ in results), K=x.shape[1])
    inputs = {"x": x, **weights}
    if g_idx is not None:
        inputs["g_idx"] = g_idx
        name += "_permuted"
    outputs = [f"y{i}" for i in range(len(results))]
    dtypes = [dtype for _, dtype in results]
    launch = kernel(kernel_name(name, x.dtype, *dtypes, m=x.shape[0]), list(inputs), outputs, source, header)
    return launch(
        inputs=list(inputs.values()),
        template=list(template.items()),
        grid=(threadgroups * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[shape for shape, _ in results],
        output_dtypes=dtypes,
    )


def _x(dtype: str, columns: str, g_idx: mx.array | None) -> str:
    """How a kernel's function is given x."""
    return "x" if g_idx is None else f"Permuted<{dtype}>{{x, g_idx, uint({columns} - 1)}}"


def _named(function: str, parts: list[str]) -> str:
    """A name that says what each product is, equal ones once."""
    return "_".join([function, str(len(parts)), *(parts if len(set(parts)) > 1 else parts[:1])])


def _rows(M: int) -> int:
    return 4 if M <= 8 else 2


def _promoted(a: mx.array, b: mx.array) -> mx.Dtype:
    return a.dtype if a.dtype == b.dtype else mx.float32
