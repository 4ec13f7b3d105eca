"""The file of measured costs: what is written is read again, and anything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxq.calibration.sensitivity import Sensitivity
from mlxq.conversion.costs import FORMAT, Costs
from mlxq.errors import OutputError, PlanError
from mlxq.types import QuantSpec

NAME = "model.layers.0.mlp.up_proj.weight"


def some() -> Costs:
    rng = np.random.default_rng(0)
    sensitivity = Sensitivity(
        {NAME: rng.random(8), "experts": rng.random((3, 8))},
        {NAME: rng.random(12).astype(np.float32)},
        rng.random((4, 4)).astype(np.float32),
        12,
    )
    return Costs({NAME: {QuantSpec(4, 64): 0.25, QuantSpec(2, 32): 1e-9}, "experts": {}}, sensitivity, "digest")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    costs, path = some(), tmp_path / "costs"
    costs.write(path)
    found = Costs.read(path)
    assert found.by_tensor == costs.by_tensor
    assert found.text == "digest"
    assert found.sensitivity.n_tokens == 12
    for name, squares in costs.sensitivity.squares.items():
        assert np.array_equal(found.sensitivity.squares[name], squares)
    assert np.array_equal(found.sensitivity.embedding, costs.sensitivity.embedding)
    # float16 keeps 11 bits of the weights of tokens.
    weights = costs.sensitivity.token_weights[NAME]
    assert np.allclose(found.sensitivity.token_weights[NAME], weights, rtol=2.0**-11)
    assert [p.name for p in tmp_path.iterdir()] == ["costs"]


def archive(path: Path, head: Any, **arrays: np.ndarray) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    with open(path, "wb") as f:
        np.savez(f, head=np.frombuffer(text, np.uint8), **arrays)


GOOD = {"format": FORMAT, "text": "x", "tokens": 1, "tensors": {NAME: {"4:64": 0.5}}}
EMBEDDING = {"embedding": np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{",
        b"\xff",
        [],
        {},
        GOOD | {"format": "mlxq costs 99"},
        GOOD | {"tokens": "many"},
        GOOD | {"tensors": [1]},
        GOOD | {"tensors": {NAME: {"4": 0.5}}},
        GOOD | {"tensors": {NAME: {"4:64:1:2": 0.5}}},
        GOOD | {"tensors": {NAME: {"4:64": None}}},
    ],
)
def test_heads_that_are_none(tmp_path: Path, head: Any) -> None:
    archive(tmp_path / "costs", head, **EMBEDDING)
    with pytest.raises(PlanError, match="costs: not a file of measured costs") as e:
        Costs.read(tmp_path / "costs")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", b"\x93NUMPY\x01\x00" + bytes(100), bytes(1000)])
def test_files_that_are_no_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "costs").write_bytes(content)
    with pytest.raises(PlanError, match="not a file of measured costs"):
        Costs.read(tmp_path / "costs")


def test_archives_that_are_cut_or_hold_objects(tmp_path: Path) -> None:
    path = tmp_path / "costs"
    some().write(path)
    whole = path.read_bytes()
    for n in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(PlanError, match="not a file of measured costs"):
            Costs.read(path)
    archive(path, GOOD)
    with pytest.raises(PlanError, match="not a file of measured costs"):
        Costs.read(path)
    archive(path, GOOD, embedding=np.array([{}], object))
    with pytest.raises(PlanError, match="not a file of measured costs"):
        Costs.read(path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        some().write(tmp_path / "none" / "costs")
