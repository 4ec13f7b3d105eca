"""The choice of a back end: the table, and what overrides it."""

import mlx.core as mx
import numpy as np
import pytest

from mlxq import ops
from mlxq.errors import BackendError
from mlxq.ops import dispatch, mlx_backend, numpy_backend
from mlxq.ops.dispatch import Call, choose


@pytest.mark.parametrize(
    ("call", "backend"),
    [
        (Call("quantize", "host"), "numpy"),
        (Call("quantize", "host, mlx loaded"), "mlx"),
        (Call("dequantize", "host, mlx loaded"), "numpy"),
        (Call("quantized_matmul", "host", 1), "numpy"),
        (Call("quantized_matmul", "gpu", 1), "mlx"),
        (Call("quantized_matmul", "gpu", 512), "mlx"),
        (Call("matmul", "gpu", 512), "mlx"),
        (Call("quantize", "cpu"), "mlx"),
        (Call("dequantize", "cpu"), "mlx"),
        (Call("quantized_matmul", "cpu", 512), "numpy"),
        (Call("quantized_matmul", "cpu", 2), "numpy"),
        (Call("quantized_matmul", "cpu", 1), "mlx"),
        (Call("gather_quantized_matmul", "cpu", 8), "numpy"),
        (Call("matmul", "cpu", 1), "numpy"),
        (Call("block_matmul", "cpu", 1), "numpy"),
        (Call("gather_block_matmul", "gpu", 1, "Q4_K"), "numpy"),
        (Call("gather_block_matmul", "gpu", 1, "Q4_K", metal=True), "metal"),
        (Call("block_matmul", "gpu", 512, "IQ4_XS", metal=True), "metal"),
        (Call("block_dequantize", "gpu", 0, "Q8_0", metal=True), "metal"),
        (Call("block_matmul", "gpu", 1, "IQ2_S", metal=True), "numpy"),
        (Call("block_matmul", "cpu", 1, "Q4_K"), "numpy"),
        (Call("quantized_matmul", "gpu", 1, metal=True), "mlx"),
        (Call("gather_quantized_matmul", "gpu", 512, metal=True), "mlx"),
        (Call("quantize", "gpu", metal=True), "mlx"),
        (Call("dequantize", "gpu", metal=True), "mlx"),
        (Call("matmul", "gpu", 1, metal=True), "mlx"),
        (Call("encode", "host", format="Q6_K"), "numpy"),
        (Call("encode", "gpu", format="Q6_K"), "mlx"),
        (Call("encode", "gpu", format="Q6_K", metal=True), "metal"),
        (Call("encode", "gpu", format="Q4_0", metal=True), "mlx"),
        (Call("quantized_matmul", "gpu", 1, metal=True, group_size=64, faster=True), "metal"),
        (Call("gather_quantized_matmul", "gpu", 64, metal=True, group_size=32, faster=True), "metal"),
        (Call("quantized_matmul", "gpu", 1, metal=True, group_size=16), "metal"),
        (Call("quantized_matmul", "gpu", 1, group_size=16), "numpy"),
        (Call("quantized_matmul", "cpu", 1, group_size=16), "numpy"),
        (Call("quantize", "cpu", group_size=16), "numpy"),
        (Call("quantize", "host, mlx loaded", group_size=16), "numpy"),
    ],
)
def test_table(monkeypatch, call, backend):
    monkeypatch.delenv("MLXQ_BACKEND", raising=False)
    assert choose(call) == backend
    assert len(dispatch.reason(call)) > 20


def test_every_row_of_the_table_is_reached_by_some_call():
    calls = [
        Call(op, device, rows, format, metal, group_size, faster=metal)
        for op in ("quantize", "dequantize", "matmul", "quantized_matmul", "block_matmul")
        for device in ("host", "host, mlx loaded", "cpu", "gpu")
        for rows in (1, 512)
        for format, group_size in (("affine", 64), ("affine", 16), ("Q4_K", 0))
        for metal in (False, True)
    ]
    calls.append(Call("encode", "gpu", format="Q6_K", metal=True))
    assert {dispatch.reason(call) for call in calls} == {row.reason for row in dispatch._TABLE}


def _count(monkeypatch, module):
    calls = []
    original = module.matmul
    monkeypatch.setattr(module, "matmul", lambda *args: calls.append(1) or original(*args))
    return calls


