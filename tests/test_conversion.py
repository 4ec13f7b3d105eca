"""Whole conversions of small models, judged by stock mlx and mlx-lm, and every way in which they may fail."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
import tiny

import mlxq
from mlxq.conversion import convert
from mlxq.errors import (
    Cancelled,
    CheckpointError,
    FormatError,
    OutputError,
    PlanError,
)

SHAPES = tiny.llama_shapes(tiny.LLAMA)


@pytest.fixture
def source(tmp_path):
    return tiny.make_model(tmp_path / "source")


def set_config(source, **changes):
    (source / "config.json").write_text(json.dumps(tiny.LLAMA | changes))


def left(directory):
    """What a conversion left beside its source."""
    return sorted(p.name for p in directory.iterdir() if p.name != "source")


def expect(error, words, source, tmp_path, **options):
    with pytest.raises(error) as e:
        convert(source, tmp_path / "out", **{"verify": False} | options)
    message = str(e.value)
    assert all(w in message for w in words), message
    assert "\n" not in message
    assert left(tmp_path) == []


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (2, 32), (3, 128), (5, 64), (6, 32), (8, 64)])
def test_tensors_equal_mx_quantize_and_load_in_stock_mlx_lm(tmp_path, source, bits, group_size):
    result = convert(source, tmp_path / "out", bits=bits, group_size=group_size, verify=False)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    original = mx.load(str(source / "model.safetensors"))
    for p in result.plan.tensors:
        w = original[p.info.name]
        if p.spec is None:
            assert mx.array_equal(stored[p.info.name], w).item()
            continue
        path = p.info.name.removesuffix("weight")
        expected = mx.quantize(w, p.spec.group_size, p.spec.bits, stream=mx.cpu)
        for part, value in zip(("weight", "scales", "biases"), expected, strict=True):
            assert stored[path + part].dtype == value.dtype
            assert mx.array_equal(stored[path + part], value).item(), path + part
    from mlx_lm import load

    model, tokenizer = load(str(tmp_path / "out"))
    logits = model(mx.array([tokenizer.encode("hello")]))
    assert mx.isfinite(logits).all().item()
    assert model.layers[0].mlp.up_proj.bits == bits
    assert model.model.embed_tokens.bits == max(bits, 6)


def test_config_manifest_and_companions(tmp_path, source):
    (source / "LICENSE").write_bytes(b"licence \xff text")
    result = convert(source, tmp_path / "out", bits=4, keep=("layers.0.mlp.up_proj",), tensor_types=("v_proj=8:32",))
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    q = config["quantization"]
    assert (q["bits"], q["group_size"], q["mode"]) == (4, 64, "affine")
    assert q["model.layers.0.mlp.up_proj"] is False
    assert q["model.layers.1.self_attn.v_proj"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert q["model.embed_tokens"]["bits"] == 6
    assert config["quantization_config"] == q
    manifest = json.loads((out / "mlxq.json").read_text())
    import hashlib

    for name, digest in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {"mlxq.json"}
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["source"]["files"] == {"model.safetensors": digest}
    assert manifest["versions"]["mlxq"] == mlxq.__version__
    assert manifest["bpw"] == pytest.approx(result.plan.bpw, abs=1e-4)
    assert manifest["verification"]["kl_nats_per_token"] >= 0
    assert {t["name"]: t["action"] for t in manifest["tensors"]}["model.layers.0.mlp.up_proj.weight"] == "keep"
    assert str(tmp_path) not in (out / "mlxq.json").read_text()


def test_planned_bytes_are_the_bytes_written(tmp_path, source):
    result = convert(source, tmp_path / "out", verify=False)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert sum(a.nbytes for a in stored.values()) == result.plan.nbytes


def test_same_inputs_give_the_same_bytes(tmp_path, source):
    for name in ("a", "b"):
        convert(source, tmp_path / name, verify=True)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_dry_run_writes_nothing(tmp_path, source):
    result = convert(source, dry_run=True, bits=3)
    assert result.path is None
    assert result.plan.bpw > 3
    assert left(tmp_path) == []


def test_dtype_casts_scales_and_kept_tensors(tmp_path, source):
    convert(source, tmp_path / "out", dtype="float16", verify=False)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {str(a.dtype) for n, a in stored.items() if a.dtype != mx.uint32} == {"mlx.core.float16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def test_quantized_result_as_source_is_repacked_bit_for_bit(tmp_path, source):
    convert(source, tmp_path / "a", bits=4, verify=False)
    result = convert(tmp_path / "a", tmp_path / "b", verify=False)
    assert {p.action for p in result.plan.tensors} == {"repack", "keep"}
    a, b = (mx.load(str(tmp_path / n / "model.safetensors")) for n in "ab")
    assert set(a) == set(b)
    assert all(mx.array_equal(a[n], b[n]).item() for n in a)
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_mixture_of_experts_converts_and_loads(tmp_path):
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "architectures"))
    from test_parameters import MIXTRAL, mixtral_shapes

    tensors = tiny.random_tensors(mixtral_shapes(tiny.LLAMA | MIXTRAL))
    source = tiny.make_model(tmp_path / "source", tensors=tensors, **MIXTRAL)
    result = convert(source, tmp_path / "out", bits=4)
    bits = {p.info.name: p.spec.bits for p in result.plan.tensors if p.spec}
    assert bits["model.layers.0.block_sparse_moe.gate.weight"] == 8
    from mlx_lm import load

    model, _ = load(str(tmp_path / "out"))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()
    expert = mx.array(tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]).astype(mx.bfloat16)
    w = mx.quantize(expert, 64, 4, stream=mx.cpu)
    assert mx.array_equal(model.layers[1].block_sparse_moe.switch_mlp.gate_proj.weight[2], w[0]).item()


# --- what a person or a file can get wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: (s / "config.json").unlink(), ["config.json"]),
        (lambda s: (s / "tokenizer.json").unlink(), ["tokenizer"]),
        (lambda s: (s / "model.safetensors").unlink(), ["safetensors"]),
        (lambda s: os.truncate(s / "model.safetensors", 100_000), ["model.safetensors"]),
        (lambda s: os.truncate(s / "model.safetensors", 4), ["model.safetensors"]),
        (lambda s: (s / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"), ["model.safetensors"]),
        (lambda s: set_config(s, model_type="nosuchmodel"), ["nosuchmodel"]),
        (lambda s: set_config(s, hidden_size=256), ["[320, 128]", "[320, 256]"]),
    ],
    ids=["config", "tokenizer", "weights", "truncated", "empty", "header", "architecture", "shapes"],
)
def test_bad_sources(tmp_path, source, damage, words):
    damage(source)
    expect(CheckpointError, words, source, tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_non_finite_weights_stop_the_conversion_naming_the_tensor(tmp_path, value, name):
    tensors = tiny.random_tensors(SHAPES)
    tensors[name].flat[77] = value
    source = tiny.make_model(tmp_path / "source", tensors=tensors)
    expect(FormatError, [name], source, tmp_path)


def test_weights_beyond_float16_are_named(tmp_path):
    tensors = tiny.random_tensors(SHAPES)
    tensors["lm_head.weight"][3, 5] = 1e6
    source = tiny.make_model(tmp_path / "source", tensors=tensors)
    expect(FormatError, ["lm_head.weight", "F16"], source, tmp_path, dtype="float16")


@pytest.mark.parametrize(("options", "word"), [({"bits": 7}, "7"), ({"group_size": 48}, "48")])
def test_illegal_options_fail_before_the_source_is_looked_at(tmp_path, options, word):
    expect(PlanError, [word], tmp_path / "nowhere", tmp_path, **options)


def test_output_that_exists_or_holds_the_source(tmp_path, source, monkeypatch):
    before = sorted(p.name for p in source.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        convert(source, tmp_path / "out", verify=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    for origin, output in ((source, source), ("~/source", source), (source, "~/source"), (tmp_path / "link", source)):
        with pytest.raises(OutputError, match=r"(is|holds) the source"):
            convert(origin, output, verify=False, overwrite=True)
    with pytest.raises(OutputError):
        convert(source, tmp_path, verify=False, overwrite=True)
    with pytest.raises(OutputError, match="lies in the source"):
        convert(source, source / "deep" / "out", verify=False)
    with pytest.raises(OutputError, match="no output"):
        convert(source, "", verify=False)
    assert sorted(p.name for p in source.iterdir()) == before


def test_unwritable_output(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        convert(source, tmp_path / "file" / "out", verify=False)


def test_unknown_keywords_name_the_valid_ones(tmp_path, source):
    with pytest.raises(TypeError, match=r"group_sise.*group_size"):
        convert(source, tmp_path / "out", group_sise=64)


def run(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True, **options
    )


CONVERT = (
    "import sys\nfrom mlxq.cli import main\n"
    "sys.argv = ['mlxq', 'convert', sys.argv[1], '-o', sys.argv[2], '--method', 'rtn', '--no-verify']\nmain()"
)


FULL = (
    "import errno, os\npwrite, calls = os.pwrite, []\ndef full(*a):\n    calls.append(a)\n"
    "    if len(calls) > 9:\n        raise OSError(errno.ENOSPC, 'No space left on device')\n    return pwrite(*a)\n"
    "os.pwrite = full\n"
)


def test_disk_full_in_the_middle(tmp_path, source):
    """As on a file system that cannot reserve space; without needing root."""
    process = run(FULL + CONVERT, source, tmp_path / "out")
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert message.count("\n") == 1
    assert f"{tmp_path / 'out'}: the disk is full" in message
    assert left(tmp_path) == []


def test_file_larger_than_the_system_allows(tmp_path, source):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = run(CONVERT, source, tmp_path / "out", preexec_fn=limit)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert message.count("\n") == 1
    assert "file is too large" in message
    assert left(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_disk_full_on_a_small_file_system(tmp_path, source):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        # The preflight would refuse; a disk that fills up later must be as clean.
        code = "import mlxq.writers.output as o\no.OutputDirectory.check_space = lambda *a: None\n" + CONVERT
        process = run(code, source, disk / "out")
        message = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "disk is full" in message
        assert message.count("\n") == 1
        assert list(disk.iterdir()) == []
        with pytest.raises(OutputError, match="free"):
            convert(source, disk / "out", verify=False)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SLOW = (
    "import sys, time, threading, mlxq\nfrom mlxq.quantizers import rtn\nquantize = rtn.quantize\n"
    "def slow(*a):\n    print('busy', flush=True)\n    time.sleep(0.3)\n    return quantize(*a)\nrtn.quantize = slow\n"
)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_then_run_again(tmp_path, source, sign):
    process = run(SLOW + CONVERT, source, tmp_path / "out", stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(sign)
    message = process.communicate(timeout=60)[1]
    assert not (tmp_path / "out").exists()
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert message == "mlxq: interrupted\n"
        assert left(tmp_path) == []
    convert(source, tmp_path / "out", verify=False)
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("stage", ["quantize", "write", "verify"])
def test_cancel_in_every_stage(tmp_path, source, stage):
    token = mlxq.CancelToken()

    def progress(event):
        if event.stage == stage:
            thread = threading.Thread(target=token.cancel)
            thread.start()
            thread.join()

    with pytest.raises(Cancelled):
        convert(source, tmp_path / "out", cancel=token, progress=progress)
    assert left(tmp_path) == []


def test_plan_comes_before_work_and_one_pattern_needs_no_list(tmp_path, source):
    plans = []
    result = convert(
        source,
        tmp_path / "out",
        keep="lm_head",
        tensor_types="v_proj=8",
        verify=False,
        on_plan=plans.append,
        progress=lambda event: plans.append(None) if len(plans) == 0 else None,
    )
    assert plans == [result.plan]
    assert [p.info.name for p in plans[0].kept_weights] == ["lm_head.weight"]


def test_progress_events_are_typed_and_reach_the_total(tmp_path, source):
    events = []
    convert(source, tmp_path / "out", progress=events.append)
    stages = [e.stage for e in events]
    assert stages[0] == "quantize"
    assert "verify" in stages
    quantize = [e for e in events if e.stage == "quantize"]
    assert [e.done for e in quantize] == sorted(e.done for e in quantize)
    assert quantize[-1].done == quantize[-1].total
