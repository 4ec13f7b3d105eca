"""Groups of 16: legal for the operations, which mlx's kernels never compute, and not for files."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.formats import affine, geometry
from mlxq.formats.floats import from_float32, to_float32
from mlxq.formats.geometry import AFFINE_BITS
from mlxq.ops.arrays import to_mlx, to_numpy
from mlxq.types import QuantSpec

DTYPES = ("F32", "F16", "BF16")


def normal(shape, seed, dtype="F32") -> np.ndarray:
    return from_float32(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), dtype)


def decoded(packed, bits) -> np.ndarray:
    """`scales * q + biases` in float64."""
    w_q, scales, biases = packed
    codes = affine.unpack(w_q, bits, scales.shape[-1] * 16)
    wide = (
        p if p.dtype == np.float32 else to_float32(p, "F16" if p.dtype == np.float16 else "BF16") for p in packed[1:]
    )
    scales, biases = (np.repeat(p.astype(np.float64), 16, axis=-1) for p in wide)
    return codes * scales + biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_quantize_rounds_to_the_grid_of_its_group(bits, dtype):
    w = normal((3, 5, 96), bits, dtype)
    w_q, scales, biases = ops.quantize(w, bits=bits, group_size=16)
    assert (w_q.shape, scales.shape, biases.shape) == ((3, 5, 3 * bits), (3, 5, 6), (3, 5, 6))
    w_hat = ops.dequantize(w_q, scales, biases, bits=bits, group_size=16)
    assert w_hat.dtype == w.dtype
    wide, found = to_float32(w, dtype), to_float32(w_hat, dtype)
    # Half a step, and the range that a grid with 0 on it may lose at one end; halves round, too.
    step = np.abs(np.repeat(to_float32(scales, dtype), 16, axis=-1))
    slack = {"F32": 1e-6, "F16": 2**-9, "BF16": 2**-6}[dtype] * np.abs(wide).max()
    assert (np.abs(found - wide) <= step + slack).all()
    # Two groups of the same weights are quantized as one of 32 is.
    doubled = np.repeat(w.reshape(3, 5, 6, 1, 16), 2, axis=3).reshape(3, 5, 192)
    pairs = ops.quantize(doubled, bits=bits, group_size=32)
    singles = ops.quantize(doubled, bits=bits, group_size=16)
    assert np.array_equal(pairs[0], singles[0])
    assert np.array_equal(pairs[1], singles[1][..., ::2])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_products(bits, transpose, dtype):
    N, K = 70, 1120
    packed = ops.quantize(normal((N, K), 1, dtype), bits=bits, group_size=16)
    w = decoded(packed, bits)
    for M in (1, 5, 17, 300):
        x = normal((M, K if transpose else N), M, dtype)
        wide = to_float32(x, dtype).astype(np.float64)
        y, magnitude = (a @ (b.T if transpose else b) for a, b in ((wide, w), (np.abs(wide), np.abs(w) + 4)))
        got = ops.quantized_matmul(x, *packed, transpose=transpose, bits=bits, group_size=16)
        # Sums of so many float32 products, in any order, rounded once.
        bound = (x.shape[1] + 8) * 2.0**-24 * magnitude + (2.0**-8 if dtype == "BF16" else 0) * np.abs(y) + 1e-7
        assert (np.abs(to_float32(got, dtype) - y) <= bound).all()


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_gathered_products(bits, transpose):
    packed = ops.quantize(normal((4, 24, 96), 1), bits=bits, group_size=16)
    x, experts = normal((5, 2, 96 if transpose else 24), 2), np.array([3, 0, 0, 1, 2])
    w = decoded(packed, bits)[experts]
    got = ops.gather_quantized_matmul(x, *packed, experts, transpose=transpose, bits=bits, group_size=16)
    expected = x @ (w.swapaxes(1, 2) if transpose else w)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [to_numpy, to_mlx])
def test_mlx_is_never_chosen_and_refuses_when_asked_for(kind, monkeypatch):
    w, x = kind(normal((8, 64), 1)), kind(normal((2, 64), 2))
    grid = {"bits": 4, "group_size": 16}
    packed = ops.quantize(w, **grid)
    stack, batch, experts = [a[None] for a in packed], x[:, None], kind(np.zeros(2, np.uint32).view(np.int32))
    calls = (
        lambda **how: ops.quantize(w, **grid, **how),
        lambda **how: ops.dequantize(*packed, **grid, **how),
        lambda **how: ops.quantized_matmul(x, *packed, **grid, **how),
        lambda **how: ops.gather_quantized_matmul(batch, *stack, experts, **grid, **how),
    )
    for name in ("quantize", "dequantize", "quantized_matmul", "gather_qmm"):
        monkeypatch.setattr(mx, name, None)
    for call in calls:
        result = call()
        assert isinstance(result[0] if isinstance(result, tuple) else result, type(x))
        with pytest.raises(BackendError, match="no kernels for groups of 16, only for 32, 64, 128") as refused:
            call(backend="mlx")
        assert str(refused.value).partition(":")[0] in (
            "quantize",
            "dequantize",
            "quantized_matmul",
            "gather_quantized_matmul",
        )


def test_files_do_not_hold_them():
    with pytest.raises(FormatError, match="group_size must be one of 32, 64, 128, got 16"):
        geometry.validate_affine(4, 16)
    with pytest.raises(FormatError, match="group_size must be one of 32, 64, 128, got 16"):
        geometry.bpw(QuantSpec(4, 16), "F16")
    with pytest.raises(FormatError, match="group_size must be one of 32, 64, 128, got 16"):
        geometry.affine_bytes((8, 64), QuantSpec(4, 16), "F16")
    assert geometry.largest_group(48, 128) is None
    geometry.validate_affine(4, 16, geometry.OPS_GROUP_SIZES)
    with pytest.raises(FormatError, match="come in pairs"):
        geometry.validate_width(48, 4, 16, geometry.OPS_GROUP_SIZES)
