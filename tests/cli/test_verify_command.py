"""`mlxq verify`: its tables, its JSON, and the exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from command import mlxq

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a copy in which one tensor is a thousandth larger."""
    a = tiny.make_model(tmp_path_factory.mktemp("verify") / "a", dtype="F32")
    b = Path(shutil.copytree(a, a.parent / "b"))
    path = str(b / "model.safetensors")
    arrays = mx.load(path)
    mx.eval(arrays)
    mx.save_safetensors(path, {**arrays, DOWN: arrays[DOWN] * 1.001})
    return a, b


def errors(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.endswith(" ...")]


def test_the_same_model_twice_is_identical(pair: tuple[Path, Path]) -> None:
    a, _ = pair
    done = mlxq("verify", a, a)
    assert done.returncode == 0, done.stderr
    assert errors(done) == []
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("Verdict    identical: 21 tensors, token ids, chat template and settings")
    assert any("F32 / F32" in line and "21" in line for line in lines)
    assert "\x1b" not in done.stdout


def test_a_difference_is_status_1_and_one_line_says_it(pair: tuple[Path, Path]) -> None:
    done = mlxq("verify", *pair)
    assert done.returncode == 1
    assert errors(done) == []
    (verdict,) = [line for line in done.stdout.splitlines() if line.startswith("Verdict")]
    assert all(w in verdict for w in ("different", "1 of 21 tensors", "0.001", DOWN))
    rows = [line.split() for line in done.stdout.splitlines() if line.rstrip().endswith(DOWN)]
    assert rows[0][0] == "0.001"
    assert mlxq("verify", *pair, "--only", "config").returncode == 0
    assert mlxq("verify", *pair, "--only", "tokenizer", "--only", "template").returncode == 0


@pytest.mark.slow
def test_a_tolerance_accepts_it_and_says_so(pair: tuple[Path, Path]) -> None:
    done = mlxq("verify", *pair, "--tolerance", 0.002)
    assert done.returncode == 0
    assert "Verdict    the same within a relative RMSE of 0.002" in done.stdout
    assert DOWN in done.stdout
    assert mlxq("verify", *pair, "--tolerance", 0.0005).returncode == 1


@pytest.mark.slow
def test_the_tolerance_that_a_verdict_names_accepts_it(pair: tuple[Path, Path]) -> None:
    told = mlxq("verify", *pair, "--only", "tensors").stdout.split("; --tolerance ")[1].split()
    assert told[1:] == ["accepts", "that"]
    # The error of about 0.001, rounded up to two digits.
    assert told[0] in ("0.001", "0.0011")
    assert mlxq("verify", *pair, "--tolerance", told[0]).returncode == 0


def test_every_tensor(pair: tuple[Path, Path]) -> None:
    done = mlxq("verify", *pair, "--all", "--no-tokenizer")
    assert sum("layers." in line and "Verdict" not in line for line in done.stdout.splitlines()) == 18
    assert "Tokenizer" not in done.stdout


def test_json(pair: tuple[Path, Path]) -> None:
    done = mlxq("verify", *pair, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["passed"], found["identical"]) == (False, False)
    assert found["tensor_counts"] == {"identical": 20, "different": 1}
    (tensor,) = [t for t in found["tensors"] if t["status"] == "different"]
    assert tensor["name"] == DOWN
    assert tensor["relative_rmse"] == pytest.approx(0.001, rel=1e-3)
    assert DOWN in found["failure"]
    same = json.loads(mlxq("verify", pair[0], pair[0], "--json").stdout)
    assert same["passed"]
    assert same["failure"] is None
    assert same["tokenizer"]["same"]
    assert same["config"] == []


def test_other_models_are_one_clear_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    smaller = tiny.make_model(tmp_path / "smaller", hidden_size=64)
    done = mlxq("verify", pair[0], smaller)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert "hidden_size is 128 / 64" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{a}"], ["b", "verify --help"]),
        (["{a}", "./nowhere"], ["nowhere"]),
        (["{a}", "{a}", "--tolerance", "-1"], ["tolerance", "-1"]),
        (["{a}", "{a}", "--only", "tokens"], ["tokens", "tokenizer"]),
        (["{a}", "{a}", "--only", "template", "--no-tokenizer"], ["nothing"]),
        (["{a}", "{a}/config.json"], ["config.json"]),
    ],
)
def test_mistakes_are_one_line_and_status_1(pair: tuple[Path, Path], arguments: list[str], words: list[str]) -> None:
    done = mlxq("verify", *[a.format(a=pair[0]) for a in arguments])
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = errors(done)
    assert line.startswith("mlxq: ")
    assert all(w.lower() in line.lower() for w in words), line
