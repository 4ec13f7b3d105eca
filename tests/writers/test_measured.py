"""Errors of tensors, summed from chunks: nothing that changed is ever called unchanged."""

import math

import numpy as np
import pytest

from mlxq.types import TensorInfo, TensorPlan
from mlxq.writers.measured import MeasuredErrors


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-24, 1e-10, 1.0, 1e25])
def test_a_change_of_any_size_counts(size):
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    w[1, 2] = size
    changed = w.copy()
    changed[1, 2] = 0
    errors = MeasuredErrors()
    for rows in (slice(0, 2), slice(2, 4)):
        errors.add("w", w[rows], changed[rows])
    errors.add("same", w, w)
    expected = float(w[1, 2]) / math.sqrt(np.square(w, dtype=np.float64).sum())
    # Sums of 128 float32 squares.
    assert errors.relative_rmse["w"] == pytest.approx(expected, rel=1e-5)
    assert errors.relative_rmse["same"] == 0


def test_weights_of_zero_have_an_infinite_error_or_none():
    errors = MeasuredErrors()
    zeros = np.zeros((2, 8), np.float32)
    errors.add("same", zeros, zeros)
    errors.add("other", zeros, zeros + 1)
    assert errors.relative_rmse == {"same": 0, "other": math.inf}


def test_notes_name_the_worst_tensor_of_each_action():
    errors = MeasuredErrors()
    plans = []
    for name, action, loss in (("a", "keep", 0.1), ("b", "keep", 0.5), ("c", "repack", 0.2), ("d", "requantize", 0)):
        w = np.ones((1, 4), np.float32)
        errors.add(name, w, w + np.float32(loss))
        plans.append(TensorPlan(TensorInfo(name, w.shape, "F32", 16), action, None, "F16", ""))
    assert errors.notes(plans, {"requantize": "quantized anew", "keep": "rounded", "repack": "repacked"}) == [
        "2 tensors rounded; relative error up to 0.5, in b",
        "1 tensor repacked; relative error up to 0.2, in c",
    ]
