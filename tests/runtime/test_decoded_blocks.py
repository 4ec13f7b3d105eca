"""Matrices in ggml blocks that are no affine grid: decoded when loaded, in half the memory where that is scarce."""

import mlx.core as mx
import numpy as np
import pytest

from mlxq.runtime import weights
from mlxq.types import TensorInfo

NAME = "model.layers.0.mlp.down_proj.weight"
INFO = TensorInfo(NAME, (40, 256), "Q6_K", 40 * 210, module="linear")


class Source:
    """What `weights` asks of a `ParameterMap`; remembers how much was read at once."""

    def __init__(self, w):
        self.w = w
        self.largest = 0

    def read(self, name, rows=None):
        part = self.w if rows is None else self.w[rows]
        self.largest = max(self.largest, part.size)
        return part.copy()


@pytest.fixture
def source():
    return Source(np.random.default_rng(0).normal(0, 0.02, INFO.shape).astype(np.float32))


def test_decoded_weights_are_kept_in_float16_and_read_in_parts(source, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 7 * 256)
    array = weights._arrays(INFO, source, mx.float32, widen=False)[NAME]
    assert array.dtype == mx.float16
    assert source.largest == 7 * 256
    np.testing.assert_array_equal(np.array(array), source.w.astype(np.float16))


def test_decoded_weights_are_widened_when_memory_allows(source):
    array = weights._arrays(INFO, source, mx.float32, widen=True)[NAME]
    assert array.dtype == mx.float32
    np.testing.assert_array_equal(np.array(array), source.w)


def test_weights_beyond_float16_stay_float32(source):
    source.w[3, 4] = 1e5
    array = weights._arrays(INFO, source, mx.float32, widen=False)[NAME]
    assert array.dtype == mx.float32
    np.testing.assert_array_equal(np.array(array), source.w)


def test_on_a_gpu_they_take_the_compute_dtype(source):
    assert weights._arrays(INFO, source, mx.bfloat16, widen=False)[NAME].dtype == mx.bfloat16
