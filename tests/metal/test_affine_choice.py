"""Affine products on a GPU: by mlx's kernels, or by ours where a stored measurement says so and a check allows it."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from affine_cases import TOLERANCES, doubles, error, normal, packed
from pretended_gpu import pretend_gpu

from mlxq import ops
from mlxq.ops import choices, kernel_check, metal_backend
from mlxq.ops.choices import Product
from mlxq.ops.kernel_cases import Affine
from mlxq.runtime.layers import QuantizedEmbedding, QuantizedLinear, install_layers
from mlxq.types import QuantSpec, TensorInfo

FASTER, SLOWER = {"metal": 1e-5, "mlx": 2e-5}, {"metal": 3e-5, "mlx": 2e-5}
GRID = {"bits": 4, "group_size": 32}
N, K = 40, 64


@pytest.fixture
def gpu(metal, monkeypatch, tmp_path):
    """A GPU that takes our kernels, where nothing was measured nor checked yet."""
    pretend_gpu(monkeypatch, metal=True)
    monkeypatch.setattr(kernel_check, "_verdicts", {})
    monkeypatch.setenv("MLXQ_CACHE_DIR", str(tmp_path))
    choices.forget()
    yield metal
    choices.forget()


@pytest.fixture
def checked(gpu, monkeypatch):
    """Kernels are checked before they are used, as on a real GPU."""
    monkeypatch.setattr(kernel_check, "launches_on_gpu", lambda: True)
    return gpu


def measured(times: dict, **changes: object) -> None:
    """Store times of the product that `multiply` computes."""
    choices.store({Product(**GRID, dtype="F32", N=N, K=K)._replace(**changes): times})


def multiply(M: int, dtype: mx.Dtype = mx.float32, transpose: bool = True) -> None:
    """A product, whose result is checked."""
    weights = packed((N, K), 4, 32, dtype)
    w = weights.decoded(4, 32)
    x = normal((M, K if transpose else N), dtype)
    y = ops.quantized_matmul(x, *weights, transpose=transpose, **GRID)
    # mlx's kernels round sums of half floats on this CPU.
    assert error(y, doubles(x) @ (w.T if transpose else w)) <= (1e-5 if dtype == mx.float32 else 0.02)


def test_mlx_computes_until_ours_is_measured_to_be_faster(gpu):
    multiply(1)
    assert not gpu.launches
    measured({1: SLOWER, 8: FASTER})
    multiply(1)
    assert not gpu.launches
    multiply(8)
    if not gpu.real:
        assert [name for name, _ in gpu.launches] == ["affine_qmv_rows_float32_gs_32_b_4"]


def test_only_what_was_measured_goes_to_our_kernel(gpu):
    measured({1: FASTER})
    multiply(1, mx.float16)
    multiply(32, transpose=False)
    weights = packed((3, N, K), 4, 32, mx.float32)
    ops.gather_quantized_matmul(normal((2, 1, K), mx.float32), *weights, mx.array([0, 2]), **GRID)
    ops.dequantize(*packed((N, K), 4, 32, mx.float32), **GRID)
    assert not gpu.launches
    multiply(1)
    assert gpu.real or gpu.launches


def test_a_stack_of_experts_is_measured_by_itself(gpu):
    weights = packed((3, N, K), 4, 32, mx.float32)
    measured({1: FASTER}, experts=3)
    x, experts = normal((2, 1, K), mx.float32), [0, 2]
    y = ops.gather_quantized_matmul(x, *weights, mx.array(experts), **GRID)
    assert error(y, doubles(x) @ weights.decoded(4, 32)[experts].swapaxes(1, 2)) <= TOLERANCES[mx.float32]
    if not gpu.real:
        assert [name for name, _ in gpu.launches] == ["affine_gather_qmv_float32_gs_32_b_4"]


def test_without_metal_a_measurement_changes_nothing(gpu, monkeypatch):
    measured({1: FASTER})
    pretend_gpu(monkeypatch, metal=False)
    multiply(1)
    assert not gpu.launches


def test_groups_of_16_are_ours_without_a_measurement(gpu):
    weights = packed((N, K), 4, 16, mx.float16)
    x = normal((1, K), mx.float16)
    y = ops.quantized_matmul(x, *weights, bits=4, group_size=16)
    assert error(y, doubles(x) @ weights.decoded(4, 16).T) <= TOLERANCES[mx.float16]
    assert gpu.real or gpu.launches


def kernels() -> list:
    every = [(bits, group, dtype) for bits, group in ((4, 64), (3, 16), (8, 128)) for dtype in ("F32", "F16", "BF16")]
    quick = ((4, 64, "F16"), (3, 16, "BF16"))
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("bits", "group_size", "dtype"), kernels())
def test_kernels_pass_their_check(checked, bits, group_size, dtype):
    how = Affine(bits, group_size, dtype, dtype, 2176, 600)
    cases = [("quantized_matmul", how, rows) for rows in (1, 3, 16, 40)]
    cases += [("quantized_matmul", how._replace(transpose=False), 5), ("gather_quantized_matmul", how, 2)]
    cases += [(op, how._replace(dtype="", N=0), 0) for op in ("quantize", "dequantize")]
    cases.append(("quantized_matmul", how._replace(scales_dtype="F32"), 1))
    # Small ones that end as these do: the slow part is compiling.
    cases = [(op, w._replace(K=384, N=w.N and 44), rows) for op, w, rows in cases]
    with checked.options(mode="fast", opt="-O0"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in cases:
            assert kernel_check.passes(*case)


def test_what_is_checked_ends_as_the_product_does():
    from mlxq.ops.kernel_cases import case_of

    small = case_of("quantized_matmul", Affine(4, 64, "F16", "F16", 11008, 151936), 1).weights
    assert (small.K % 1024, small.N % 256) == (11008 % 1024, 151936 % 256)
    assert max(small.K, small.N) < 2048
    exact = Affine(4, 64, "F16", "F16", 576, 192)
    assert case_of("quantized_matmul", exact, 1).weights == exact


def test_a_kernel_is_checked_once_and_then_used(checked):
    measured({1: FASTER})
    for _ in range(3):
        multiply(1)
    if not checked.real:
        assert len(checked.launches) == 4


def off_by_little(y: mx.array) -> mx.array:
    y[..., -1, 3] *= 1.01
    return y


@pytest.mark.parametrize("how", [off_by_little, lambda y: y * float("nan")], ids=["one output by 1 %", "nan"])
def test_a_wrong_kernel_is_left_to_mlx_and_said_once(checked, monkeypatch, how):
    original = metal_backend.quantized_matmul
    monkeypatch.setattr(metal_backend, "quantized_matmul", lambda *a: how(original(*a)))
    measured({1: FASTER})

    def multiply_twice():
        multiply(1)
        multiply(1)

    with pytest.warns(UserWarning, match="quantized_matmul of 4-bit group 32, F32, 1 row is not used on") as told:
        multiply_twice()
    assert len(told) == 1
    assert "mlx's own is instead: error" in str(told[0].message)
    assert "\n" not in str(told[0].message)


@pytest.mark.parametrize("op", ["quantize", "dequantize", "quantized_matmul"])
def test_a_wrong_kernel_of_groups_of_16_is_left_to_numpy(checked, monkeypatch, op):
    original = getattr(metal_backend, op)

    def spoilt(*arguments):
        out = original(*arguments)
        return (out[0] ^ 0x80, *out[1:]) if op == "quantize" else off_by_little(out)

    monkeypatch.setattr(metal_backend, op, spoilt)
    grid = {"bits": 4, "group_size": 16}
    w = normal((N, K), mx.float32)
    x = normal((1, K), mx.float32)

    def all_of_them():
        codes = ops.quantize(w, **grid)
        return codes, ops.dequantize(*codes, **grid), ops.quantized_matmul(x, *codes, **grid)

    with pytest.warns(UserWarning, match=f"{op} of 4-bit group 16, F32.*NumPy computes it instead") as told:
        codes, w_hat, y = all_of_them()
    assert len(told) == 1
    steps = np.repeat(np.abs(np.array(codes[1])), 16, axis=1)
    assert (np.abs(np.array(w_hat - w)) <= steps).all()
    assert error(y, doubles(x) @ doubles(w_hat).T) <= 1e-5


def test_layers_are_mlx_s_own_unless_ours_are_faster_for_their_shape(gpu):
    def layers() -> tuple[bool, bool]:
        model = nn.Module()
        model.a, model.b, model.c = nn.Linear(K, N), nn.Linear(K, 2 * N), nn.Embedding(N, K)
        info = {"dtype": "AFFINE", "nbytes": 0, "spec": QuantSpec(4, 32), "scales_dtype": "F16", "module": "linear"}
        shapes = {"a.weight": (N, K), "b.weight": (2 * N, K), "c.weight": (N, K)}
        install_layers(model, {name: TensorInfo(name, shape, **info) for name, shape in shapes.items()})
        assert [type(m) for m in (model.a, model.c)] == [QuantizedLinear, QuantizedEmbedding]
        return model.a.plain, model.b.plain, model.c.plain

    assert layers() == (True, True, True)
    measured({1: SLOWER})
    assert layers() == (True, True, True)
    measured({1: FASTER, 64: SLOWER}, dtype="F16")
    assert layers() == (False, True, False)
