"""Seeded defects: each is found under its name at its line, and correct kernels stay without a finding."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_on_cpu import MslError, metal_kernel

pytestmark = pytest.mark.usefixtures("checker")

# Line 1 of each source; the case is line 2. 256 threads, 64 a threadgroup; x and y have 256 floats.
_PRELUDE = (
    "const uint lid = thread_index_in_threadgroup; const uint i = thread_position_in_grid.x; "
    "const uint lane = thread_index_in_simdgroup; const uint sg = simdgroup_index_in_threadgroup;\n"
)
_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_STAGED = "threadgroup float t[64]; t[lid] = x[i];"

CORRECT = {
    "reduction with barriers": f"{_STAGED} {_BARRIER} for (uint s = 32; s > 0; s >>= 1) "
    f"{{ if (lid < s) t[lid] += t[lid + s]; {_BARRIER} }} y[i] = t[0];",
    "simd_sum, then partial sums": f"threadgroup float t[2]; float v = simd_sum(x[i]); if (lane == 0) t[sg] = v; "
    f"{_BARRIER} y[i] = t[0] + t[1];",
    "simdgroup_barrier within a SIMD-group": f"{_STAGED} simdgroup_barrier(mem_flags::mem_threadgroup); "
    "y[i] = t[lid ^ 1];",
    "two arrays in one declaration": "threadgroup float a[2][32], b[64]; a[sg][lane] = x[i]; b[lid] = 1.0f; "
    f"{_BARRIER} y[i] = a[1 - sg][lane] + b[63 - lid];",
    "atomic counter": "threadgroup atomic_int n; if (lid == 0) atomic_store_explicit(&n, 0, memory_order_relaxed); "
    f"{_BARRIER} atomic_fetch_add_explicit(&n, 1, memory_order_relaxed); {_BARRIER} "
    "y[i] = float(atomic_load_explicit(&n, memory_order_relaxed)) + x[i] * 0;",
    # Metal's compiler masks the amount, as C++ for OpenCL does.
    "shift by 32": "y[i] = float(1u << (lane + 1)) + x[i];",
}

DEFECTS = {
    "read past the end": ("read out of bounds", "y[i] = x[i + 1];"),
    "read before the start": ("read out of bounds", "y[i] = x[int(i) - 1];"),
    "read far away": ("read out of bounds", "y[i] = x[i * 100000];"),
    "read of a vector past the end": ("read out of bounds", "y[i] = ((const device float4*)x)[i / 4 + 1].w;"),
    "write past the end": ("write out of bounds", "y[i * 2] = x[i];"),
    "threadgroup array too small": (
        "out of bounds",
        f"threadgroup float t[32]; t[lid] = x[i]; {_BARRIER} y[i] = t[lid ^ 1];",
    ),
    "thread array too small": (
        "crash|undefined",
        "float t[4] = {0}; t[lid & 7] = x[i]; float s = 0; for (int k = 0; k < 4; k++) s += t[k]; y[i] = s;",
    ),
    "missing barrier": ("unordered", f"{_STAGED} y[i] = t[63 - lid];"),
    "missing barrier in one SIMD-group": ("unordered", f"{_STAGED} y[i] = t[lid ^ 1];"),
    "write after read": ("unordered", f"{_STAGED} {_BARRIER} float v = t[63 - lid]; t[lid] = v * 2; y[i] = v;"),
    "simdgroup_barrier too weak": (
        "unordered",
        f"{_STAGED} simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[63 - lid];",
    ),
    "barrier with mem_none": ("unordered", f"{_STAGED} threadgroup_barrier(mem_flags::mem_none); y[i] = t[63 - lid];"),
    "barrier with mem_device": (
        "unordered",
        f"{_STAGED} threadgroup_barrier(mem_flags::mem_device); y[i] = t[63 - lid];",
    ),
    "device data through mem_threadgroup": (
        "unordered",
        f"y[i] = x[i]; {_BARRIER} float v = y[i ^ 1]; threadgroup_barrier(mem_flags::mem_device); y[i] = v;",
    ),
    "divergent barriers": (
        "different barriers",
        f"{_STAGED} if (sg == 0) {{ {_BARRIER} y[i] = t[63 - lid]; }} else {{ {_BARRIER} y[i] = t[63 - lid] + 1; }}",
    ),
    "barrier in a divergent branch": (
        "different synchronizing|different barriers|after some",
        f"if (lane < 16) {_BARRIER} y[i] = simd_sum(x[i]);",
    ),
    "return before a barrier": (
        "after some threads returned",
        f"threadgroup float t[64]; y[i] = 0; if (lid >= 60) return; t[lid] = x[i]; {_BARRIER} y[i] = t[59 - lid];",
    ),
    "SIMD functions in a divergent branch": (
        "different synchronizing",
        "float v = x[i]; if (lane & 1) v = simd_sum(v); else v = simd_max(v); y[i] = v;",
    ),
    "shuffle from a lane that returned": (
        "inactive",
        "y[i] = 0; if (lane >= 16) return; y[i] = simd_shuffle(x[i], ushort(lane + 16));",
    ),
    "shuffle from lane 32": ("inactive", "y[i] = simd_shuffle(x[i], ushort(lane + 1));"),
    "uninitialized threadgroup memory": (
        "uninitialized threadgroup",
        f"threadgroup float t[64]; if (lid < 63) t[lid] = x[i]; {_BARRIER} y[i] = t[lid];",
    ),
    "output not covered": ("never written", "if (i != 77) y[i] = x[i];"),
    "two threadgroups write one output": ("two unordered writes", "y[i] = x[i]; if (lid == 0) y[0] = float(i);"),
    "threadgroups talk through device memory": (
        "unordered|uninitialized output",
        "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = y[255 - i];",
    ),
    "reads the output first": ("uninitialized output", "y[i] = y[i] + x[i];"),
    "writes an input": ("read-only", "((device float*)x)[i] = 1.0f; y[i] = x[i];"),
    "misaligned vector load": ("misaligned", "y[i] = ((const device float4*)(x + (i & 63)))->x;"),
    "float to uchar out of range": ("undefined", "y[i] = float(uchar(x[i] * 2.0f));"),
    "too much threadgroup memory": ("over the limit", "threadgroup float t[64 * 129]; t[lid] = x[i]; y[i] = t[lid];"),
    "counter without atomics": (
        "unordered",
        f"y[i] = x[i]; threadgroup int n; if (lid == 0) n = 0; {_BARRIER} n += 1; {_BARRIER} y[i] = float(n);",
    ),
    "stack of a thread full": (
        "crash",
        "float t[40000]; for (int k = 0; k < 40000; k++) t[k] = x[(i + k) & 255]; float s = 0; "
        "for (int k = 0; k < 40000; k += 7) s += t[(k * 31) % 40000]; y[i] = s;",
    ),
    "endless loop": ("time limit", "float v = x[i]; while (v < 300.0f) v = v * 0.5f; y[i] = v;"),
    "endless loop over memory": ("time limit", "while (x[i] < 300.0f) y[i] = x[i]; y[i] = 1;"),
}


def _run(source: str, **options: object) -> metal_kernel:
    kernel = metal_kernel("case", ["x"], ["y"], _PRELUDE + source + "\n", **options)
    kernel(
        inputs=[mx.arange(256).astype(mx.float32)],
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(256,)],
        output_dtypes=[mx.float32],
    )
    return kernel


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernel_has_no_finding(name: str) -> None:
    assert not _run(CORRECT[name], raises=False).report.findings


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_correct_kernels_have_no_finding_in_other_orders(order: str) -> None:
    for source in CORRECT.values():
        assert not _run(source, raises=False, order=order).report.findings


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str) -> None:
    kind, source = DEFECTS[name]
    time_limit = 0.3 if kind == "time limit" else 60
    with pytest.raises(MslError, match=kind) as error:
        _run(source, time_limit=time_limit)
    if kind not in ("never written", "crash|undefined", "crash"):
        assert "case.source:2" in str(error.value)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_race_is_found_in_every_order(order: str) -> None:
    # What counts is which barriers order two accesses, not how the lanes happened to run.
    for name in ("missing barrier", "write after read", "two threadgroups write one output"):
        with pytest.raises(MslError, match="unordered"):
            _run(DEFECTS[name][1], order=order)


def test_worker_survives_what_ended_a_kernel() -> None:
    for source in (DEFECTS["stack of a thread full"][1], DEFECTS["endless loop"][1]):
        with pytest.raises(MslError):
            _run(source, time_limit=0.3)
        assert not _run(CORRECT["atomic counter"]).report.findings
