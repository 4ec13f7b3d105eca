"""Every rule of every operation on packed weights: broken, it is an error that says so, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlxq import ops
from mlxq.errors import FormatError
from mlxq.ops import dispatch
from mlxq.ops.arrays import to_mlx


def zeros(*shape: int, dtype: str = "float16") -> np.ndarray:
    return np.zeros(shape, dtype)


class Case(NamedTuple):
    """An operation and arguments that it accepts: arrays, and the others."""

    op: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    others: dict[str, Any]


GRID = {"bits": 4, "group_size": 32}
PACKED = {"w_q": zeros(8, 8, dtype="uint32"), "scales": zeros(8, 2), "biases": zeros(8, 2)}
STACK = {name: np.stack([a] * 3) for name, a in PACKED.items()}
INDICES = zeros(2, dtype="uint32")
BLOCKS = zeros(8, 288, dtype="uint8")  # two blocks of Q4_K a row
CASES = {
    "quantize": Case(ops.quantize, {"w": zeros(8, 64)}, GRID),
    "dequantize": Case(ops.dequantize, PACKED, GRID),
    "quantized_matmul": Case(ops.quantized_matmul, {"x": zeros(2, 64), **PACKED}, GRID),
    "gather_quantized_matmul": Case(
        ops.gather_quantized_matmul, {"x": zeros(2, 1, 64), **STACK, "rhs_indices": INDICES}, GRID
    ),
    "block_dequantize": Case(ops.block_dequantize, {"blocks": BLOCKS}, {"type_name": "Q4_K"}),
    "block_matmul": Case(ops.block_matmul, {"x": zeros(2, 512), "blocks": BLOCKS}, {"type_name": "Q4_K"}),
    "gather_block_matmul": Case(
        ops.gather_block_matmul,
        {"x": zeros(2, 1, 512), "blocks": np.stack([BLOCKS] * 3), "rhs_indices": INDICES},
        {"type_name": "Q4_K"},
    ),
}

FLOATS = "must be float32, float16 or bfloat16"
LEGAL_BITS, LEGAL_GROUPS = "affine bits must be one of 2, 3, 4, 5, 6, 8", "group_size must be one of 16, 32, 64, 128"
AFFINE = ("quantize", "dequantize", "quantized_matmul", "gather_quantized_matmul")
HELD, PRODUCTS, GATHERS = AFFINE[1:], (*AFFINE[2:], "block_matmul"), ("gather_quantized_matmul", "gather_block_matmul")
WITH_BLOCKS = ("block_dequantize", "block_matmul", "gather_block_matmul")

#: Operations, the arguments that break a rule (arrays as functions of the legal one), and words of the rule.
BROKEN: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (AFFINE, {"bits": 7}, LEGAL_BITS),
    (AFFINE, {"bits": 1}, LEGAL_BITS),
    (AFFINE, {"bits": 4.0}, LEGAL_BITS),
    (AFFINE, {"bits": True}, LEGAL_BITS),
    (AFFINE, {"bits": None}, LEGAL_BITS),
    (AFFINE, {"group_size": 8}, LEGAL_GROUPS),
    (AFFINE, {"group_size": 48}, LEGAL_GROUPS),
    (AFFINE, {"group_size": 256}, LEGAL_GROUPS),
    (AFFINE, {"group_size": "32"}, LEGAL_GROUPS),
    (AFFINE, {"mode": "mxfp4"}, "mode must be 'affine', got 'mxfp4'"),
    (("quantize",), {"w": lambda w: w[:, :48]}, "a row of 48 weights does not divide into groups of 32"),
    (("quantize",), {"w": lambda w: w[:, :48], "group_size": 16}, "groups of 16 come in pairs"),
    (("quantize",), {"w": lambda w: w[:, :0]}, "a row of 0 weights"),
    (("quantize",), {"w": lambda w: w[0]}, "w must have at least 2 dimensions, but it has 1"),
    (("quantize",), {"w": lambda w: w.astype(np.int32)}, f"w {FLOATS} (uint16 bits in NumPy), got int32"),
    (HELD, {"w_q": lambda a: a.view(np.int32)}, "w_q must be uint32 words, got int32"),
    (HELD, {"w_q": lambda a: a.astype(np.float32)}, "w_q must be uint32 words, got F32"),
    (HELD, {"w_q": lambda a: a[..., :7]}, "the words of a row hold 56 codes, but its scales are for 64"),
    (HELD, {"w_q": lambda a: a[..., :4, :]}, "must agree in all axes but the last"),
    (HELD, {"scales": lambda a: a.astype(np.int32)}, f"scales {FLOATS}"),
    (HELD, {"biases": lambda a: a.astype(np.float32)}, "scales and biases must have one dtype, got F16 and F32"),
    (HELD, {"biases": lambda a: a[..., :1]}, "must agree in all axes but the last"),
    (HELD, {"group_size": 64}, "the words of a row hold 64 codes, but its scales are for 128"),
    (HELD, {"bits": 8}, "the words of a row hold 32 codes, but its scales are for 64"),
    (
        HELD,
        {"group_size": 16, **dict.fromkeys(("scales", "biases"), lambda a: a[..., :1])},
        "groups of 16 come in pairs",
    ),
    (("dequantize",), {name: lambda a: a[0] for name in PACKED}, "w_q must have at least 2 dimensions"),
    (("dequantize",), {"dtype": "F64"}, "dtype must be one of F32, F16, BF16, got 'F64'"),
    (
        ("quantized_matmul",),
        {name: lambda a: a[None] for name in PACKED},
        "w_q must be [N, K * bits // 32], but it has 3",
    ),
    (GATHERS[:1], {name: lambda a: a[0] for name in PACKED}, "w_q must be [experts, N, K * bits // 32], but it has 2"),
    (PRODUCTS + GATHERS[1:], {"x": lambda x: x[..., :-1]}, "columns, but the weights multiply"),
    (PRODUCTS + GATHERS[1:], {"x": lambda x: x.astype(np.int32)}, f"x {FLOATS}"),
    (PRODUCTS + GATHERS[1:], {"x": lambda x: x[0, 0] if x.ndim == 2 else x[0, 0, 0]}, "x has no columns"),
    (("quantized_matmul",), {"transpose": False}, "x has 64 columns, but the weights multiply 8"),
    (GATHERS, {"x": lambda x: x[0, 0]}, "x must be [*batch, M, K], but it has 1 axes"),
    (GATHERS, {"rhs_indices": lambda i: i.astype(np.float32)}, "rhs_indices must be integers, got F32"),
    (GATHERS, {"rhs_indices": lambda i: np.zeros(3, np.uint32)}, "do not broadcast with rhs_indices"),
    (WITH_BLOCKS, {"type_name": "Q4_L"}, "ggml type 'Q4_L' is not known"),
    (WITH_BLOCKS, {"type_name": None}, "type_name must be the name of a ggml type, got None"),
    (WITH_BLOCKS, {"type_name": 12}, "type_name must be the name of a ggml type, got 12"),
    (WITH_BLOCKS, {"blocks": lambda b: b[..., :-1]}, "a row must be whole blocks of 144 bytes"),
    (WITH_BLOCKS, {"type_name": "Q6_K"}, "a row must be whole blocks of 210 bytes"),
    (WITH_BLOCKS, {"blocks": lambda b: b.view(np.int8)}, "blocks must be uint8 bytes, got int8"),
    (WITH_BLOCKS, {"blocks": lambda b: b.astype(np.float32)}, "blocks must be uint8 bytes, got F32"),
    (("block_matmul",), {"blocks": lambda b: b[0]}, "blocks must be [N, row_bytes], but it has 1 axes"),
    (GATHERS[1:], {"blocks": lambda b: b[0]}, "blocks must be [experts, N, row_bytes], but it has 2 axes"),
    (
        ("block_matmul", "gather_block_matmul"),
        {"blocks": lambda b: b[..., :144]},
        "columns, but the weights multiply 256",
    ),
    (("block_dequantize",), {"dtype": "float16"}, "dtype must be one of F32, F16, BF16, got 'float16'"),
]
BROKEN += [
    ((op,), {name: lambda a: a.tolist()}, f"{name} must be a NumPy or mlx array, got list")
    for op, case in CASES.items()
    for name in case.arrays
]
ROWS = [(op, broken, rule) for names, broken, rule in BROKEN for op in names]


def arguments(case: Case, broken: dict[str, Any], kind: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    given = {**case.arrays, **case.others}
    for name, value in broken.items():
        given[name] = value(given[name]) if callable(value) else value
    # Zero-dimensional pieces of NumPy arrays are scalars.
    given = {name: np.asarray(a) if isinstance(a, np.generic) else a for name, a in given.items()}
    return {name: kind(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}


@pytest.fixture
def nothing_computes(monkeypatch):
    """Every back end is to be had, and none may be used."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("something was computed")

    monkeypatch.setattr(ops, "_module", refuse)
    monkeypatch.setattr(ops, "_differentiable", refuse)
    monkeypatch.setattr(mx.fast, "metal_kernel", refuse)
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)


