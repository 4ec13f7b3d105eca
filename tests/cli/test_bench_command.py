"""`mlxq bench` from the shell, off a Mac: what it prints, and how it fails."""

import json
import sys

import pytest
from command import mlxq as command
from tiny import make_model

import mlxq


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to measure: pass --kernels"),
        (
            ["--kernels", "--rows", "1,x"],
            "--rows takes numbers with commas between them, such as 1,8,64,512, got '1,x'",
        ),
        (["--kernels", "--rows", ""], "--rows takes numbers"),
        (["--kernels", "--rows", "0"], "rows of x to measure must be from 1 to 65536, got 0"),
        (["--kernels"], "nothing-here"),
    ],
)
def test_errors_are_one_line(arguments, words):
    done = command("bench", "nothing-here", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="says what happens off a Mac")
def test_json_is_all_that_standard_output_gets(tmp_path):
    model = tmp_path / "4bit"
    mlxq.convert(make_model(tmp_path / "float", num_hidden_layers=1), model, bits=4, verify=False)
    done = command("bench", model, "--kernels", "--json", "--rows", "1", MLXQ_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stderr in ("", "Measuring ...\n")
    content = json.loads(done.stdout)
    assert content["metal"] is False
    assert {p["ours"]["backend"] for p in content["products"]} == {"numpy"}
    assert not (tmp_path / "cache").exists()
