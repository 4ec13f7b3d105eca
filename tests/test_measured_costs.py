"""Measured costs, and their file: what is written is read again, and anything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architecture_zoo
import numpy as np
import pytest

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Moments
from mlxq.calibration.sensitivity import Sensitivity
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion.cost_file import FORMAT, Costs
from mlxq.conversion.costs import measure_costs
from mlxq.errors import OutputError, PlanError
from mlxq.plan.planner import PlanOptions, make_plan
from mlxq.types import CancelToken, QuantSpec

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


def test_experts_some_at_a_time_cost_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The busiest stand for all; those that have no room at once are seen in the turns that hold them."""
    config = architecture_zoo.config_of("mixtral") | {"num_hidden_layers": 1, "num_local_experts": 8}
    source = architecture_zoo.save(tmp_path / "source", config | {"num_experts_per_tok": 1})
    held: list[int] = []
    empty = Moments.empty

    def recorded(n: int, K: int, some: range | None = None) -> Moments:
        held.append(4 * K * K * len(range(n) if some is None else some))
        return empty(n, K, some)

    monkeypatch.setattr(Moments, "empty", recorded)
    sequences = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 16)).astype(np.int32)
    found = []
    with open_checkpoint(source) as checkpoint:
        parameters = ParameterMap(checkpoint)
        plan = make_plan(parameters.tensors.values(), PlanOptions(4, 32), float_modules=parameters.float_modules)
        for room in (None, 1 << 16):
            held.clear()
            found.append(measure_costs(parameters, plan, sequences, None, CancelToken(), room=room))
            # 64 and 128 inputs: 16 and 65 kB an expert; one is always held.
            assert (max(held) > 4 << 16) if room is None else (max(held) <= 1 << 16)
    assert found[0].by_tensor.keys() == found[1].by_tensor.keys()
    assert any("switch_mlp" in name and costs for name, costs in found[0].by_tensor.items())
    for name, costs in found[0].by_tensor.items():
        assert found[1].by_tensor[name] == pytest.approx(costs, rel=1e-5), name
