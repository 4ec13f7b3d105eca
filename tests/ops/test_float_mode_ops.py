"""Products and rows of weights in MLX's float modes: every back end against decoded float32 weights."""

import numpy as np
import pytest

from mlxq import ops
from mlxq.errors import FormatError
from mlxq.formats import float_modes
from mlxq.formats.floats import from_float32

mx = pytest.importorskip("mlx.core")
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
N, K = 24, 96


def packed(mode, experts=0, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((*((experts,) if experts else ()), N, K), dtype=np.float32) * np.float32(K**-0.5)
    w_q, scales = (np.array(a) for a in mx.quantize(mx.array(w), mode=mode))
    return w_q, scales, float_modes.dequantize(w_q, scales, mode)


def how(mode):
    bits, group_size = MODES[mode]
    return {"bits": bits, "group_size": group_size, "mode": mode}


def kinds(a, kind):
    return a if kind == "numpy" else mx.array(a)


@pytest.mark.parametrize("backend", [None, "numpy", "mlx"])
@pytest.mark.parametrize("kind", ["numpy", "mlx"])
@pytest.mark.parametrize("mode", MODES)
def test_products(mode, kind, backend):
    w_q, scales, w = packed(mode)
    rng = np.random.default_rng(1)
    for M in (1, 3, 40):
        for transpose, inner in ((True, K), (False, N)):
            x = rng.standard_normal((2, M, inner), dtype=np.float32)
            y = ops.quantized_matmul(
                kinds(x, kind), kinds(w_q, kind), kinds(scales, kind), None, transpose=transpose, backend=backend,
                **how(mode),
            )  # fmt: skip
            assert isinstance(y, np.ndarray) == (kind == "numpy")
            expected = x @ (w.T if transpose else w)
            # K products, each rounded in float32.
            np.testing.assert_allclose(np.array(y), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", [None, "numpy", "mlx"])
@pytest.mark.parametrize("mode", MODES)
def test_gathered_products(mode, backend):
    w_q, scales, w = packed(mode, experts=3)
    x = np.random.default_rng(1).standard_normal((5, 1, 2, K), dtype=np.float32)
    experts = np.array([[0, 2], [1, 1], [2, 0], [0, 0], [1, 2]], np.uint32)
    y = ops.gather_quantized_matmul(
        mx.array(x), mx.array(w_q), mx.array(scales), None, mx.array(experts), backend=backend, **how(mode)
    )
    expected = x @ w[experts].swapaxes(-1, -2)
    np.testing.assert_allclose(np.array(y), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_dtype_is_that_of_x(dtype):
    w_q, scales, _ = packed("mxfp4")
    x = np.random.default_rng(1).standard_normal((9, K), dtype=np.float32)
    y = ops.quantized_matmul(from_float32(x, dtype), w_q, scales, None, **how("mxfp4"))
    assert y.dtype == from_float32(x, dtype).dtype


@pytest.mark.parametrize("mode", MODES)
def test_rows(mode):
    w_q, scales, w = packed(mode)
    for kind in ("numpy", "mlx"):
        found = ops.dequantize(kinds(w_q, kind), kinds(scales, kind), None, **how(mode))
        np.testing.assert_array_equal(np.array(found), w)
    half = ops.dequantize(w_q, scales, None, dtype="BF16", **how(mode))
    np.testing.assert_array_equal(half, from_float32(w, "BF16"))


@pytest.mark.parametrize("M", [2, 40])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode, M):
    w_q, scales, w = packed(mode)
    x = np.random.default_rng(1).standard_normal((M, K), dtype=np.float32)

    def loss(x):
        return (ops.quantized_matmul(x, mx.array(w_q), mx.array(scales), None, **how(mode)) ** 2).sum()

    gradient = np.array(mx.grad(loss)(mx.array(x)))
    expected = 2 * (x @ w.T) @ w
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp6"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'mxfp6'"),
        ({"bits": 8}, "mode mxfp4 has 4 bits in groups of 32, got 8 in groups of 32"),
        ({"mode": "mxfp8", "bits": 8}, "hold 48 codes, but its scales are for 96"),
        ({"scales": np.zeros((N, K // 32), np.float32)}, "scales must be uint8 in mode mxfp4, got F32"),
        ({"scales": np.zeros((N + 1, K // 32), np.uint8)}, "agree in all axes but the last"),
        ({"x": np.zeros((2, K + 1), np.float32)}, "x has 97 columns, but the weights multiply 96"),
        ({"x": np.zeros((2, K), np.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ],
)
def test_bad_input(change, message):
    w_q, scales, _ = packed("mxfp4")
    arguments = {"x": np.zeros((2, K), np.float32), "w_q": w_q, "scales": scales, "biases": None} | how("mxfp4")
    with pytest.raises(FormatError, match=message):
        ops.quantized_matmul(**(arguments | change))
