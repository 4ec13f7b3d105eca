"""What the kernels on ggml blocks may cost, counted by the checker: bytes and lines of weights, instructions."""

from __future__ import annotations

from functools import cache

import metal_on_cpu
import mlx.core as mx
import mlx_kernels
import pytest
from random_blocks import random_blocks

from mlxq.ops import metal_blocks
from mlxq.ops.metal_blocks import METAL_TYPES

K = 4096
#: Types, and the bits of the affine format whose kernels of mlx ours are measured by: mlx has none for blocks. Q4_1 and
#: Q5_1 are that format; the scales of super-blocks are themselves unpacked, which must cost no more than mlx's reading.
_PEERS = {
    **{"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8},
    **{"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6},
    **{"IQ4_NL": 4, "IQ4_XS": 4},
}


@pytest.fixture
def counted(metal):
    """The report of one product with random blocks of N rows."""
    if metal.real:
        pytest.skip("the real Metal counts nothing")

    def count(name: str, M: int, N: int) -> metal_on_cpu.Report:
        blocks = mx.array(random_blocks(name, (N, K)))
        with metal.options(mode="count"):
            metal_blocks.block_matmul(mx.ones((M, K), mx.float16), blocks, name)
        return metal.report

    return count


def _check_reads(report: metal_on_cpu.Report) -> None:
    w = report.buffers["w"]
    assert w.load_bytes == w.unique_read == w.size
    assert report.line_use("w") >= 0.9


@pytest.mark.parametrize("name", METAL_TYPES)
def test_one_row_reads_each_byte_once_in_full_lines(counted, name) -> None:
    N = 16
    report = counted(name, 1, N)
    _check_reads(report)
    theirs = _affine(_PEERS[name], 1, N)
    lookups = report.instructions["lookup"]
    # The codes of IQ4 mean what a table says: a load for each, of no buffer. mlx's formats of 4 bits have none.
    assert lookups == (N * K if name.startswith("IQ4") else 0)
    assert report.loads - lookups <= theirs.loads
    assert report.arithmetic <= theirs.arithmetic


@pytest.mark.parametrize(("name", "M"), [("Q4_K", 2), ("Q6_K", 8), ("Q4_0", 16)])
def test_few_rows_read_each_byte_once_in_full_lines_and_cost_less_than_affine_weights(counted, name, M) -> None:
    report = counted(name, M, 16)
    _check_reads(report)
    theirs = _affine(_PEERS[name], M, 16)
    assert report.loads <= theirs.loads
    assert report.arithmetic <= theirs.arithmetic


@pytest.mark.parametrize(
    "name", [n if n in ("Q4_K", "Q6_K") else pytest.param(n, marks=pytest.mark.slow) for n in METAL_TYPES]
)
def test_each_pass_of_tiles_reads_each_byte_once_and_costs_no_more_than_affine_weights(counted, name) -> None:
    report = counted(name, 33, 64)
    w = report.buffers["w"]
    theirs = _affine(_PEERS[name], 33, 64)
    assert report.loads <= theirs.loads
    assert report.arithmetic <= theirs.arithmetic
    assert w.unique_read == w.size
    assert w.load_bytes <= 1.05 * 2 * w.size  # 32 rows of x, and one
    # A pass takes 256 weights of a row at a time: every line is read by the same SIMD-group, in one or two goes.
    assert w.threadgroup_lines * 128 == w.simdgroup_lines * 128 == 2 * w.size


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 4, 8])
@pytest.mark.parametrize("name", METAL_TYPES)
def test_reads_of_4096_rows(counted, name, M) -> None:
    _check_reads(counted(name, M, 4096))


@cache
def _affine(bits: int, M: int, N: int) -> metal_on_cpu.Report:
    """mlx's own kernel and weights in groups of 32."""
    function = "affine_qmv_fast" if M == 1 else "affine_qmv_wide" if M <= 16 else "affine_qmm_t"
    packed = mx.quantize(mx.random.normal((N, K)).astype(mx.float16), group_size=32, bits=bits)
    return mlx_kernels.product(function, mx.ones((M, K), mx.float16), packed, bits, 32)
