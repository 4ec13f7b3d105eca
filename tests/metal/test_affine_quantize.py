"""`dequantize` and `quantize`: every bit as the references have it."""

from __future__ import annotations

import affine_cases
import covering
import mlx.core as mx
import mlx_kernels
import numpy as np
import pytest

from mlxq.formats import affine
from mlxq.formats.geometry import AFFINE_BITS
from mlxq.ops import metal_backend
from mlxq.ops.arrays import to_numpy

GROUPS = (16, 32, 64, 128)
QUICK = [(2, 16, "f16"), (3, 64, "bf16"), (4, 64, "f32"), (5, 32, "f16"), (6, 128, "f32"), (8, 16, "bf16")]
SWEEP = covering.covering(AFFINE_BITS, GROUPS, list(affine_cases.DTYPES))


def cases() -> list:
    slow = [pytest.param(*c, marks=pytest.mark.slow) for c in SWEEP if c not in QUICK]
    return [pytest.param(*c) for c in QUICK] + slow


def reconstructed(packed: affine_cases.Packed, bits: int, group_size: int) -> np.ndarray:
    """`formats.affine.dequantize`, with every group of 16 as a group of 32's half."""
    codes = affine.unpack(np.asarray(packed.w_q), bits, packed.scales.shape[-1] * group_size)
    scales, biases = to_numpy(packed.scales), to_numpy(packed.biases)
    if group_size >= 32:
        return affine.dequantize(codes, scales, biases, bits, group_size)
    halves = codes.reshape(-1, group_size)
    doubled = np.concatenate([halves, halves], axis=-1)
    one_group = affine.dequantize(doubled, scales.reshape(-1, 1), biases.reshape(-1, 1), bits, 2 * group_size)
    return one_group[:, :group_size].reshape(codes.shape)


@pytest.mark.parametrize(("bits", "group_size", "dtype"), cases())
def test_dequantize_equals_the_reference_bit_for_bit(metal, bits, group_size, dtype):
    packed = affine_cases.packed((3, 384), bits, group_size, affine_cases.DTYPES[dtype])
    w_hat = metal_backend.dequantize(*packed, bits, group_size, None)
    np.testing.assert_array_equal(to_numpy(w_hat), reconstructed(packed, bits, group_size))
    if group_size != 16:
        expected = mx.dequantize(*packed, group_size=group_size, bits=bits, stream=mx.cpu)
        np.testing.assert_array_equal(to_numpy(w_hat), to_numpy(expected))


@pytest.mark.parametrize("dtype", affine_cases.DTYPES)
def test_dequantize_rounds_twice_whatever_the_compiler_may_fuse(metal, dtype):
    packed = affine_cases.packed((8, 512), 4, 64, affine_cases.DTYPES[dtype])
    with metal.options(contract="fast"):
        w_hat = metal_backend.dequantize(*packed, 4, 64, None)
    np.testing.assert_array_equal(to_numpy(w_hat), reconstructed(packed, 4, 64))


def test_dequantize_converts_after_it_rounds(metal):
    packed = affine_cases.packed((2, 64), 4, 64, mx.float16)
    widened = metal_backend.dequantize(*packed, 4, 64, "F32")
    assert widened.dtype == mx.float32
    np.testing.assert_array_equal(to_numpy(widened), reconstructed(packed, 4, 64).astype(np.float32))


def weights(group_size: int, dtype: mx.Dtype) -> mx.array:
    """Groups of every kind: normal, all positive, all negative, zeros, tiny, one outlier, ties of both ends."""
    w = np.random.default_rng(3).normal(size=(9, 3 * group_size)).astype(np.float32)
    w[1], w[2] = np.abs(w[1]), -np.abs(w[2])
    w[3] = 0
    w[4] *= 1e-9
    w[5, ::group_size] = 40
    w[6] = np.sign(w[6])
    w[7] = np.round(w[7] * 4) / 4
    return mx.array(np.concatenate([w, w[::-1]])[:, : 3 * group_size // 32 * 32]).astype(dtype)


@pytest.mark.parametrize(("bits", "group_size", "dtype"), cases())
def test_quantize_equals_mlx_kernel_byte_for_byte(metal, bits, group_size, dtype):
    if group_size == 16:
        w = weights(32, affine_cases.DTYPES[dtype])
        own = metal_backend.quantize(w, bits, group_size)
        # mlx has no groups of 16: each, written twice, is one of 32.
        doubled = mx.concatenate([w.reshape(-1, 16)] * 2, axis=-1)
        theirs, _ = mlx_kernels.quantize(doubled, bits, 32)
        codes = affine.unpack(np.asarray(theirs[0]).view(np.uint32), bits, 32)[:, :16].reshape(w.shape)
        np.testing.assert_array_equal(np.asarray(own[0]), affine.pack(np.ascontiguousarray(codes), bits))
    else:
        w = weights(group_size, affine_cases.DTYPES[dtype])
        own = metal_backend.quantize(w, bits, group_size)
        theirs, _ = mlx_kernels.quantize(w, bits, group_size)
        np.testing.assert_array_equal(np.asarray(own[0]).view(np.uint8), np.asarray(theirs[0]))
    for mine, other in zip(own[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(to_numpy(mine).reshape(-1), to_numpy(other).reshape(-1))


def test_quantize_round_trips_what_lies_on_its_grid(metal):
    packed = affine_cases.packed((4, 128), 4, 64, mx.float32)
    w_hat = metal_backend.dequantize(*metal_backend.quantize(normalized(packed), 4, 64), 4, 64, None)
    np.testing.assert_allclose(np.asarray(w_hat), np.asarray(normalized(packed)), atol=1e-6)


def normalized(packed: affine_cases.Packed) -> mx.array:
    """Weights 0 ... 15 times a power of two: the grid of `quantize` holds them exactly."""
    codes = affine.unpack(np.asarray(packed.w_q), 4, 128)
    codes[:, ::64], codes[:, 1::64] = 0, 15
    return mx.array(codes.astype(np.float32) / 8)


def test_stacks_and_empty_tensors_keep_their_shapes(metal):
    w = affine_cases.normal((2, 3, 64), mx.float16)
    w_q, scales, biases = metal_backend.quantize(w, 3, 32)
    assert (w_q.shape, scales.shape, biases.shape) == ((2, 3, 6), (2, 3, 2), (2, 3, 2))
    assert metal_backend.dequantize(w_q, scales, biases, 3, 32, None).shape == w.shape
    assert metal_backend.quantize(mx.zeros((0, 64)), 4, 64)[0].shape == (0, 8)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_lane_orders_agree_without_findings(metal, order):
    w = weights(64, mx.float32)
    with metal.options(order=order):
        packed = metal_backend.quantize(w, 5, 64)
        w_hat = metal_backend.dequantize(*packed, 5, 64, None)
    np.testing.assert_array_equal(
        np.asarray(w_hat), np.asarray(mx.dequantize(*packed, group_size=64, bits=5, stream=mx.cpu))
    )