def test_environment_and_argument_override_the_table(monkeypatch):
    x = np.ones((2, 32), np.float32)
    on_numpy, on_mlx = _count(monkeypatch, numpy_backend), _count(monkeypatch, mlx_backend)
    monkeypatch.setenv("MLXQ_BACKEND", "mlx")
    ops.matmul(x, x)
    assert (len(on_numpy), len(on_mlx)) == (0, 1)
    monkeypatch.setenv("MLXQ_BACKEND", "numpy")
    ops.matmul(mx.array(x), mx.array(x))
    assert (len(on_numpy), len(on_mlx)) == (1, 1)
    ops.matmul(x, x, backend="mlx")
    assert (len(on_numpy), len(on_mlx)) == (1, 2)
    monkeypatch.delenv("MLXQ_BACKEND")
    ops.matmul(x, x)
    assert (len(on_numpy), len(on_mlx)) == (2, 2)


def test_a_wrong_kernel_leaves_the_call_to_the_next_row():
    assert choose(Call("block_matmul", "gpu", 1, "Q4_K", metal=True), without_metal=True) == "numpy"
    affine = Call("quantized_matmul", "gpu", 1, metal=True, group_size=64, faster=True)
    assert choose(affine, without_metal=True) == "mlx"
    assert choose(affine._replace(group_size=16), without_metal=True) == "numpy"


def test_types_with_kernels_are_said_once():
    metal_blocks = pytest.importorskip("mlxq.ops.metal_blocks")
    assert set(dispatch.METAL_TYPES) == set(metal_blocks.METAL_TYPES)


@pytest.mark.parametrize("name", ["cuda", "Metal"])
def test_unknown_backends_are_refused(monkeypatch, name):
    monkeypatch.setenv("MLXQ_BACKEND", name)
    with pytest.raises(BackendError) as error:
        ops.matmul(np.ones((1, 4), np.float32), np.ones((1, 4), np.float32))
    assert all(word in str(error.value) for word in ["MLXQ_BACKEND", repr(name), "numpy, mlx, metal"])


@pytest.fixture
def launches(monkeypatch):
    """Counts attempts to launch a kernel."""
    calls = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **_: calls.append(1))
    return calls


@pytest.mark.parametrize("source", ["backend", "MLXQ_BACKEND"])
@pytest.mark.parametrize("kind", ["numpy", "mlx"])
def test_metal_is_refused_where_there_is_none(monkeypatch, launches, source, kind):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    backend = "metal" if source == "backend" else None
    if backend is None:
        monkeypatch.setenv("MLXQ_BACKEND", "metal")
    x = np.ones((1, 32), np.float32)
    blocks = np.zeros((1, 34), np.uint8)
    if kind == "mlx":
        x, blocks = mx.array(x), mx.array(blocks)
    for call in (
        lambda: ops.matmul(x, x, backend=backend),
        lambda: ops.quantize(x, bits=4, group_size=32, backend=backend),
        lambda: ops.block_matmul(x, blocks, type_name="Q8_0", backend=backend),
        lambda: ops.block_dequantize(blocks, type_name="Q8_0", backend=backend),
    ):
        with pytest.raises(BackendError) as error:
            call()
        text = str(error.value)
        assert all(words in text for words in (source, "Apple GPU", "numpy and mlx"))
        assert "\n" not in text
    assert not launches


def test_what_metal_does_not_compute_is_left_to_mlx(monkeypatch):
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    # "encode" is asked for by `quantizers.ggml`.
    asked_of_metal = {op: choose(Call(op, "gpu")) for op in ("matmul", "gather_matmul", "encode", "quantize")}
    assert asked_of_metal == {"matmul": "mlx", "gather_matmul": "mlx", "encode": "mlx", "quantize": "metal"}
    assert choose(Call("block_matmul", "gpu", 1, "Q4_K"), "numpy") == "numpy"


def test_metal_needs_the_gpu_as_default_device(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert dispatch.launches_on_gpu()
        assert not dispatch.metal_available()
        monkeypatch.setattr(mx.fast, "metal_kernel", lambda **_: None)
        assert dispatch.metal_available()
    finally:
        mx.set_default_device(device)
