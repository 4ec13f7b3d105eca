"""Sequences that are held out: nothing is fitted to them, and they decide which method a matrix keeps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxq.calibration.activations import Activations
from mlxq.calibration.observe import Moments
from mlxq.conversion.coders import AffineCoder
from mlxq.conversion.matrices import Found, Kept, Matrices, held_out, held_out_errors, other_methods
from mlxq.types import QuantSpec, TensorInfo, TensorPlan

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 12, 16, 31, 64, 128])
def test_one_in_sixteen_is_held_out_and_one_of_four(n: int) -> None:
    aside = held_out(n)
    assert aside.shape == (n,)
    assert aside.sum() == (0 if n < 4 else max(1, round(n / 16)))


def test_marked_sequences_come_by_themselves() -> None:
    activations = Activations(7, 3)
    for i, part in enumerate(activations.chunks):
        activations[i] = mx.broadcast_to(
            mx.arange(part.start, part.stop)[:, None, None], (part.stop - part.start, 2, 2)
        )
    aside = np.array([0, 1, 0, 1, 1, 1, 0], bool)
    seen = {True: [], False: []}
    for which, hidden, marked in activations.apart(aside):
        assert np.array_equal(np.array(hidden[:, 0, 0]), which)
        seen[marked] += which.tolist()
    assert seen == {True: [1, 3, 4, 5], False: [0, 2, 6]}


def rows(n: int, K: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, K)) * np.exp(rng.standard_normal(K))).astype(np.float32)


def test_rows_put_aside_are_in_no_sum() -> None:
    moments, a, b = Moments.empty(1, 64), rows(50), rows(30, seed=1)
    moments.add(mx.array(a), None)
    moments.add(mx.array(b), None, None, 20)
    assert moments.counts.tolist() == [50]
    assert np.allclose(moments.hessian(), a.T @ a / 50, rtol=1e-4, atol=1e-4)
    kept = moments.rows_aside()
    assert kept.shape == (20, 64)
    assert all((np.abs(b - row).max(axis=1) == 0).any() for row in kept)
    assert len(np.unique(kept, axis=0)) == 20


def test_rows_put_aside_are_weighted_and_go_to_their_experts() -> None:
    x, weights = rows(40), np.linspace(0.5, 1.5, 40).astype(np.float32)
    single = Moments.empty(1, 64)
    single.add(mx.array(x), None, weights, 100)
    assert np.allclose(single.rows_aside(), x * np.sqrt(weights)[:, None], rtol=1e-6)
    experts = np.arange(40) % 3
    stack = Moments.empty(4, 64, range(1, 4))
    stack.add(mx.array(x), experts, None, 100)
    assert [len(stack.rows_aside(i)) for i in (1, 2, 3)] == [13, 13, 0]
    assert np.array_equal(stack.rows_aside(2), x[experts == 2])
    assert 0 not in stack.aside


def test_errors_are_those_of_what_is_held_out_if_that_is_enough() -> None:
    moments, fitted, e = Moments.empty(1, 64), rows(200), rows(5, seed=2)
    moments.add(mx.array(fitted), None)
    of_fitted = np.square(fitted @ e.T).sum() / 200
    assert held_out_errors(moments, 0)(e) == pytest.approx(of_fitted, rel=1e-4)
    moments.add(mx.array(rows(8, seed=3)), None, None, 100)
    assert held_out_errors(moments, 0)(e) == pytest.approx(of_fitted, rel=1e-4)
    more = np.concatenate([rows(8, seed=3), rows(40, seed=4)])
    moments.add(mx.array(more[8:]), None, None, 100)
    assert held_out_errors(moments, 0)(e) == pytest.approx(np.square(more @ e.T).sum() / 48, rel=1e-4)


class Folded:
    """Weights of one matrix, not scaled."""

    def __init__(self, w: np.ndarray):
        self.w = w

    def read(self, name: str, some: slice | None = None) -> np.ndarray:
        return self.w

    def columns(self, name: str, i: int) -> None:
        return None

    def is_scaled(self, name: str) -> bool:
        return False

    def undivided(self, rows: np.ndarray, name: str, i: int) -> np.ndarray:
        return rows


def made(fitted: np.ndarray, other: np.ndarray) -> Kept:
    w = rows(32, seed=7)
    info = TensorInfo(NAME, w.shape, "F32", w.nbytes, module="linear")
    plan = TensorPlan(info, "quantize", QuantSpec(3, 64), "F32", "", "gptq")
    matrices = Matrices({NAME: plan}, AffineCoder(), Folded(w), sweeps=1)
    moments = Moments.empty(1, w.shape[1])
    moments.add(mx.array(fitted), None)
    moments.add(mx.array(other), None, None, len(other))
    return matrices.made(NAME, 0, moments, matrices.curvature_of(moments, 0, [NAME]))


def test_what_is_held_out_chooses_the_method() -> None:
    """Fitted to inputs of the same kind, error feedback wins; to others, it may lose even to rounding."""
    mix = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    x = rows(2000) @ mix
    same = made(x[:1500], x[1500:])
    assert same.method == "gptq"
    assert same.errors[0] < 0.7 * same.errors[1]
    # Inputs that live where those fitted to are nearly nothing.
    u = np.linalg.svd(x)[2].astype(np.float32)
    other = made(x[:1500] @ u[:4].T @ u[:4], rows(500, 4, seed=3) @ u[-4:])
    assert other.method in ("search", "rtn")
    assert other.errors[0] <= other.errors[1]


def test_other_methods_are_counted_and_said() -> None:
    found = Found()
    for name, method in (("b", "rtn"), ("b", "gptq"), ("c", "search"), ("a", "rtn")):
        found.add(name, "gptq", Kept(np.zeros(1), method, np.array([0.1, 0.2])))
    assert found.errors["b"] == pytest.approx([0.2, 0.4])
    searched, rounded = other_methods(found.notes()["instead"])
    assert searched.startswith("1 matrix is searched")
    assert searched.endswith(": c")
    assert rounded.startswith("2 matrices are rounded to nearest")
    assert rounded.endswith(": a")
    assert other_methods({}) == []
