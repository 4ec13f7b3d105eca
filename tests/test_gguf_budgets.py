"""GGUF files within a budget: ggml's types by what they cost, never above it; and what was measured, used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from llamacpp import LlamaCpp

from mlxq.conversion import convert, cost_file
from mlxq.conversion.cost_file import Costs
from mlxq.errors import PlanError
from mlxq.types import QuantSpec

#: Rows of whole super-blocks, but for those of the down projections: there are few types of 32.
SHAPES = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 3}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "wizards", "box", "jars")
TEXT = " ".join(WORDS[i] for i in np.random.default_rng(0).integers(0, len(WORDS), 600))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the costs of its types."""
    directory = tmp_path_factory.mktemp("budgets")
    tiny.add_merge(tiny.make_model(directory / "source", **SHAPES, eos_token_id=257, bos_token_id=258))
    (directory / "text.txt").write_text(TEXT)
    planned(directory, target_bpw=5, costs=directory / "costs")
    return directory


def run(place: Path, output: Path | None, **options: Any) -> Any:
    asked = {"calib": place / "text.txt", "calib_sequences": 12, "calib_length": 64, "verify": False}
    return convert(place / "source", output, **asked | options)


def planned(place: Path, **options: Any) -> Any:
    return run(place, place / "none.gguf", dry_run=True, **options)


def stored(path: Path) -> tuple[int, dict[str, str], int]:
    """Bytes of the tensors, their types, and `general.file_type`."""
    reader = gguf.GGUFReader(path)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return sum(int(t.n_bytes) for t in reader.tensors), types, reader.fields["general.file_type"].contents()


@pytest.mark.parametrize(
    "bpw", [pytest.param(3.5, marks=pytest.mark.slow), 4.5, pytest.param(6, marks=pytest.mark.slow)]
)
def test_budgets_are_met_closely(tmp_path: Path, place: Path, bpw: float) -> None:
    result = run(place, tmp_path / "m.gguf", target_bpw=bpw, method="search", costs=place / "costs")
    nbytes, types, number = stored(tmp_path / "m.gguf")
    budget = bpw * result.plan.n_weights / 8
    # Single steps of this model's matrices are up to 1.5 % of it: those of a real one far less.
    assert 0.985 * budget < nbytes <= budget
    assert nbytes == result.plan.nbytes
    assert types["output_norm.weight"] == "F32"
    down = {types[f"blk.{i}.ffn_down.weight"] for i in range(3)}
    assert down <= {"IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    others = {t for n, t in types.items() if "ffn_down" not in n and "norm" not in n}
    assert others <= {"Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert len(others | down) > 2
    assert gguf.LlamaFileType(number).name == f"MOSTLY_{result.plan.dtype}"
    assert any("llama.cpp's name for the nearest size" in n for n in result.plan.notes)


def test_llama_cpp_loads_a_mix_of_types(tmp_path: Path, place: Path) -> None:
    run(place, tmp_path / "m.gguf", target_bpw=4.7, costs=place / "costs")
    assert len(set(stored(tmp_path / "m.gguf")[1].values())) > 3
    model = LlamaCpp(tmp_path / "m.gguf")
    found = model.logprobs(model.tokenize("the quick brown fox", add_special=True), 20)
    assert len(found) == 20
    assert np.isfinite(list(found.values())).all()


def test_a_size_is_that_of_the_file(tmp_path: Path, place: Path) -> None:
    run(place, tmp_path / "m.gguf", target_size="600KB", method="search", costs=place / "costs")
    # What the table of tensors takes with its padding is taken at its most.
    assert 0.97 * 600e3 < (tmp_path / "m.gguf").stat().st_size <= 600e3


def test_exceptions_are_kept_and_impossible_budgets_say_the_smallest(tmp_path: Path, place: Path) -> None:
    asked = {"costs": place / "costs", "method": "search"}
    result = planned(place, target_bpw=5, tensor_types="attn_q=Q8_0", **asked)
    assert all(p.dtype == "Q8_0" for p in result.plan.tensors if "q_proj" in p.info.name)
    with pytest.raises(PlanError, match="cannot be met: the smallest possible is") as e:
        run(place, tmp_path / "m.gguf", target_bpw=2, **asked)
    smallest = float(str(e.value).split("(")[1].split(" bpw")[0])
    assert planned(place, target_bpw=smallest + 0.01, **asked).plan.bpw <= smallest + 0.01
    assert not list(tmp_path.iterdir())


def test_a_file_of_costs_holds_both_kinds(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kind takes no more than a pass forwards, and the sensitivities stay."""
    from mlxq.conversion import costs as measuring

    path = tmp_path / "costs"
    path.write_bytes((place / "costs").read_bytes())
    first = Costs.read(path)
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("run backwards again"))
    planned(place, target_bpw=5, costs=path)
    assert path.read_bytes() == (place / "costs").read_bytes()
    convert(place / "source", None, **options_of_mlx(place), costs=path)
    both = Costs.read(path)
    assert both.of_kind(str) == first.by_tensor
    assert both.by_tensor.keys() == first.by_tensor.keys()
    assert all(QuantSpec(4, 32) in costs for costs in both.by_tensor.values())
    for name, squares in first.sensitivity.squares.items():
        assert np.array_equal(both.sensitivity.squares[name], squares)


def options_of_mlx(place: Path) -> dict[str, Any]:
    text = {"calib": place / "text.txt", "calib_sequences": 12, "calib_length": 64}
    return text | {"target_bpw": 5, "dry_run": True}


def test_costs_of_another_text_or_model_are_refused(tmp_path: Path, place: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT[100:])
    with pytest.raises(PlanError, match="measured on another text"):
        convert(
            place / "source", None, **options_of_mlx(place) | {"calib": tmp_path / "other.txt"}, costs=place / "costs"
        )
    other = tiny.add_merge(tiny.make_model(tmp_path / "source", hidden_size=128, eos_token_id=257, bos_token_id=258))
    with pytest.raises(PlanError, match="measured on another model"):
        convert(other, None, **options_of_mlx(place), costs=place / "costs")


def test_gptq_weights_tokens_by_what_was_measured(tmp_path: Path, place: Path) -> None:
    for name, costs in (("a", None), ("b", place / "costs")):
        run(place, tmp_path / f"{name}.gguf", type="Q4_K_M", method="gptq", costs=costs)
    a, b = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("a", "b"))
    same = {t.name: np.array_equal(t.data, u.data) for t, u in zip(a, b, strict=True)}
    assert same["output_norm.weight"]
    assert not same["blk.0.ffn_up.weight"]
    assert not same["token_embd.weight"]
    with pytest.raises(PlanError, match="--costs is for a budget"):
        run(place, tmp_path / "c.gguf", type="Q4_K_M", method="rtn", costs=place / "costs")


def test_what_does_not_go_with_a_budget_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    both = [tmp_path / "a", tmp_path / "b.gguf"]
    with pytest.raises(PlanError, match="a budget is for one output"):
        convert(tmp_path / "none", both, recipe="portable", target_bpw=5)
    with pytest.raises(PlanError, match="leave --imatrix out"):
        convert(tmp_path / "none", both[1], imatrix=tmp_path / "m.dat", target_bpw=5)


def test_files_of_mlx_grids_alone_are_read(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs.read(place / "costs")
    old = Costs({"a": {QuantSpec(4, 64): 0.5}}, costs.sensitivity, "x")
    monkeypatch.setattr(cost_file, "FORMAT", "mlxq costs 2")
    old.write(tmp_path / "old")
    monkeypatch.undo()
    assert Costs.read(tmp_path / "old").by_tensor == old.by_tensor
