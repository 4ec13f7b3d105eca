"""Traffic and instructions that the checker counts, on kernels whose counts can be told from their text."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_on_cpu import Report, metal_kernel

pytestmark = pytest.mark.usefixtures("checker")

_I = "uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"
_N = 256


def _report(source: str, dtype: mx.Dtype = mx.float32, size: int = 8 * _N, header: str = "") -> Report:
    kernel = metal_kernel("counted", ["x"], ["y"], _I + source + "\n", header, mode="count")
    kernel(
        inputs=[mx.ones(size).astype(dtype)],
        grid=(_N, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(_N,)],
        output_dtypes=[mx.float32],
    )
    return kernel.report


@pytest.mark.parametrize(("width", "loaded"), [(1, 4), (2, 8), (4, 16)])
def test_vector_load_is_one_load(width: int, loaded: int) -> None:
    vector = f"uint{width}" if width > 1 else "uint"
    used = " ^ ".join(f"v.{c}" for c in "xyzw"[:width]) if width > 1 else "v"
    r = _report(f"{vector} v = ((const device {vector}*)x)[i]; y[i] = float({used});", mx.uint32)
    x = r.buffers["x"]
    assert (x.loads, x.load_bytes, x.unique_read) == (_N, loaded * _N, loaded * _N)
    assert r.line_use("x") == 1.0
    (site,) = [s for s in r.sites if s.buffer == "x"]
    assert (site.size, site.execs, site.lanes, site.lines128) == (loaded, 8, _N, 8 * loaded * 32 // 128)


def test_separate_loads_stay_separate() -> None:
    r = _report("y[i] = x[4 * i] + x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3];")
    assert r.buffers["x"].loads == 4 * _N
    # 32 lanes, 16 bytes apart: 4 of the 16 bytes are used by each of the loads.
    assert r.line_use("x") == 0.25


def test_one_byte_of_each_line() -> None:
    r = _report("y[i] = float(x[i * 32]);", mx.float32, 32 * _N)
    assert r.line_use("x") == pytest.approx(4 / 128)
    assert r.buffers["x"].threadgroup_lines == r.buffers["x"].simdgroup_lines == _N


def test_lines_of_a_simdgroup_count_once_for_all_of_its_loads() -> None:
    r = _report("y[i] = x[i % 16] + x[16 + i % 16];")
    x = r.buffers["x"]
    assert (x.threadgroup_lines, x.simdgroup_lines) == (r.threadgroups, _N // 32)
    assert r.line_use("x") == 0.5


def test_loads_from_a_table_of_the_program_are_counted() -> None:
    table = "constant float table[4] = {1.0f, 2.0f, 4.0f, 7.0f};\n"
    r = _report("y[i] = table[uint(x[i]) & 3u];", header=table)
    assert (r.instructions["lookup"], r.loads) == (_N, 2 * _N)
    assert _report("y[i] = x[i];").instructions["lookup"] == 0


def test_arithmetic_by_class() -> None:
    r = _report("y[i] = x[i] * 3.0f;")
    assert r.instructions["float"] == _N
    assert (r.instructions["convert"], r.instructions["simd"], r.loads) == (0, 0, _N)
    r = _report("uint v = as_type<uint>(x[i]); y[i] = float((v >> 3) & 15u);")
    assert (r.instructions["int"], r.instructions["convert"]) == (2 * _N, _N)


def test_product_and_sum_count_as_one() -> None:
    fused = _report("y[i] = fma(x[i], 3.0f, x[i + 1]);").instructions["float"]
    assert _report("y[i] = x[i] * 3.0f + x[i + 1];").instructions["float"] == fused == _N
    # A product that something else uses too is one of its own.
    assert _report("float p = x[i] * 3.0f; y[i] = (p + x[i + 1]) * p;").instructions["float"] == 3 * _N


def test_loops_count_each_time_round() -> None:
    loop = "float s = 0; for (uint k = 0; k < {n}; k++) s = fma(x[i + k], x[i + k], s); y[i] = s;"
    assert _report(loop.format(n="8u")).instructions["float"] == 8 * _N
    # `lane` is not known when compiling: 0 + 1 + ... + 31 times round in each of 8 SIMD-groups.
    assert _report(loop.format(n="lane")).instructions["float"] == 8 * 31 * 16


def test_simd_functions_count_once_and_not_for_their_insides() -> None:
    r = _report("y[i] = simd_sum(x[i]) + simd_shuffle_xor(x[i], 1);")
    assert (r.instructions["simd"], r.instructions["float"]) == (2 * _N, _N)
    r = _report(
        "threadgroup float t[64]; t[i & 63] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i & 31];"
    )
    assert r.instructions["barrier"] == _N
    assert (r.buffers["threadgroup"].loads, r.buffers["threadgroup"].stores) == (_N, _N)


def test_math_functions_are_counted() -> None:
    assert _report("y[i] = exp(x[i]);").instructions["math"] == _N
