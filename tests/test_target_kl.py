"""The smallest result within a divergence, measured on text that is not calibrated on, in a few trials; or nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from command import CODE

from mlxq.conversion import convert, to_kl
from mlxq.errors import Cancelled, PlanError
from mlxq.evaluate.quality.measure import evaluate_models
from mlxq.types import CancelToken, Progress

SHAPES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "wizards", "box", "jars")
TEXT = " ".join(WORDS[i] for i in np.random.default_rng(0).integers(0, len(WORDS), 400))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and costs of both kinds."""
    directory = tmp_path_factory.mktemp("kl")
    tiny.add_merge(tiny.make_model(directory / "source", **SHAPES, eos_token_id=257, bos_token_id=258))
    (directory / "text.txt").write_text(TEXT)
    for output in (directory / "none", directory / "none.gguf"):
        run(directory, output, target_bpw=6, costs=directory / "costs", dry_run=True)
    return directory


def run(place: Path, output: Path, **options: Any) -> Any:
    """Eight sequences are calibrated on; about as many are left."""
    asked = {"calib": place / "text.txt", "calib_sequences": 8, "calib_length": 64, "verify": False}
    return convert(place / "source", output, **asked | options)


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_the_result_is_within_the_limit_and_is_what_was_measured(tmp_path: Path, place: Path, name: str) -> None:
    limit = 0.01
    plans: list[Any] = []
    result = run(place, tmp_path / name, target_kl=limit, costs=place / "costs", on_plan=plans.append)
    manifest = tmp_path / (f"{name}/mlxq.json" if name == "out" else "out.mlxq.json")
    said = json.loads(manifest.read_text())
    trials = said["target_kl"]["trials"]
    assert 1 <= len(trials) <= 5
    assert len(plans) == len(trials)
    assert said["options"]["budget"]["kl"] == limit
    assert said["target_kl"]["kl"]["value"] <= limit
    within = [t["bpw"] for t in trials if t["kl"]["value"] <= limit]
    assert said["bpw"] == min(within) == pytest.approx(result.plan.bpw, abs=1e-4)
    assert said["target_kl"]["text"] == f"{len_left()} sequences of text.txt that are not calibrated on"
    assert len([n for n in result.notes if n.startswith("trial ")]) == len(trials)
    if len(trials) > 1:
        assert any(n.startswith("trial 1: ") for n in plans[1].notes)
    # By another way: the same tokens as a text of their own.
    assert result.path == tmp_path / name
    kl = (
        evaluate_models(
            [tmp_path / name],
            reference=place / "source",
            text=place / "text.txt",
            length=64,
            sequences=0,
            cache=tmp_path / "cache",
        )
        .models[0]
        .kl_mean.value
    )
    assert 0.3 * limit < kl < 2 * limit
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"cache", *(["out"] if name == "out" else ["out.gguf", "out.mlxq.json"])}
    if name == "out":
        assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    else:
        assert sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / name).tensors) == result.plan.nbytes


def len_left() -> int:
    """Sequences of 64 tokens that follow the first eight, at most twelve: tokens are bytes, but for a merge."""
    n = len(TEXT) - TEXT.count("th")
    return min(n // 63 - 8, 12)


def test_a_limit_that_nothing_reaches_and_one_that_all_reach(tmp_path: Path, place: Path) -> None:
    with pytest.raises(PlanError, match=r"--target-kl 1e-09: even [89]\.\d\d bits per weight, the most there is") as e:
        run(place, tmp_path / "out", target_kl=1e-9, costs=place / "costs")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())
    result = run(place, tmp_path / "out", target_kl=50, costs=place / "costs")
    assert {p.spec.bits for p in result.plan.tensors if p.spec} == {2}


def test_interrupted_it_leaves_nothing(tmp_path: Path, place: Path, recwarn: pytest.WarningsRecorder) -> None:
    token = CancelToken()

    def stop(event: Progress) -> None:
        if event.stage == "calibrate" and event.item == "trial 1 of 5 at most, block 3":
            token.cancel()

    with pytest.raises(Cancelled):
        run(place, tmp_path / "out.gguf", target_kl=0.01, costs=place / "costs", progress=stop, cancel=token)
    assert not list(tmp_path.iterdir())
    assert not [w for w in recwarn if "goes on" in str(w.message)]


def test_where_no_text_is_left_the_sample_is_measured_on(tmp_path: Path, place: Path) -> None:
    result = run(place, tmp_path / "out", target_kl=50, costs=place / "costs", calib_sequences=100)
    assert any("on the built-in sample of mlxq eval, the calibration text being used up" in n for n in result.notes)


def test_an_old_result_is_replaced_only_by_a_new_one(tmp_path: Path, place: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    run(place, out, target_kl=50, costs=place / "costs")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fails(*_: Any, **__: Any) -> None:
        raise PlanError("no measure")

    monkeypatch.setattr(to_kl, "measure_on", fails)
    with pytest.raises(PlanError, match="no measure"):
        run(place, out, target_kl=50, costs=place / "costs", overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_kl": 0.0}, "positive number of nats"),
        ({"target_kl": float("nan")}, "positive number of nats"),
        ({"target_bpw": -1}, "positive number of bits"),
        ({"target_kl": 0.1, "target_bpw": 4}, "one budget at a time: --target-bpw and --target-kl were given"),
        ({"target_size": "much"}, "is no size"),
    ],
)
def test_budgets_that_are_none(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        convert(tmp_path / "none", tmp_path / "out", **options)


def test_a_dry_run_plans_what_is_expected(place: Path, tmp_path: Path) -> None:
    plan = run(place, tmp_path / "out", target_kl=0.01, costs=place / "costs", dry_run=True).plan
    assert any("the measured costs add up to 0.00" in n or "up to 0.01 " in n for n in plan.notes)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_at_the_terminal_it_leaves_nothing(tmp_path: Path, place: Path) -> None:
    arguments = ["convert", place / "source", "-o", tmp_path / "out.gguf", "--target-kl", "0.001", "--no-verify"]
    arguments += ["--calib", place / "text.txt", "--calib-sequences", "8", "--calib-length", "64"]
    process = subprocess.Popen([sys.executable, "-c", CODE, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.gguf.partial-*/trial-1/.out.gguf.calibration/0001")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "mlxq: interrupted"
    assert "goes on" not in said
    assert not list(tmp_path.iterdir())
