"""The command line as a person meets it: exit status, one line for each mistake, nothing on the wrong stream."""

import json
import signal
import subprocess
import sys

import pytest
import tiny
from command import CODE, mlxq


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="module")
def converted(source):
    out = source.parent / "converted"
    done = mlxq("convert", source, "-o", out, "--bits", 4, "--method", "rtn")
    assert done.returncode == 0, done.stderr
    return out, done


def test_help_and_version():
    assert {w for w in ("convert", "generate", "inspect") if w in mlxq("--help").stdout} == {
        "convert",
        "generate",
        "inspect",
    }
    assert mlxq("--version").stdout.startswith("mlxq 0.")
    assert "--group-size" in mlxq("convert", "--help").stdout


def test_convert_prints_totals_proof_and_place(converted):
    out, done = converted
    for words in ("6-bit group 64", "4-bit group 64", "bits per weight", "KL", str(out)):
        assert words in done.stdout
    assert (out / "mlxq.json").exists()


def test_dry_run_prints_each_tensor_bytes_and_reason_and_writes_nothing(source):
    done = mlxq("convert", source, "--dry-run", "--bits", 3, "--context", 100)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.1.self_attn.v_proj.weight"))
    # 64 x 128 weights of 3 bits, and a 2-byte scale and bias for each 64 of them.
    assert all(w in row for w in ("64 x 128", "BF16", "quantize 3-bit group 64", f"{64 * 128 * 3 // 8 + 64 * 2 * 4:,}"))
    assert "100 tokens" in done.stdout
    assert sorted(p.name for p in source.parent.iterdir() if "converted" not in p.name) == ["source"]


def test_generate_streams_text_to_stdout_and_speed_to_stderr(converted):
    out, _ = converted
    done = mlxq("generate", out, "--prompt", "hello", "--max-tokens", 5, "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert "tokens/s" not in done.stdout
    again = mlxq("generate", out, "--max-tokens", 5, stdin="hello\n")
    assert again.stdout == done.stdout
    numpy = mlxq("generate", out, "--prompt", "hello", "--max-tokens", 5, MLXQ_BACKEND="numpy")
    assert numpy.returncode == 0
    assert numpy.stdout == done.stdout


@pytest.mark.slow
def test_sampling_is_repeatable_by_seed(converted):
    out, _ = converted

    def sample(seed):
        return mlxq("generate", out, "-p", "hello", "-m", 20, "-t", 1.5, "--top-k", 50, "--seed", seed).stdout

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_inspect_text_and_json(converted, source):
    out, _ = converted
    done = mlxq("inspect", out, "--json", "--context", 1000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["architecture"] == "llama"
    text = mlxq("inspect", out).stdout
    assert "llama" in text
    assert "4-bit group 64" in text
    assert mlxq("inspect", source).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "{source}"], ["--output"]),
        (["convert", "{source}", "-o", "{out}", "--bits", "7"], ["7", "2, 3, 4, 5, 6, 8"]),
        (["convert", "{source}", "-o", "{out}", "--keep", "nothing"], ["nothing"]),
        (["convert", "./nowhere", "-o", "{out}"], ["nowhere"]),
        (["convert", "org/model", "-o", "{out}"], ["org/model"]),
        (["convert", "{source}", "-o", "{source}/config.json/x"], ["config.json"]),
        (["convert", "{source}", "-o", ""], ["output"]),
        (["convert", "{source}", "-o", "{out}", "--bits", "four"], ["--bits"]),
        (["convrt"], ["convrt"]),
        (["convert", "--bitts", "4", "x"], ["--bitts", "--bits"]),
        (["convert"], ["source", "convert --help"]),
        (["generate", "./nowhere", "-p", "x"], ["nowhere"]),
        (["generate", "{converted}", "-p", ""], ["prompt"]),
        (["generate", "{converted}", "-p", "x" * 1000], ["512", "10"]),
        (["inspect", "./nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_line_and_status_1(source, converted, tmp_path, arguments, words):
    names = {"source": source, "out": tmp_path / "out", "converted": converted[0]}
    done = mlxq(*[a.format(**names) for a in arguments])
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    # On a slow machine a stage may announce itself ("Loading ...") before it fails.
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mlxq: ")
    assert all(w in lines[0] for w in words), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_backend_is_named(converted):
    done = mlxq("generate", converted[0], "-p", "x", MLXQ_BACKEND="cuda")
    assert done.returncode == 1
    assert "cuda" in done.stderr
    assert "numpy" in done.stderr


def test_a_closed_pipe_is_quiet(source):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "convert", str(source), "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    message = process.stderr.read().decode()
    process.wait(timeout=60)
    assert message == ""


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_in_one_line_and_its_status(source, tmp_path, number, status, word):
    code = (
        f"import os\nimport mlxq.conversion\nmlxq.conversion.convert = lambda *a, **k: os.kill(os.getpid(), {number})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + CODE, "convert", str(source), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, f"mlxq: {word}\n")
