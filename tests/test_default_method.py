"""The method where none is asked for: what a text has something to say of is calibrated, and what cannot be is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from command import mlxq
from numpy.testing import assert_array_equal

from mlxq.conversion import calibrated, convert, export
from mlxq.conversion.request import CalibrationRequest
from mlxq.errors import CalibrationError, OutputError, PlanError
from mlxq.runtime.memory import physical_memory
from mlxq.types import Progress

pytestmark = pytest.mark.real_default
NOTE = "method gptq, the default for 6 bits or fewer: about two passes over the calibration text"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is short, so that the built-in text is read in little time."""
    path = tmp_path_factory.mktemp("model") / "source"
    return tiny.add_merge(tiny.make_model(path, max_position_embeddings=16, num_hidden_layers=1, vocab_size=320))


def weights(path: Path) -> dict[str, np.ndarray]:
    return {k: np.array(v.astype(mx.float32)) for k, v in mx.load(str(path / "model.safetensors")).items()}


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)


def test_a_directory_is_what_gptq_makes_on_the_built_in_text(tmp_path: Path, source: Path) -> None:
    seen: list[Progress] = []
    result = convert(source, tmp_path / "default", verify=False, progress=seen.append)
    assert any(NOTE in n for n in result.plan.notes)
    assert "calibrate" in {e.stage for e in seen}
    for method in ("gptq", "rtn"):
        convert(source, tmp_path / method, method=method, verify=False)
    assert same(tmp_path / "default", tmp_path / "gptq")
    assert not same(tmp_path / "default", tmp_path / "rtn")
    options = json.loads((tmp_path / "default" / "mlxq.json").read_text())["options"]
    assert (options["method"], options["calibration"]["source"]) == ("gptq", "builtin")


def test_a_gguf_file_is_what_gptq_makes(tmp_path: Path, source: Path) -> None:
    result = convert(source, tmp_path / "default.gguf", type="Q4_0", verify=False)
    assert any(NOTE in n for n in result.plan.notes)
    for method in ("gptq", "rtn"):
        convert(source, tmp_path / f"{method}.gguf", type="Q4_0", method=method, verify=False)
    made = {name: (tmp_path / f"{name}.gguf").read_bytes() for name in ("default", "gptq", "rtn")}
    assert made["default"] == made["gptq"] != made["rtn"]


def test_the_command_says_what_it_takes(tmp_path: Path, source: Path) -> None:
    done = mlxq("convert", source, "-o", tmp_path / "out", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert f"Note: {NOTE}; --method rtn takes seconds" in done.stdout


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration text is read."""
    monkeypatch.setattr(calibrated, "load_tokenizer", pytest.fail, raising=False)
    monkeypatch.setattr("mlxq.calibration.texts.calibration_sequences", pytest.fail)


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "method rtn, the default for more than 6 bits"),
        ({"recipe": "portable"}, None),
        ({"keep": "."}, None),
        ({"dtype": "float32", "method": "rtn"}, None),
    ],
)
def test_where_a_text_has_nothing_to_say(
    tmp_path: Path, source: Path, options: dict[str, Any], words: str | None
) -> None:
    result = convert(source, tmp_path / "out", verify=False, **options)
    notes = [n for n in result.plan.notes if "method" in n]
    assert [words in n for n in notes] == ([] if words is None else [True])


@pytest.mark.usefixtures("no_text")
def test_codes_of_the_source_stay(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "a", bits=8, verify=False)
    result = convert(tmp_path / "a", tmp_path / "b", verify=False)
    assert result.plan.notes == ()
    assert same(tmp_path / "a", tmp_path / "b")
    assert export(tmp_path / "a", tmp_path / "c.gguf", verify=False).plan.notes == ()


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("options", [{"type": "Q8_0"}, {"type": "BF16"}, {"type": "Q4_0", "method": "rtn"}])
def test_gguf_files_of_which_a_text_has_nothing_to_say(tmp_path: Path, source: Path, options: dict[str, Any]) -> None:
    convert(source, tmp_path / "out.gguf", verify=False, **options)


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_a_dry_run_reads_no_text(tmp_path: Path, source: Path, output: str) -> None:
    result = convert(source, tmp_path / output, dry_run=True)
    assert any(NOTE in n for n in result.plan.notes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_a_model_that_cannot_be_calibrated_is_rounded_and_that_is_said(
    tmp_path: Path, source: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TypeError("__call__() missing\n 1 required argument: 'pixels'")

    monkeypatch.setattr("mlxq.conversion.calibration.BlockStream", refuse)
    plans = []
    result = convert(source, tmp_path / output, verify=False, on_plan=plans.append)
    said = "method rtn, since gptq, the default, cannot run here: TypeError: __call__() missing 1 required argument"
    assert [sum(said in n for n in p.notes) for p in plans] == [0, 1]
    assert any(said in n for n in result.plan.notes)
    name = "mlxq.json" if output == "out" else "out.mlxq.json"
    options = json.loads((tmp_path / output).parent.joinpath(*(["out"] if output == "out" else []), name).read_text())
    assert options["options"]["method"] == "rtn"
    assert "TypeError" in options["options"]["instead_of_default"]
    convert(source, tmp_path / f"rtn-{output}", method="rtn", verify=False)
    if output == "out":
        assert same(tmp_path / "out", tmp_path / "rtn-out")
    else:
        assert_array_equal(*(np.fromfile(tmp_path / f, np.uint8) for f in ("out.gguf", "rtn-out.gguf")))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(TypeError, match="pixels"):
        convert(source, tmp_path / f"asked-{output}", method="gptq", verify=False)


def test_a_text_that_cannot_be_read_is_said_before_the_plan(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise CalibrationError("the tokenizer belongs to another model")

    monkeypatch.setattr("mlxq.calibration.texts.calibration_sequences", refuse)
    plans = []
    convert(source, tmp_path / "out", verify=False, on_plan=plans.append)
    (plan,) = plans
    assert any("cannot run here: the tokenizer belongs to another model" in n for n in plan.notes)
    for options in ({"method": "gptq"}, {"tune": 1}, {"calib_length": 8}, {"target_bpw": 5.0}):
        with pytest.raises(CalibrationError, match="belongs to another model"):
            convert(source, tmp_path / "other", verify=False, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_text_that_is_named_is_not_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match="the calibration text is empty"):
        convert(source, tmp_path / "out", calib=tmp_path / "empty.txt", verify=False)


def test_a_full_disk_is_no_reason_for_another_method(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr("mlxq.conversion.calibrated.CodeStore", refuse)
    with pytest.raises(OutputError, match="no space left"):
        convert(source, tmp_path / "out", verify=False)


def test_what_needs_a_matrix_may_have_a_text_instead(tmp_path: Path, source: Path) -> None:
    wide = tiny.add_merge(tiny.make_model(tmp_path / "source", hidden_size=256, num_hidden_layers=1))
    assert any(NOTE in n for n in convert(wide, tmp_path / "m.gguf", type="Q2_K_S", dry_run=True).plan.notes)
    with pytest.raises(PlanError, match="importance"):
        convert(wide, tmp_path / "m.gguf", type="Q2_K_S", method="rtn", dry_run=True)


def test_a_request_takes_a_share_of_the_machine_s_memory_unless_told_otherwise() -> None:
    assert CalibrationRequest(max_memory=4000).room == 1000
    assert 0 < CalibrationRequest().room < physical_memory() // 7
