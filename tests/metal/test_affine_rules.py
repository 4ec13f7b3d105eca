"""What the affine kernels refuse, and that they refuse it before a launch; names and texts of kernels."""

from __future__ import annotations

import re

import affine_cases
import mlx.core as mx
import pytest

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.ops import metal_source


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    """A launch fails a test of this file."""

    def refuse(**arguments):
        raise AssertionError(f"launched {arguments['name']}")

    monkeypatch.setattr(mx.fast, "metal_kernel", refuse)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)


def product(x=None, bits=4, group_size=32, transpose=True, **changed):
    arrays = affine_cases.packed((8, 64), 4, 32, mx.float16)._replace(**changed)
    x = affine_cases.normal((2, 64), mx.float16) if x is None else x
    return ops.quantized_matmul(x, *arrays, transpose=transpose, bits=bits, group_size=group_size, backend="metal")


def gathered(x=None, indices=None, **changed):
    arrays = affine_cases.packed((3, 8, 64), 4, 32, mx.float16)._replace(**changed)
    x = affine_cases.normal((2, 1, 64), mx.float16) if x is None else x
    indices = mx.array([0, 2], mx.uint32) if indices is None else indices
    return ops.gather_quantized_matmul(x, *arrays, indices, **GRID, backend="metal")


def quantized(w, group_size=32):
    return ops.quantize(w, bits=4, group_size=group_size, backend="metal")


def decoded(scales, dtype=None):
    return ops.dequantize(mx.zeros((8, 8), mx.uint32), scales, scales, **GRID, dtype=dtype, backend="metal")


GRID = {"bits": 4, "group_size": 32}
HALVES = mx.zeros((8, 4), mx.float16)

REFUSED = [
    (lambda: product(bits=7), "bits"),
    (lambda: product(group_size=24), "group_size"),
    (lambda: product(bits=True), "bits"),
    (lambda: product(x=mx.zeros((2, 32), mx.float16)), "x has 32 columns, but the weights multiply 64"),
    (lambda: product(x=mx.zeros((2, 64), mx.int32)), "x must be float32, float16 or bfloat16"),
    (lambda: product(x=mx.zeros((2, 64), mx.float16), transpose=False), "x has 64 columns, but the weights multiply 8"),
    (lambda: product(w_q=mx.zeros((8, 8), mx.int32)), "w_q must be uint32"),
    (lambda: product(w_q=mx.zeros((8, 7), mx.uint32)), "the words of a row hold 56 codes, but its scales are for 64"),
    (
        lambda: product(w_q=mx.zeros((1, 8, 8), mx.uint32), scales=HALVES[None, :, :2], biases=HALVES[None, :, :2]),
        "3 axes",
    ),
    (lambda: product(scales=mx.zeros((8, 2), mx.float32)), "scales and biases must have one dtype"),
    (lambda: product(biases=mx.zeros((8, 1), mx.float16)), "must agree in all axes but the last"),
    (lambda: product(group_size=16), "the words of a row hold 64 codes, but its scales are for 32"),
    (lambda: product(group_size=16, scales=HALVES[:, :3], biases=HALVES[:, :3]), "groups of 16 come in pairs"),
    (lambda: gathered(x=mx.zeros((64,), mx.float16)), "axes"),
    (lambda: gathered(indices=mx.array([0.0, 1.0])), "rhs_indices must be integers"),
    (lambda: gathered(indices=mx.array([0, 1, 2], mx.uint32)), "do not broadcast"),
    (lambda: gathered(w_q=mx.zeros((8, 8), mx.uint32), scales=HALVES[:, :2], biases=HALVES[:, :2]), "2 axes"),
    (lambda: quantized(mx.zeros((2, 48))), "does not divide into groups of 32"),
    (lambda: quantized(mx.zeros((2, 48)), 16), "groups of 16 come in pairs"),
    (lambda: quantized(mx.zeros((64,))), "at least 2 dimensions"),
    (lambda: quantized(mx.zeros((2, 64), mx.uint8)), "float32, float16 or bfloat16"),
    (lambda: decoded(HALVES), "hold 64 codes"),
    (lambda: decoded(HALVES[:, :2], "F8"), "dtype"),
]


@pytest.mark.parametrize(("call", "rule"), REFUSED, ids=[rule for _, rule in REFUSED])
def test_bad_input_is_refused_with_its_rule(call, rule):
    with pytest.raises(FormatError, match=re.escape(rule)) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_names_encode_the_template():
    name = metal_source.kernel_name("affine_qmv", mx.float16, mx.float16, mx.float16, gs=64, b=4)
    assert name == "affine_qmv_float16_gs_64_b_4"
    mixed = metal_source.kernel_name("affine_qmv", mx.bfloat16, mx.float16, mx.float32, gs=16, b=3)
    assert mixed == "affine_qmv_bfloat16_float16_float32_gs_16_b_3"


def test_headers_are_joined_after_what_they_include_and_once():
    text = metal_source.header("affine_gather")
    assert '#include "' not in text
    order = [text.index(f) for f in ("load_words(", "affine_code(", "affine_qmm_t_tile(", "void affine_gather_qmv(")]
    assert order == sorted(order)
    assert text.count("sum_lanes(thread") == 1


def test_an_unknown_header_says_its_path():
    with pytest.raises(BackendError, match=r"no_such\.h"):
        metal_source.header("no_such")


def test_headers_stay_within_their_budget():
    for path in metal_source.metal_directory().glob("*.h"):
        assert len(path.read_text().splitlines()) <= 400, path.name
