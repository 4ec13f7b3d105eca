"""The Metal kernels through `mlxq.ops`: chosen, asked for, refused, checked before they are used."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest
from pretended_gpu import pretend_gpu
from random_blocks import random_blocks

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.formats import ggml
from mlxq.ops import kernel_check, metal_blocks, metal_source
from mlxq.ops.dispatch import METAL_TYPES
from mlxq.ops.kernel_cases import TOLERANCE, Blocks


@pytest.fixture
def gpu(metal, monkeypatch):
    """A GPU that takes our kernels; nothing was checked on it yet."""
    pretend_gpu(monkeypatch, metal=True)
    monkeypatch.setattr(kernel_check, "_verdicts", {})
    return metal


@pytest.fixture
def checked(gpu, monkeypatch):
    """Kernels are checked before they are used, as on a real GPU."""
    monkeypatch.setattr(kernel_check, "launches_on_gpu", lambda: True)
    return gpu


def block_operands(name: str = "Q4_K", M: int = 2, N: int = 5, K: int = 256) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(3).standard_normal((M, K)).astype(np.float32)
    return x, random_blocks(name, (N, K))


def close(y: object, expected: np.ndarray, dtype: str = "F32") -> bool:
    return bool(np.abs(np.array(y) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max())


def names(metal) -> list[str]:
    return [name for name, _ in metal.launches]


def test_affine_ops_when_asked_for(metal, monkeypatch):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 5, 64)).astype(np.float32)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    grid = {"bits": 4, "group_size": 32}
    packed = ops.quantize(w, **grid, backend="numpy")
    w_hat = ops.dequantize(*packed, **grid, backend="numpy")
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    # Arrays of NumPy and of mlx; what comes out is what went in.
    for kind in (lambda a: a, mx.array):
        held = [kind(a) for a in packed]
        assert np.array_equal(np.array(ops.dequantize(*held, **grid)), w_hat)
        first = [a[0] for a in held]
        y = ops.quantized_matmul(kind(x), *first, **grid)
        assert type(y) is type(kind(x))
        assert close(y, x.astype(np.float64) @ w_hat[0].T)
        y = ops.quantized_matmul(kind(x[:, :5]), *first, **grid, transpose=False)
        assert close(y, x[:, :5].astype(np.float64) @ w_hat[0])
        y = ops.gather_quantized_matmul(kind(x[:, None]), *held, kind(np.array([2, 0, 1], np.uint32)), **grid)
        assert close(y, x[:, None].astype(np.float64) @ w_hat[[2, 0, 1]].swapaxes(1, 2))
    w_q, scales, biases = ops.quantize(w, **grid)
    error = np.abs(ops.dequantize(w_q, scales, biases, **grid) - w)
    assert (error <= np.abs(scales).repeat(32, axis=-1)).all()
    if not metal.real:
        used = {name.split("_float32")[0] for name in names(metal)}
        assert {"affine_quantize", "affine_dequantize", "affine_qmv_rows"} <= used
        assert any(name.startswith("affine_gather") for name in used)


def test_block_ops_when_asked_for(metal):
    x, blocks = block_operands()
    w = ggml.dequantize(blocks, "Q4_K").astype(np.float64)
    for kind in (lambda a: a, mx.array):
        held = kind(blocks)
        assert np.array_equal(np.array(ops.block_dequantize(held, type_name="Q4_K", backend="metal")), w)
        assert close(ops.block_matmul(kind(x), held, type_name="Q4_K", backend="metal"), x @ w.T)
        stack, experts = kind(np.stack([blocks, blocks[::-1]])), kind(np.array([1, 0]))
        y = ops.gather_block_matmul(kind(x[:, None]), stack, experts, type_name="Q4_K", backend="metal")
        assert close(np.array(y)[:, 0], np.stack([x[0] @ w[::-1].T, x[1] @ w.T]))
    if not metal.real:
        assert {name.split("_q4_k")[0] for name in names(metal)} == {"ggml_dequantize", "ggml_qmv", "ggml_gather_qmv"}


def test_float_products_are_left_to_mlx(metal, monkeypatch):
    monkeypatch.setenv("MLXQ_BACKEND", "metal")
    x = mx.array(np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32))
    assert mx.allclose(ops.matmul(x, x), x @ x.T)
    y = ops.gather_matmul(x[:, None], x[None], mx.array([0, 0]))
    assert mx.allclose(y[:, 0], x @ x.T)
    assert not metal.launches


def test_a_gpu_computes_blocks_with_our_kernels_and_affine_weights_with_those_of_mlx(gpu):
    x, blocks = block_operands("Q6_K", M=1)
    y = ops.block_matmul(mx.array(x), mx.array(blocks), type_name="Q6_K")
    assert close(y, x @ ggml.dequantize(blocks, "Q6_K").astype(np.float64).T)
    if not gpu.real:
        assert [name.split("_float32")[0] for name in names(gpu)] == ["ggml_qmv_q6_k"]
    launches = len(gpu.launches)
    # A type without a kernel, NumPy arrays, and affine weights.
    other = random_blocks("IQ2_S", (5, 256))
    ops.block_matmul(mx.array(x), mx.array(other), type_name="IQ2_S")
    ops.block_matmul(x, blocks, type_name="Q6_K")
    packed = ops.quantize(mx.array(x), bits=4, group_size=64)
    ops.quantized_matmul(mx.array(x), *packed, bits=4, group_size=64)
    assert len(gpu.launches) == launches


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"type_name": "IQ2_S"}, BackendError, "no kernel for ggml type 'IQ2_S'"),
        ({"type_name": "Q4_X"}, FormatError, "Q4_X"),
        ({"blocks": np.zeros((5, 143), np.uint8)}, FormatError, "whole blocks of 144 bytes"),
        ({"blocks": np.zeros((5, 144), np.int8)}, FormatError, "uint8"),
        ({"blocks": np.zeros((2, 5, 144), np.uint8)}, FormatError, "[N, row_bytes]"),
        ({"x": np.zeros((2, 255), np.float32)}, FormatError, "255 columns"),
        ({"x": np.zeros((2, 256), np.int32)}, FormatError, "float32, float16 or bfloat16"),
    ],
)
def test_bad_input_raises_before_a_launch(metal, arguments, error, words):
    x, blocks = block_operands()
    if arguments.get("type_name") == "IQ2_S":
        blocks = random_blocks("IQ2_S", (5, 256))
    given = {"x": x, "blocks": blocks, "type_name": "Q4_K"} | arguments
    given = {k: v if isinstance(v, str) else mx.array(v) for k, v in given.items()}
    with pytest.raises(error) as raised:
        ops.block_matmul(**given, backend="metal")
    assert words in str(raised.value)
    assert not metal.launches


def test_nothing_is_launched_for_no_rows(gpu):
    _, blocks = block_operands()
    y = ops.block_matmul(mx.zeros((0, 256), mx.float16), mx.array(blocks), type_name="Q4_K")
    assert (y.shape, y.dtype) == ((0, 5), mx.float16)
    assert not gpu.launches


@pytest.mark.slow
@pytest.mark.parametrize("name", METAL_TYPES)
def test_every_kernel_passes_its_check(checked, name):
    # The slow part is compiling; `check` mode has its own tests.
    with checked.options(mode="fast", opt="-O0"), warnings.catch_warnings():
        warnings.simplefilter("error")
        row_bytes = random_blocks(name, (1, 512)).shape[-1]
        for op, dtype, rows in [
            ("block_dequantize", "F32", 0),
            ("block_matmul", "F16", 1),
            ("block_matmul", "BF16", 3),
            ("block_matmul", "F32", 16),
            ("block_matmul", "F32", 40),
            ("gather_block_matmul", "F32", 2),
        ]:
            assert kernel_check.passes(op, Blocks(name, dtype, row_bytes), rows)
    assert set(kernel_check._verdicts.values()) == {True}
    if not checked.real:
        # Every sort of kernel: for one row, few, tiles, and of experts one by one and in tiles.
        sorts = {launched.split(f"_{name.lower()}_")[0] for launched in names(checked)}
        assert sorts == {"ggml_dequantize", "ggml_qmv", "ggml_qmm", "ggml_gather_qmv", "ggml_gather_qmm"}


def test_a_kernel_is_checked_once_and_then_used(checked):
    x, blocks = block_operands(M=1)
    for _ in range(3):
        y = ops.block_matmul(mx.array(x), mx.array(blocks), type_name="Q4_K")
        assert close(y, x @ ggml.dequantize(blocks, "Q4_K").astype(np.float64).T)
    if not checked.real:
        assert len(checked.launches) == 4


def broken(monkeypatch, how):
    """Let every kernel on blocks be spoilt: `how` gets the true output."""
    for op in ("block_dequantize", "block_matmul", "gather_block_matmul"):
        original = getattr(metal_blocks, op)
        monkeypatch.setattr(metal_blocks, op, lambda *a, original=original: how(original(*a)))


def off_by_little(y: mx.array) -> mx.array:
    y[..., -1, 3] *= 1.01
    return y


@pytest.mark.parametrize("how", [off_by_little, lambda y: y * float("nan")], ids=["one output by 1 %", "nan"])
def test_a_kernel_with_wrong_results_is_not_used(checked, monkeypatch, how):
    broken(monkeypatch, how)
    x, blocks = block_operands("Q5_K", M=4)
    w = ggml.dequantize(blocks, "Q5_K").astype(np.float64)
    chip = mx.device_info()["device_name"]
    with pytest.warns(UserWarning, match="block_matmul of Q5_K, F32, 2 to 8 rows is not used on") as told:
        y = ops.block_matmul(mx.array(x), mx.array(blocks), type_name="Q5_K")
    assert close(y, x @ w.T)
    text = str(told[0].message)
    assert len(told) == 1
    assert all(words in text for words in (chip, "NumPy", "allowed 1e-06"))
    assert "\n" not in text
    with pytest.warns(UserWarning, match="block_dequantize of Q5_K, F32 .* bytes differ"):
        assert np.array_equal(np.array(ops.block_dequantize(mx.array(blocks), type_name="Q5_K")), w)
    with pytest.warns(UserWarning, match="gather_block_matmul of Q5_K, F32"):
        y = ops.gather_block_matmul(
            mx.array(x[:, None]), mx.array(blocks[None]), mx.zeros(4, mx.int32), type_name="Q5_K"
        )
    assert close(y[:, 0], x @ w.T)
    # Said once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(ops.block_matmul(mx.array(x), mx.array(blocks), type_name="Q5_K"), x @ w.T)
    # What is asked for is done all the same.
    assert not close(ops.block_matmul(mx.array(x), mx.array(blocks), type_name="Q5_K", backend="metal"), x @ w.T)


def test_a_kernel_that_does_not_compile_is_not_used(checked, monkeypatch):
    original = metal_source.header
    metal_source._kernel.cache_clear()
    monkeypatch.setattr(metal_source, "header", lambda *a: original(*a) + "\nint broken( {\n")
    x, blocks = block_operands("Q3_K", M=1)
    with pytest.warns(UserWarning, match="block_matmul of Q3_K, F32, 1 row is not used on") as told:
        y = ops.block_matmul(mx.array(x), mx.array(blocks), type_name="Q3_K")
    assert close(y, x @ ggml.dequantize(blocks, "Q3_K").astype(np.float64).T)
    assert "error: " in str(told[0].message)
    assert "\n" not in str(told[0].message)
    metal_source._kernel.cache_clear()
    # The fixture fails a test whose kernels have errors.
    assert checked.real or checked.errors
    checked.errors.clear()
