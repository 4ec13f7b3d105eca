"""Files of what each matrix gets: the same plan again, by way of the rules that a person could have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from mlxq.conversion import convert
from mlxq.conversion.plan_file import FORMAT, PlanFile
from mlxq.errors import OutputError, PlanError

SHAPES = {"hidden_size": 64, "intermediate_size": 128, "eos_token_id": 257, "bos_token_id": 258}
TEXT = " ".join(str(i) for i in np.random.default_rng(0).integers(0, 1000, 500))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plans")
    tiny.add_merge(tiny.make_model(directory / "source", **SHAPES))
    (directory / "text.txt").write_text(TEXT)
    return directory


def run(place: Path, output: Path, **options: Any) -> Any:
    asked = {"calib": place / "text.txt", "calib_sequences": 8, "calib_length": 64, "verify": False}
    return convert(place / "source", output, **asked | options)


def choices(result: Any) -> list[tuple[str, str, str, str, str]]:
    return [(p.info.name, p.action, str(p.spec), p.dtype, p.method) for p in result.plan.tensors]


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_plan_by_budget_is_made_again(tmp_path: Path, place: Path, name: str) -> None:
    """The same choices, without measuring what bits cost."""
    path = tmp_path / "plan.json"
    first = run(
        place,
        tmp_path / "a" / name,
        target_bpw=5,
        plan=path,
        tensor_types=("v_proj=8:32" if name == "out" else "attn_v=Q8_0"),
    )
    written = path.read_bytes()
    again = run(place, tmp_path / "b" / name, plan=path)
    assert choices(again) == choices(first)
    assert path.read_bytes() == written
    assert again.plan.dtype == first.plan.dtype
    assert again.plan.bpw == first.plan.bpw
    assert len(json.loads(written)["tensors"]) == 16


def test_what_stays_float_and_exceptions(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "plan.json"
    first = run(place, tmp_path / "a", bits=3, plan=path, keep="lm_head", dry_run=True)
    assert json.loads(path.read_text())["tensors"]["lm_head.weight"] == "float"
    again = run(place, tmp_path / "a", plan=path, dry_run=True)
    assert choices(again) == choices(first)
    other = run(place, tmp_path / "a", plan=path, tensor_types="layers.0.mlp.up_proj=8:32", dry_run=True)
    changed = [b for a, b in zip(choices(first), choices(other), strict=True) if a != b]
    assert [c[:3] for c in changed] == [("model.layers.0.mlp.up_proj.weight", "quantize", "8-bit group 32")]
    assert not (tmp_path / "a").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "plan.json"
    run(place, tmp_path / "a", bits=3, plan=path, dry_run=True)
    with pytest.raises(PlanError, match="says already what each matrix gets"):
        run(place, tmp_path / "a", plan=path, target_bpw=5)
    with pytest.raises(PlanError, match="a plan for an MLX directory, not for a GGUF file"):
        run(place, tmp_path / "a.gguf", plan=path)
    deep = tiny.make_model(tmp_path / "deep", **SHAPES | {"num_hidden_layers": 3})
    with pytest.raises(PlanError, match=r"says nothing of model\.layers\.2.*another model"):
        convert(deep, tmp_path / "a", plan=path)
    flat = tiny.make_model(tmp_path / "flat", **SHAPES | {"num_hidden_layers": 1})
    with pytest.raises(PlanError, match="matches no tensor"):
        convert(flat, tmp_path / "a", plan=path)
    with pytest.raises(OutputError, match="cannot write"):
        run(place, tmp_path / "a", bits=3, plan=tmp_path / "none" / "plan.json", dry_run=True)
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "deep", "flat"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        *(
            json.dumps(c).encode()
            for c in (
                {"format": "mlxq plan 9", "kind": "mlx", "tensors": {}},
                {"format": FORMAT, "kind": "mlx", "tensors": []},
                {"format": FORMAT, "kind": "mlx", "tensors": {"a": "4"}},
                {"format": FORMAT, "kind": "mlx", "tensors": {"a": "Q4"}},
                {"format": FORMAT, "kind": "mlx", "tensors": {"a": None}},
            )
        ),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json: not a plan") as e:
        PlanFile.read(tmp_path / "plan.json")
    assert "\n" not in str(e.value)
