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
        (Call("gather_block_matmul", "gpu", 1), "numpy"),
    ],
)
def test_table(monkeypatch, call, backend):
    monkeypatch.delenv("MLXQ_BACKEND", raising=False)
    assert choose(call) == backend
    assert len(dispatch.reason(call)) > 20


def test_every_row_of_the_table_is_reached_by_some_call():
    calls = [
        Call(op, device, rows)
        for op in ("quantize", "dequantize", "matmul", "quantized_matmul", "block_matmul")
        for device in ("host", "host, mlx loaded", "cpu", "gpu")
        for rows in (1, 512)
    ]
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


@pytest.mark.parametrize(
    ("name", "words"),
    [("cuda", ["MLXQ_BACKEND", "'cuda'", "numpy, mlx"]), ("metal", ["not in this version", "numpy, mlx"])],
)
def test_unknown_backends_are_refused(monkeypatch, name, words):
    monkeypatch.setenv("MLXQ_BACKEND", name)
    with pytest.raises(BackendError) as error:
        ops.matmul(np.ones((1, 4), np.float32), np.ones((1, 4), np.float32))
    assert all(word in str(error.value) for word in words)