@pytest.mark.usefixtures("nothing_computes")
@pytest.mark.parametrize(("op", "broken", "rule"), ROWS, ids=[f"{op}-{rule}" for op, _, rule in ROWS])
def test_a_broken_rule_is_said_before_anything_is_computed(op, broken, rule):
    for kind in (np.asarray, to_mlx):
        for backend in (None, "numpy", "mlx", "metal"):
            with pytest.raises(FormatError) as refused:
                CASES[op].op(**arguments(CASES[op], broken, kind), backend=backend)
            message = str(refused.value)
            assert rule in message
            assert message.startswith(f"{op}: ")
            assert "\n" not in message


@pytest.mark.usefixtures("nothing_computes")
@pytest.mark.parametrize("op", CASES)
def test_without_a_broken_rule_it_would_have_been(op):
    for kind in (np.asarray, to_mlx):
        for backend in (None, "numpy", "mlx", "metal"):
            with pytest.raises(AssertionError, match="something was computed"):
                CASES[op].op(**arguments(CASES[op], {}, kind), backend=backend)


@pytest.mark.parametrize("op", CASES)
def test_no_rows_and_no_batch(op):
    """Nothing to multiply is no error."""
    case = CASES[op]
    first = next(iter(case.arrays))
    empty = {first: lambda a: a[:0]}
    if op == "dequantize":
        empty = dict.fromkeys(PACKED, lambda a: a[:0])
    if "rhs_indices" in case.arrays:
        empty["rhs_indices"] = lambda i: i[:0]
    for kind in (np.asarray, to_mlx):
        for backend in ("numpy", "mlx"):
            y = case.op(**arguments(case, empty, kind), backend=backend)
            assert all(a.shape[0] == 0 for a in (y if isinstance(y, tuple) else (y,)))
