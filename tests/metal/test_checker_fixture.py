"""The fixture `metal`: the package's own calls reach the checker, its options hold, and findings fail a test."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_on_cpu import MslError


def _double(source: str = "uint i = thread_position_in_grid.x; y[i] = x[i] * 2;\n"):
    return mx.fast.metal_kernel(name="double", input_names=["x"], output_names=["y"], source=source)


def _call(kernel, x: mx.array) -> mx.array:
    one_each = {"grid": (x.size, 1, 1), "threadgroup": (64, 1, 1)}
    return kernel(inputs=[x], **one_each, output_shapes=[x.shape], output_dtypes=[x.dtype])[0]


def test_kernels_run_and_are_recorded(metal) -> None:
    x = mx.arange(256).astype(mx.float16)
    assert mx.array_equal(_call(_double(), x), x * 2)
    assert mx.metal.is_available()
    if not metal.real:
        assert [name for name, _ in metal.launches] == ["double"]
        assert metal.report.buffers["x"].load_bytes == 512


def test_options_hold_inside_their_context(metal) -> None:
    if metal.real:
        pytest.skip("the real Metal has no options")
    kernel = _double()
    with metal.options(mode="count"):
        _call(kernel, mx.ones(64))
    assert metal.report.instructions["float"] == 64
    _call(kernel, mx.ones(64))
    assert not metal.report.instructions


def test_finding_raises_with_its_line(metal) -> None:
    if metal.real:
        pytest.skip("the real Metal checks nothing")
    with pytest.raises(MslError, match=r"double: read out of bounds at double\.source:2:11: 4 B at byte 256 of x"):
        _call(_double("uint i = thread_position_in_grid.x;\n   y[i] = x[i + 1];\n"), mx.ones(64))
