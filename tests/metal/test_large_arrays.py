"""Arrays of more than 2^31 elements and 2^32 bytes: what a kernel reads and writes lies where 64 bits say.

The arrays are holes but for their ends, and of a grid only the last threadgroup runs, which works there. An offset that
wrapped around would find zeros, or leave the array.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import affine_cases
import metal_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import Sparse, options
from random_blocks import random_blocks

from mlxq import ops
from mlxq.formats import ggml
from mlxq.formats.geometry import block_format
from mlxq.ops import metal_affine, metal_backend, metal_blocks

BITS, GROUP, T = 8, 64, mx.float16
#: Rows of weights that are not 0: no threadgroup has more of them.
END = 256
#: Outputs that are compared: no threadgroup has fewer.
SEEN = 4


class _Ran(Exception):
    def __init__(self, outputs: list[mx.array]):
        super().__init__()
        self.outputs = outputs


class _LastThreadgroup(metal_on_cpu.metal_kernel):
    """Runs the last threadgroup of a grid and leaves the launcher, whose outputs have not the shape it expects."""

    def __call__(self, **call) -> list[mx.array]:
        count = prod(-(-n // t) for n, t in zip(call["grid"], call["threadgroup"], strict=True))
        raise _Ran(super().__call__(**call, threadgroups=(count - 1, 1)))


@pytest.fixture(autouse=True)
def _far_end(metal, monkeypatch):
    if metal.real:
        pytest.skip("arrays with holes are the checker's")
    monkeypatch.setattr(mx.fast, "metal_kernel", _LastThreadgroup)


def run(launch: Callable[[], object], part: tuple[int, int]) -> list[mx.array]:
    """The `part` of each output (first element, how many) after the last threadgroup of a launch."""
    with options(mode="fast", part=part), pytest.raises(_Ran) as ran:
        launch()
    return ran.value.outputs


def check(launch: Callable[[], object], size: int, expected: np.ndarray) -> None:
    """The elements up to `size` of the output are the last of `expected`."""
    (y,) = run(launch, (size - SEEN, SEEN))
    assert affine_cases.error(y, expected[-SEEN:]) <= affine_cases.TOLERANCES[T]


def at_the_end(shape: tuple[int, ...], last: mx.array) -> Sparse:
    return Sparse(shape, last.dtype, {prod(shape) - last.size: last})


def packed(shape: tuple[int, ...]) -> tuple[list[Sparse], np.ndarray]:
    """A packed matrix or stack whose last rows are not 0, and they decoded."""
    assert prod(shape) * BITS // 8 > 1 << 32
    K = shape[-1]
    last = affine_cases.packed((END, K), BITS, GROUP, T)
    held = [at_the_end((*shape[:-1], a.shape[-1]), a) for a in last]
    return held, last.decoded(BITS, GROUP)


def far_blocks(name: str, shape: tuple[int, ...]) -> tuple[Sparse, np.ndarray]:
    """The same of ggml blocks."""
    f = block_format(name)
    last = random_blocks(name, (END, shape[-1]))
    held = at_the_end((*shape[:-1], last.shape[-1]), mx.array(last))
    assert held.size > 1 << 32
    assert last.shape[-1] == shape[-1] // f.block_size * f.type_size
    return held, ggml.dequantize(last, name).astype(np.float64)


def slow(*values: object) -> list:
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


@pytest.mark.parametrize("M", [1, *slow(3, 12, 32)])
def test_last_rows_of_a_matrix(M):
    N, K = 1 << 18, (1 << 14) + 64
    held, w = packed((N, K))
    x = affine_cases.normal((M, K), T)
    weights = metal_affine.Weights(N, K, BITS, GROUP)
    for m in {0, M - 1}:
        y = affine_cases.doubles(x)[m] @ w.T
        check(lambda: metal_affine.launch_product(x, held, weights, True, T), (m + 1) * N, y)


@pytest.mark.slow
def test_last_columns_of_a_matrix():
    N, K = 40, 1 << 27
    last = affine_cases.packed((N, END), BITS, GROUP, T)
    held = []
    for a in last:
        width = K * a.shape[1] // END
        held.append(Sparse((N, width), a.dtype, {(row + 1) * width - a.shape[1]: a[row] for row in range(N)}))
    x = affine_cases.normal((20, N), T)
    weights = metal_affine.Weights(N, K, BITS, GROUP)
    for m in (0, 19):
        y = affine_cases.doubles(x)[m] @ last.decoded(BITS, GROUP)
        check(lambda: metal_affine.launch_product(x, held, weights, False, T), (m + 1) * K, y)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [True, False])
def test_last_rows_of_x(transpose):
    M, inner, outer = (1 << 17) + 32, 1 << 15, 64
    shape = (outer, inner) if transpose else (inner, outer)
    w = affine_cases.packed(shape, BITS, GROUP, T)
    last = affine_cases.normal((32, inner), T)
    x, weights = at_the_end((M, inner), last), metal_affine.Weights(*shape, BITS, GROUP)
    assert x.size > 1 << 32
    decoded = w.decoded(BITS, GROUP)
    y = affine_cases.doubles(last)[-1] @ (decoded.T if transpose else decoded)
    check(lambda: metal_affine.launch_product(x, w, weights, transpose, T), M * outer, y)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [True, False])
def test_last_rows_of_y(transpose):
    M, inner, outer = (1 << 17) + 32, 64, 1 << 15
    assert M * outer > 1 << 32
    shape = (outer, inner) if transpose else (inner, outer)
    w = affine_cases.packed(shape, BITS, GROUP, T)
    x, weights = affine_cases.normal((M, inner), T), metal_affine.Weights(*shape, BITS, GROUP)
    decoded = w.decoded(BITS, GROUP)
    y = affine_cases.doubles(x)[-1] @ (decoded.T if transpose else decoded)
    check(lambda: metal_affine.launch_product(x, w, weights, transpose, T), M * outer, y)


@pytest.mark.parametrize(
    ("M", "transpose", "in_order"), [(1, True, False), *slow((5, True, False), (20, True, False), (1, True, True))]
)
def test_last_expert(M, transpose, in_order):
    E, N, K, B = (1 << 12) + 1, 1 << 10, 1 << 10, 70
    held, w = packed((E, N, K))
    x, experts = affine_cases.normal((B, M, K), T), mx.array([E - 1] * B, mx.uint32)
    weights = metal_affine.Weights(N, K, BITS, GROUP)

    def launch() -> mx.array:
        if in_order:
            return metal_affine.launch_sorted(x.reshape(B, K), held, experts, weights, T)
        return metal_affine.launch_gather(x, held, experts, weights, transpose, (B,), T)

    check(launch, B * M * N, affine_cases.doubles(x)[-1, -1] @ w.T)


@pytest.mark.slow
def test_last_expert_untransposed():
    E, N, K, B, M = (1 << 14) + 1, END, 1 << 10, 3, 20
    held, w = packed((E, N, K))
    x, experts = affine_cases.normal((B, M, N), T), mx.array([E - 1] * B, mx.uint32)
    weights = metal_affine.Weights(N, K, BITS, GROUP)
    y = affine_cases.doubles(x)[-1, -1] @ w
    check(lambda: metal_affine.launch_gather(x, held, experts, weights, False, (B,), T), B * M * K, y)


@pytest.mark.parametrize("which", ["rows of x", "rows of y"])
@pytest.mark.slow
def test_last_matrices_of_a_batch(which):
    """Products one by one, of which so many are asked for that x, or what comes out, is that long."""
    B, E = (1 << 17) + 1, 2
    N, K = (64, 1 << 15) if which == "rows of x" else (1 << 15, 64)
    w = affine_cases.packed((E, N, K), BITS, GROUP, T)
    last = affine_cases.normal((1, K), T)
    x, experts = at_the_end((B, 1, K), last), mx.array([1] * B, mx.uint32)
    weights = metal_affine.Weights(N, K, BITS, GROUP)
    y = affine_cases.doubles(last)[-1] @ w.decoded(BITS, GROUP)[1].T
    check(lambda: metal_affine.launch_gather(x, w, experts, weights, True, (B,), T), B * N, y)


@pytest.mark.slow
def test_weights_decoded_and_quantized():
    shape = ((1 << 18) + 16, 1 << 14)
    held, _ = packed(shape)
    (found,) = run(lambda: metal_backend.dequantize(*held, BITS, GROUP, None), (prod(shape) - 64, 64))
    last = [next(iter(a.pieces.values())) for a in held]
    exact = ops.dequantize(*last, bits=BITS, group_size=GROUP, backend="numpy")
    assert mx.array_equal(found, exact.reshape(-1)[-64:])
    last = affine_cases.normal((END, shape[1]), T)
    halves = at_the_end(shape, last)
    w_hat, total = affine_cases.doubles(last).reshape(-1), prod(shape)
    # A group's scale and bias, and the codes of its last weights.
    _, scales, biases = run(lambda: metal_backend.quantize(halves, BITS, GROUP), (total // GROUP - 1, 1))
    words, _, _ = run(lambda: metal_backend.quantize(halves, BITS, GROUP), (total * BITS // 32 - 1, 1))
    codes = np.array(words).view(np.uint8)
    found = codes * affine_cases.doubles(scales) + affine_cases.doubles(biases)
    assert np.abs(found - w_hat[-4:]).max() <= np.abs(affine_cases.doubles(scales)).max()


@pytest.mark.parametrize(
    ("M", "name"), [(1, "Q8_0"), *slow((1, "Q6_K"), (3, "Q8_0"), (12, "Q6_K"), (20, "Q8_0"), (32, "Q6_K"))]
)
def test_last_rows_of_blocks(M, name):
    N, K = 1 << 19, 1 << 14
    held, w = far_blocks(name, (N, K))
    x = affine_cases.normal((M, K), T)
    for m in {0, M - 1}:
        check(lambda: metal_blocks.block_matmul(x, held, name), (m + 1) * N, affine_cases.doubles(x)[m] @ w.T)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["x", "y"])
def test_last_rows_of_x_and_y_with_blocks(which):
    M, name = (1 << 17) + 32, "Q8_0"
    N, K = (64, 1 << 15) if which == "x" else (1 << 15, 64)
    blocks = random_blocks(name, (N, K))
    last = affine_cases.normal((32, K), T)
    y = affine_cases.doubles(last)[-1] @ ggml.dequantize(blocks, name).astype(np.float64).T
    check(lambda: metal_blocks.block_matmul(at_the_end((M, K), last), mx.array(blocks), name), M * N, y)


@pytest.mark.slow
@pytest.mark.parametrize(("M", "B"), [(1, 3), (3, 3), (20, 3), (1, (1 << 14) + 64)])
def test_last_expert_in_blocks(M, B):
    """One by one, and sorted into tiles."""
    name, E, N, K = "Q8_0", (1 << 12) + 1, 1 << 10, 1 << 10
    held, w = far_blocks(name, (E, N, K))
    x = affine_cases.normal((B, M, K), T)
    experts = mx.array([E - 1] * B, mx.uint32)
    y = affine_cases.doubles(x[-1])[-1] @ w.T
    check(lambda: metal_blocks.gather_block_matmul(x, held, experts, name, True), B * M * N, y)


@pytest.mark.slow
def test_blocks_decoded():
    shape = ((1 << 18) + 16, 1 << 14)
    held, w = far_blocks("Q8_0", shape)
    (y,) = run(lambda: metal_blocks.block_dequantize(held, "Q8_0", "F32"), (prod(shape) - 64, 64))
    assert np.array_equal(np.array(y), w.reshape(-1)[-64:].astype(np.float32))


def test_an_offset_of_32_bits_is_found():
    """What these tests are for: the same place counted by 32 bits."""
    rows = (1 << 26) + 1
    x = at_the_end((rows, 64), mx.arange(64, dtype=mx.uint8))
    call = {"grid": (rows, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [x.shape], "output_dtypes": [x.dtype]}
    found = []
    for offset in ("size_t(row) * 64u", "row * 64u"):
        kernel = mx.fast.metal_kernel(
            name="far",
            input_names=["x"],
            output_names=["y"],
            source="uint row = thread_position_in_grid.x;\n"
            f"for (uint i = 0; i < 64u; i++) y[size_t(row) * 64u + i] = x[{offset} + i];",
        )
        found += run(lambda k=kernel: k(inputs=[x], **call), (x.size - 64, 64))
    assert [y.tolist() for y in found] == [list(range(64)), [0] * 64]
