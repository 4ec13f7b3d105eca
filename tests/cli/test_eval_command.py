"""`mlxq eval` and `mlxq compare` as a person meets them: figures, pure JSON, the report, one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest
import tiny

from mlxq.conversion import convert

SHORT = ("--sequences", "3", "--length", "24")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    reference = tiny.make_model(root / "reference")
    settings = reference / "tokenizer_config.json"
    # transformers warns of longer texts, which are cut into sequences only afterwards.
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 24}))
    made = {"reference": reference}
    for bits in (8, 3):
        made[f"q{bits}"] = root / f"q{bits}"
        convert(reference, made[f"q{bits}"], bits=bits, verify=False)
    made["text"] = root / "text.txt"
    made["text"].write_text("Some words, and some more of them; then others.\n" * 20)
    return made


def run(models: dict[str, Path], *arguments: object, **env: str):
    return command.mlxq(*arguments, *SHORT, MLXQ_CACHE_DIR=str(models["text"].parent / "cache"), **env)


def test_eval_prints_its_figures(models: dict[str, Path]) -> None:
    done = run(models, "eval", models["q8"], "--reference", models["reference"], "--text", models["text"])
    assert (done.returncode, done.stderr.replace("Measuring ...\n", "")) == (0, "")
    for expected in ("36 tokens of text.txt: 3 sequences of 24", "KL, mean", "KL, 99 %", "top-1 agreement", "±"):
        assert expected in done.stdout
    assert list((models["text"].parent / "cache" / "references").glob("reference-*.npz"))


@pytest.mark.slow
def test_compare_puts_all_in_one_table(models: dict[str, Path], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    arguments = ["compare", models["q8"], models["q3"], "--reference", models["reference"], "--text", models["text"]]
    done = run(models, *arguments, "--report", report)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if str(models["text"].parent) in line]
    assert [line.split()[0] for line in lines] == [str(models[n]) for n in ("reference", "q8", "q3")]
    assert f"Wrote {report}" in done.stdout
    text = report.read_text(encoding="utf-8")
    assert text.count("<circle") == 2
    narrow = run(models, *arguments, COLUMNS="80")
    assert "KL, 99 %" in narrow.stdout, "what is no terminal has no width"


def test_json_is_pure(models: dict[str, Path], tmp_path: Path) -> None:
    options = ["--reference", models["reference"], "--text", models["text"], "--json", "--score", "all", "--no-cache"]
    done = run(models, "compare", models["q8"], models["q3"], *options, "--report", tmp_path / "r.html")
    found = json.loads(done.stdout)
    assert [m["model"] for m in found["models"]] == [str(models["q8"]), str(models["q3"])]
    assert found["tokens"] == 3 * 23
    assert found["models"][0]["kl_mean"]["value"] < found["models"][1]["kl_mean"]["value"]
    assert found["models"][0]["kl_mean"]["standard_error"] > 0
    assert "Wrote" in done.stderr
    assert not found["reference_from_cache"]


def test_eval_without_a_reference(models: dict[str, Path]) -> None:
    done = run(models, "eval", models["q8"], "--json")
    assert json.loads(done.stdout)["models"][0]["kl_mean"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "{absent}"], "No such file"),
        (["--from-end"], "no end to count from"),
        (["--score", "some"], "'some' .*second-half, all"),
        (["--report", "x.txt"], "ends in .html"),
        (["--length", "1"], "--length"),
    ],
)
def test_mistakes_are_one_line(models: dict[str, Path], tmp_path: Path, options: list[str], message: str) -> None:
    given = [o.format(absent=tmp_path / "absent.txt") for o in options]
    done = command.mlxq("eval", models["q8"], *given)
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len(lines), done.stdout) == (1, 1, "")
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    options = ["--reference", str(models["reference"]), "--cache", str(tmp_path / "cache"), "--sequences", "0"]
    options += ["--report", str(tmp_path / "r.html"), "--length", "400", "--text", str(long_text(tmp_path))]
    process = subprocess.Popen(
        [sys.executable, "-c", command.CODE, "eval", str(models["q8"]), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    while "Measuring" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "mlxq: interrupted\n")
    left = [p.name for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith("reference-")]
    assert left == ["long.txt"]


def long_text(directory: Path) -> Path:
    path = directory / "long.txt"
    path.write_text("Some words, and some more of them; then others.\n" * 2000)
    return path
