"""What the fused kernels may cost, counted by the checker: bytes and lines of weights, bytes of x, instructions."""

from __future__ import annotations

import affine_cases
import covering
import mlx.core as mx
import pytest
from random_blocks import random_blocks

from mlxq import ops
from mlxq.ops import metal_fused
from mlxq.ops.metal_blocks import METAL_TYPES

pytestmark = pytest.mark.usefixtures("checker")

K = 4096
QUICK_TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q3_K")


@pytest.fixture
def counted(metal):
    """The reports of what a function launches, in mode `count`."""
    if metal.real:
        pytest.skip("the real Metal counts nothing")

    def run(function, *args, **options):
        before = len(metal.launches)
        with metal.options(mode="count"):
            function(*args, backend="metal", **options)
        return [report for _, report in metal.launches[before:]]

    return run


def blocks(name: str, N: int, seed: int) -> ops.BlockWeights:
    return ops.BlockWeights(mx.array(random_blocks(name, (N, K), seed)), name)


def packed(bits: int, N: int, seed: int) -> ops.PackedWeights:
    return ops.PackedWeights(*affine_cases.packed((N, K), bits, 64, mx.float16, seed), bits, 64)


def check(counted, gate, up, M: int, rows: int, names: tuple[str, str]) -> None:
    """Weights once, in full lines; x once by each SIMD-group, of `rows` outputs; no more than two products take."""
    x = affine_cases.normal((M, K), mx.float16)
    (own,) = counted(ops.gated_projection, x, gate, up, activation="silu")
    for name in names:
        w = own.buffers[name]
        assert w.load_bytes == w.unique_read == w.size
        # The checker counts loads of 3, 5 and 6-bit runs by words: they are contiguous, but not one access.
        assert own.line_use(name) >= 0.9 or getattr(gate, "bits", 0) in (3, 5, 6)
    assert own.buffers["x"].load_bytes == len(gate[0]) // rows * x.nbytes
    apart = [r for w in (gate, up) for r in counted(ops.projections, x, [w])]
    # As many weight rows a SIMD-group as a single product has: as often as the two together. Twice as many: half.
    assert own.buffers["x"].load_bytes * (2 if rows == 4 else 1) == sum(r.buffers["x"].load_bytes for r in apart)
    assert own.loads <= sum(r.loads for r in apart)
    # The activation: an exponential and a division an output.
    assert own.arithmetic <= sum(r.arithmetic for r in apart) + 64 * M * len(gate[0])


def rows_of_types() -> list:
    """One row of each type; of half of them two, of the others eight."""
    more = [(t, M) for i, t in enumerate(METAL_TYPES) for j, M in enumerate((2, 8)) if covering.EVERY or (i + j) % 2]
    one = [pytest.param(t, 1, marks=() if t in QUICK_TYPES else pytest.mark.slow) for t in METAL_TYPES]
    return one + [pytest.param(*case, marks=pytest.mark.slow) for case in more]


@pytest.mark.parametrize(("name", "M"), rows_of_types())
def test_gate_and_up_in_blocks_are_read_once_and_x_once_by_each_simd_group(counted, name, M):
    N = 16
    rows = metal_fused.block_gated_rows(M, name)
    check(counted, blocks(name, N, 1), blocks(name, N, 2), M, rows, ("gate", "up"))


@pytest.mark.parametrize(
    ("bits", "M"),
    [(4, 1), (4, 8), *(pytest.param(b, M, marks=pytest.mark.slow) for b in (2, 3, 5, 6, 8) for M in (1, 2))],
)
def test_affine_gate_and_up_are_read_once_and_x_once_by_each_simd_group(counted, bits, M):
    N = 16
    rows = metal_fused.affine_gated_rows(M)
    check(counted, packed(bits, N, 1), packed(bits, N, 2), M, rows, ("gate_w_q", "up_w_q"))


@pytest.mark.parametrize("M", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_several_products_in_one_launch_cost_what_they_cost_alone(counted, M):
    x = affine_cases.normal((M, K), mx.float16)
    mixed = [blocks("Q4_K", 16, 1), blocks("Q4_K", 8, 2), blocks("Q6_K", 8, 3)]
    affine = [packed(4, 16, 1), packed(4, 8, 2), packed(8, 8, 3)]
    for weights, prefix in ((mixed, "w"), (affine, "w_q")):
        (own,) = counted(ops.projections, x, weights)
        for i in range(3):
            w = own.buffers[f"{prefix}{i}"]
            assert w.load_bytes == w.unique_read == w.size
            assert own.line_use(f"{prefix}{i}") >= 0.9
        apart = [r for w in weights for r in counted(ops.projections, x, [w])]
        # The choice of a product, by each thread: N of two, and some comparisons.
        threads = 64 * sum(len(w[0]) // 8 for w in weights)
        assert own.loads <= sum(r.loads for r in apart) + 2 * threads
        assert own.arithmetic <= sum(r.arithmetic for r in apart) + 8 * threads


def test_a_permutation_costs_its_indices_and_a_load_for_each_value_of_x(counted):
    order = mx.arange(K - 1, -1, -1)
    x = affine_cases.normal((1, K), mx.float16)
    w = blocks("Q4_K", 8, 1)
    (plain,) = counted(ops.projections, x, [w])
    (own,) = counted(ops.projections, x, [w], g_idx=order)
    assert own.buffers["w0"].load_bytes == own.buffers["w0"].size
    assert own.buffers["x"].load_bytes == plain.buffers["x"].load_bytes
    assert own.buffers["g_idx"].load_bytes == 2 * plain.buffers["x"].load_bytes


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 8])
def test_reads_of_4096_rows(counted, M):
    x = affine_cases.normal((M, K), mx.float16)
    for gate, up, names in (
        (blocks("Q4_K", K, 1), blocks("Q4_K", K, 2), ("gate", "up")),
        (packed(4, K, 1), packed(4, K, 2), ("gate_w_q", "up_w_q")),
    ):
        (own,) = counted(ops.gated_projection, x, gate, up, activation="silu")
        for name in names:
            assert own.buffers[name].load_bytes == own.buffers[name].size
            assert own.line_use(name) >= 0.9
