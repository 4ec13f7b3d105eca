"""--tune: what gradient steps make of a model's codes, whole conversions and the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architecture_zoo
import numpy as np
import pytest
import tiny
from command import mlxq
from test_calibrated_conversion import ENOUGH, divergence, files, logits_by_stock_mlx_lm, make, run, some_words

from mlxq.conversion import convert, tuning
from mlxq.conversion.calibration import Calibration
from mlxq.errors import Cancelled, PlanError
from mlxq.types import CancelToken


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_words(0, 1000))
    return path


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is noted of each block."""
    found: list[dict[str, Any]] = []
    of_block = tuning.Tuning.of_block

    def seen(*args: Any) -> Any:
        codes, notes = of_block(*args)
        found.extend(notes.get("tuned", {}).values())
        assert bool(codes) == any(n["after"] < n["before"] for n in notes.get("tuned", {}).values())
        return codes, notes

    monkeypatch.setattr(tuning.Tuning, "of_block", seen)
    return found


def test_two_bits_lose_clearly_less_and_stock_mlx_lm_loads_them(
    tmp_path: Path, text: Path, noted: list[dict[str, Any]]
) -> None:
    source = make(tmp_path / "source")
    expected, lost = logits_by_stock_mlx_lm(source), []
    for steps in (0, 40):
        result = run(source, tmp_path / str(steps), text, bits=2, method="search", tune=steps, **ENOUGH)
        lost.append(divergence(expected, logits_by_stock_mlx_lm(tmp_path / str(steps))))
    # What a search of each group leaves is far from the best for the block.
    assert len(noted) == 2
    assert all(n["after"] < 0.9 * n["before"] for n in noted)
    assert lost[1] < lost[0]
    assert any(note.startswith("2 of 2 blocks were tuned by 40 steps each") for note in result.notes)


def test_what_loses_more_is_not_kept(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, noted: list[dict[str, Any]]
) -> None:
    source = make(tmp_path / "source")
    run(source, tmp_path / "plain" / "out", text)
    monkeypatch.setattr(tuning, "RATES", tuning.Rates(0.5, 5.0, 0.0))
    result = run(source, tmp_path / "tuned" / "out", text, tune=2)
    assert noted
    assert all(n["after"] > n["before"] for n in noted)
    said = "\n".join(result.notes)
    assert "0 of 2 blocks were tuned" in said
    assert "2 blocks would lose more" in said
    plain, tuned = (files(tmp_path / n) for n in ("plain", "tuned"))
    assert plain["out/model.safetensors"] == tuned["out/model.safetensors"]


@pytest.mark.filterwarnings("ignore:.*goes on from there")
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source")
    run(source, tmp_path / "a" / "out", text, tune=4)
    cancel, visit = CancelToken(), Calibration._visit

    def stop(self: Calibration, block: Any, activations: Any) -> None:
        if block.index == 1:
            cancel.cancel()
        visit(self, block, activations)

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_visit", stop)
        with pytest.raises(Cancelled):
            run(source, tmp_path / "b" / "out", text, tune=4, cancel=cancel)
    visited: list[int] = []
    quantize = Calibration._quantize_block
    with monkeypatch.context() as patch:
        patch.setattr(
            Calibration,
            "_quantize_block",
            lambda self, block, *a: visited.append(block.index) or quantize(self, block, *a),
        )
        run(source, tmp_path / "b" / "out", text, tune=4)
    assert visited == [1]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_scaled_channels_are_tuned_too(tmp_path: Path, text: Path, noted: list[dict[str, Any]]) -> None:
    source = make(tmp_path / "source")
    run(source, tmp_path / "out", text, method="awq", bits=2, tune=20)
    assert noted
    assert all(n["after"] < n["before"] for n in noted)


def test_experts_are_tuned(tmp_path: Path, text: Path, noted: list[dict[str, Any]]) -> None:
    config = architecture_zoo.config_of("mixtral") | {"vocab_size": 320, "num_hidden_layers": 1}
    source = architecture_zoo.save(tmp_path / "source", config)
    tiny.write_tokenizer(source)
    result = run(source, tmp_path / "out", text, method="search", bits=2, tune=20, **ENOUGH)
    assert noted
    assert all(n["missing"] == [] and n["after"] < n["before"] for n in noted)
    assert np.isfinite(logits_by_stock_mlx_lm(tmp_path / "out")).all(), result.notes


def test_a_block_without_gradients_is_named(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError("[Primitive::vjp] Not implemented for Sort.")

    source = make(tmp_path / "source")
    monkeypatch.setattr(tuning.Tuning, "_backwards", refuse)
    result = run(source, tmp_path / "out", text, tune=2)
    why = "model.layers.0: [Primitive::vjp] Not implemented for Sort."
    assert f"2 blocks cannot be run backwards and kept the codes that were there: {why}" in result.notes


@pytest.mark.parametrize("steps", [-1, 2.5, True, 10**9])
def test_no_number_of_steps_is_refused(tmp_path: Path, steps: Any) -> None:
    with pytest.raises(PlanError, match=f"--tune {steps}: steps for each block are a whole number from 0 to"):
        convert(tmp_path / "none", tmp_path / "out", method="gptq", tune=steps)


@pytest.mark.parametrize("how", [{"method": "rtn"}, {"recipe": "portable"}])
def test_tuning_needs_a_text(tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="--tune goes on from what a text has chosen: give a --method of search, gptq"):
        convert(tmp_path / "none", tmp_path / "out", tune=5, **how)


def test_gguf_files_are_refused_in_one_line(tmp_path: Path) -> None:
    done = mlxq("convert", tmp_path / "none", "-o", tmp_path / "out.gguf", "--method", "gptq", "--tune", "5")
    assert done.returncode != 0
    assert "--tune is for an MLX directory" in done.stderr
