"""Whole conversions by methods that read a calibration text: what they make, and every way in which they may end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import architecture_zoo
import gguf_zoo
import mlx.core as mx
import numpy as np
import pytest
import tiny
from command import CODE, mlxq
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from mlxq.conversion import code_store, convert
from mlxq.conversion.calibration import Calibration
from mlxq.errors import CalibrationError, Cancelled, OutputError, PlanError
from mlxq.runtime import block_layout
from mlxq.types import CancelToken

#: Tokens of it are bytes.
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "wizards", "box", "jars")


def some_words(seed: int, n: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), n))


#: Rows of input for a Hessian of these models, so that what is gained is not only gained on them.
ENOUGH = {"calib_sequences": 40, "calib_length": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_words(0, 1000))
    return path


def make(directory: Path, **changes: Any) -> Path:
    return tiny.make_model(directory, **{"hidden_size": 64, "intermediate_size": 128} | changes)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


def run(source: Path, output: Path, text: Path | str, **options: Any) -> Any:
    asked = {"calib": text, "calib_sequences": 12, "calib_length": 32, "bits": 3, "verify": False, "method": "gptq"}
    return convert(source, output, **asked | options)


def logits_by_stock_mlx_lm(path: Path) -> np.ndarray:
    """For other words than those that are calibrated on."""
    model, config = load_model(path)
    model.set_dtype(mx.float32)
    ids = np.array(Tokenizer.from_file(str(path / "tokenizer.json")).encode(some_words(9, 200)).ids[:640])
    return np.array(model(mx.array(ids.reshape(16, 40) % config["vocab_size"])).astype(mx.float32))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (a - a.max(-1, keepdims=True) for a in (p, q))
    p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def left(directory: Path) -> list[str]:
    """What a conversion left beside its source."""
    return sorted(p.name for p in directory.iterdir() if p.name != "source")


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stock_mlx_lm_loads_what_loses_less_than_rounding(tmp_path: Path, text: Path, tied: bool) -> None:
    source = make(tmp_path / "source", tie_word_embeddings=tied)
    expected, lost = logits_by_stock_mlx_lm(source), {}
    for method in ("rtn", "search", "gptq"):
        result = run(source, tmp_path / method, text, method=method, **ENOUGH)
        lost[method] = divergence(expected, logits_by_stock_mlx_lm(tmp_path / method))
        assert not result.notes
        assert {p.method for p in result.plan.tensors if p.spec} == {method}
    # Three bits, where the choice of a grid matters most; other tokens than those of the text.
    assert lost["gptq"] < lost["rtn"]
    assert lost["search"] < lost["rtn"]


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, source: Path, text: Path) -> None:
    for name in ("a", "b"):
        run(source, tmp_path / name / "out", text)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert left(tmp_path / "a") == ["out"]


@pytest.mark.slow
def test_on_disk_equals_in_memory(tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxq.calibration import activations

    spooled, room = [], activations.room_on_disk
    monkeypatch.setattr(activations, "room_on_disk", lambda *a: spooled.append(a) or room(*a))
    run(source, tmp_path / "a" / "out", text)
    assert not spooled
    run(source, tmp_path / "b" / "out", text, max_memory="100KB")
    assert spooled
    a, b = files(tmp_path / "a" / "out"), files(tmp_path / "b" / "out")
    assert a.pop("mlxq.json") != b.pop("mlxq.json"), "the manifest says what was asked for"
    assert a == b


@pytest.mark.slow
def test_a_tied_embedding_is_quantized_for_the_head_and_looked_up_so(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source", tie_word_embeddings=True)
    first: list[np.ndarray] = []
    visit = Calibration._visit

    def visited(self: Calibration, block: Any, activations: Any) -> None:
        if block.index == 0:
            first.append(np.array(activations[0]))
        visit(self, block, activations)

    monkeypatch.setattr(Calibration, "_visit", visited)
    run(source, tmp_path / "out", text)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    spec = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["model.embed_tokens"]
    path = "model.embed_tokens."
    grid = spec["group_size"], spec["bits"]
    scales, biases = (stored[path + p].astype(mx.float32) for p in ("scales", "biases"))
    w_hat = np.array(mx.dequantize(stored[path + "weight"], scales, biases, *grid))
    w = mx.load(str(source / "model.safetensors"))[path + "weight"]
    assert not mx.array_equal(stored[path + "weight"], mx.quantize(w, *grid, stream=mx.cpu)[0])
    # A row of the first sequence is one of the decoded rows, and of no others is it as near.
    seen = np.unique(first[0].reshape(-1, 64), axis=0)
    assert np.abs(seen[:, None] - w_hat[None]).max(-1).min(1).max() < 1e-6


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    config = architecture_zoo.config_of("mixtral") | {
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
    }
    source = architecture_zoo.save(tmp_path / "source", config)
    tiny.write_tokenizer(source)
    return source


@pytest.mark.slow
def test_experts_that_saw_few_tokens_are_listed(tmp_path: Path, experts: Path, text: Path) -> None:
    result = run(experts, tmp_path / "out", text, calib_sequences=2)
    note = next(n for n in result.notes if "too few tokens" in n)
    assert "experts" in note
    assert "model.layers." in note
    assert np.isfinite(logits_by_stock_mlx_lm(tmp_path / "out")).all()


@pytest.mark.slow
def test_experts_lose_less_than_by_rounding(tmp_path: Path, experts: Path, text: Path) -> None:
    expected = logits_by_stock_mlx_lm(experts)
    lost = {}
    for method in ("rtn", "gptq"):
        run(experts, tmp_path / method, text, method=method, **ENOUGH)
        lost[method] = divergence(expected, logits_by_stock_mlx_lm(tmp_path / method))
    assert lost["gptq"] < lost["rtn"]


@pytest.mark.slow
def test_models_that_have_no_blocks_run_whole(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_by_stock_mlx_lm(source)
    run(source, tmp_path / "rtn", text, method="rtn")

    def unfit(model: Any) -> str:
        raise block_layout.NotStreamable("it has no list of blocks")

    monkeypatch.setattr(block_layout, "_path_of_blocks", unfit)
    result = run(source, tmp_path / "out", text, **ENOUGH)
    assert any("it has no list of blocks: the whole model was run at once" in n for n in result.notes)
    assert not any("not seen" in n for n in result.notes)
    lost = [divergence(expected, logits_by_stock_mlx_lm(tmp_path / name)) for name in ("out", "rtn")]
    assert lost[0] < lost[1]
    with pytest.raises(CalibrationError, match=r"block by block.*no list of blocks"):
        run(source, tmp_path / "other", text, bits=None, target_bpw=5.0)


@pytest.mark.slow
def test_matrices_that_the_text_never_reaches_are_listed(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxq.calibration import observe

    call = observe._Observed.__call__

    def blind(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self._module(x) if "up_proj" in self._name else call(self, x, *args, **kwargs)

    monkeypatch.setattr(observe._Observed, "__call__", blind)
    result = run(source, tmp_path / "out", text)
    assert [n for n in result.notes if "2 tensors was not seen" in n and "model.layers.0.mlp.up_proj" in n]


class Stopped(BaseException):
    """As if the process ended there."""


def stop_at_put(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Stop before the step of that number, counted from 0, is stored."""
    put, count = code_store.CodeStore.put, []

    def stopping(self: code_store.CodeStore, *args: Any) -> None:
        if len(count) == number:
            raise error
        count.append(1)
        put(self, *args)

    monkeypatch.setattr(code_store.CodeStore, "put", stopping)


@pytest.mark.filterwarnings("ignore:.*the same command goes on")
@pytest.mark.parametrize("options", [{}, pytest.param({"target_bpw": 5.0, "bits": None}, marks=pytest.mark.slow)])
def test_a_run_goes_on_where_it_was(
    tmp_path: Path, experts: Path, text: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Two of four steps are there; experts' notes of finished blocks are those of an uninterrupted run, too."""
    asked = {"calib_sequences": 2} | options
    run(experts, tmp_path / "a" / "out", text, **asked)
    stop_at_put(monkeypatch, 2, Stopped())
    with pytest.raises(Stopped):
        run(experts, tmp_path / "b" / "out", text, **asked)
    assert left(tmp_path / "b") == [".out.calibration"]
    monkeypatch.undo()
    made, put = [], code_store.CodeStore.put
    monkeypatch.setattr(code_store.CodeStore, "put", lambda self, step, *a: made.append(step) or put(self, step, *a))
    run(experts, tmp_path / "b" / "out", text, **asked)
    assert made == [2, 3]
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the same command goes on")
@pytest.mark.parametrize("change", [{"bits": 4}, {"calib_length": 31}, {"method": "search"}, {"text": "other"}])
def test_another_request_throws_the_codes_away(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    stop_at_put(monkeypatch, 2, Stopped())
    with pytest.raises(Stopped):
        run(source, tmp_path / "b" / "out", text)
    monkeypatch.undo()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("fox", "cat"))
    if change.pop("text", None):
        text = other
    made, put = [], code_store.CodeStore.put
    monkeypatch.setattr(code_store.CodeStore, "put", lambda self, step, *a: made.append(step) or put(self, step, *a))
    run(source, tmp_path / "b" / "out", text, **change)
    assert made == [0, 1, 2, 3]
    assert left(tmp_path / "b") == ["out"]


def test_cancelled_and_said_that_blocks_are_kept(tmp_path: Path, source: Path, text: Path) -> None:
    token = CancelToken()

    def progress(event: Any) -> None:
        if event.stage == "calibrate" and event.done > event.total / 2:
            token.cancel()

    with pytest.raises(Cancelled), pytest.warns(match=r"\.out\.calibration keeps the blocks.*the same command goes on"):
        run(source, tmp_path / "b" / "out", text, progress=progress, cancel=token)
    assert left(tmp_path / "b") == [".out.calibration"]


@pytest.mark.filterwarnings("error")
def test_cancelled_before_anything_is_done(tmp_path: Path, source: Path, text: Path) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        run(source, tmp_path / "made" / "out", text, cancel=token)
    assert left(tmp_path) == []


def test_a_full_disk_keeps_finished_blocks_and_says_so(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = np.save, []

    def full(path: Path, array: np.ndarray) -> None:
        count.append(path)
        if "0002.partial" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array)

    monkeypatch.setattr(code_store.np, "save", full)
    with pytest.raises(OutputError) as e, pytest.warns(match="the same command goes on"):
        run(source, tmp_path / "b" / "out", text)
    assert "disk is full" in str(e.value)
    assert "nothing was left" not in str(e.value)
    assert sorted(p.name for p in (tmp_path / "b" / ".out.calibration").iterdir()) == ["0000", "0001", "key.json"]


def test_no_room_for_spilled_activations(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system has no posix_fallocate")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="activations of the calibration text"):
        run(source, tmp_path / "b" / "out", text, max_memory="100KB")
    assert not [p for p in left(tmp_path / "b") if p != ".out.calibration"]


@pytest.mark.slow
def test_codes_that_were_damaged_are_made_again(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "a" / "out", text)
    stop_at_put(monkeypatch, 3, Stopped())
    with pytest.raises(Stopped), pytest.warns(match="goes on"):
        run(source, tmp_path / "b" / "out", text)
    monkeypatch.undo()
    store = tmp_path / "b" / ".out.calibration"
    (store / "0001" / "0.w_q.npy").write_bytes(b"")
    (store / "0002" / "tensors.json").write_text("{}")
    run(source, tmp_path / "b" / "out", text)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_activations_that_overflow_are_named(tmp_path: Path, text: Path) -> None:
    tensors = tiny.random_tensors(tiny.llama_shapes(tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 128}))
    for name in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= np.float32(1e20)
    source = make(tmp_path / "source", tensors=tensors)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj.*not finite"):
        run(source, tmp_path / "out", text, dtype="float32")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"too short", "sequence"), (b"caf\xe9 " * 400, "UTF-8")],
    ids=["empty", "short", "latin-1"],
)
def test_texts_that_are_unfit(tmp_path: Path, source: Path, content: bytes, words: str) -> None:
    path = tmp_path / "source" / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        run(source, tmp_path / "out", path)
    assert left(tmp_path) == []


def size_of(path: Path) -> int:
    return sum(a.nbytes for a in mx.load(str(path / "model.safetensors")).values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Path]:
    """A model with many matrices of many sizes, and its costs."""
    directory = tmp_path_factory.mktemp("measured")
    source = make(directory / "source", num_hidden_layers=5, intermediate_size=192)
    costs = directory / "costs"
    run(source, directory / "first", text, bits=None, target_bpw=5.0, costs=costs, method="search")
    assert costs.exists()
    return source, costs


@pytest.mark.slow
@pytest.mark.parametrize("bpw", [3.0, 4.5, 6.0])
def test_budgets_are_met_closely(tmp_path: Path, measured: tuple[Path, Path], text: Path, bpw: float) -> None:
    source, costs = measured
    result = run(source, tmp_path / "out", text, bits=None, method="search", target_bpw=bpw, costs=costs)
    budget = bpw * result.plan.n_weights / 8
    # Single steps of this model's matrices are up to 1 % of it: those of a real one far less.
    assert 0.99 * budget < size_of(tmp_path / "out") <= budget
    assert result.plan.nbytes == size_of(tmp_path / "out")
    assert len({p.spec for p in result.plan.tensors if p.spec}) > 1


@pytest.mark.slow
def test_budgets_as_a_size_and_with_exceptions(tmp_path: Path, measured: tuple[Path, Path], text: Path) -> None:
    source, costs = measured
    asked = {"keep": ("layers.0.mlp.up_proj",), "tensor_types": ("layers.1.mlp.up_proj=8:32",), "costs": costs}
    result = run(source, tmp_path / "out", text, bits=None, method="search", target_size="200KB", **asked)
    assert 0.97 * 200e3 < size_of(tmp_path / "out") <= 200e3
    specs = {p.info.name: p.spec for p in result.plan.tensors}
    assert specs["model.layers.0.mlp.up_proj.weight"] is None
    assert str(specs["model.layers.1.mlp.up_proj.weight"]) == "8-bit group 32"


@pytest.mark.slow
def test_budgets_that_cannot_be_met_say_the_smallest(tmp_path: Path, measured: tuple[Path, Path], text: Path) -> None:
    source, costs = measured
    asked = {"bits": None, "method": "search", "costs": costs}
    with pytest.raises(PlanError, match="cannot be met: the smallest possible is") as e:
        run(source, tmp_path / "out", text, target_bpw=1.0, **asked)
    smallest = float(str(e.value).split("(")[1].split(" bpw")[0])
    run(source, tmp_path / "out", text, target_bpw=smallest + 0.01, **asked)
    with pytest.raises(PlanError, match="--fit 100KB"):
        run(source, tmp_path / "other", text, fit="100KB", **asked)
    assert left(tmp_path) == ["out"]


@pytest.mark.slow
def test_costs_of_another_model_are_refused(tmp_path: Path, source: Path, measured: Any, text: Path) -> None:
    with pytest.raises(PlanError, match=r"measured on another model"):
        run(
            make(tmp_path / "wide" / "source", num_hidden_layers=7),
            tmp_path / "out",
            text,
            bits=None,
            target_bpw=5.0,
            costs=measured[1],
        )


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama tied", "mixtral"))]
)
def test_a_quantized_source_is_decoded_and_calibrated(tmp_path: Path, name: str) -> None:
    base = gguf_zoo.save(tmp_path / "base", gguf_zoo.ZOO[name] | {"intermediate_size": 128})
    path = gguf_zoo.write_gguf(base, tmp_path / "model.gguf", type_name="Q8_0")
    lines = tmp_path / "words.jsonl"
    lines.write_text(json.dumps({"text": "w0" * 900}) + "\n")
    result = run(path, tmp_path / "out", lines, calib_sequences=8, calib_length=16)
    assert {p.method for p in result.plan.tensors if p.spec} == {"gptq"}
    assert any("requantized" in n for n in result.notes)
    assert not any("not seen" in n for n in result.notes)
    model, _ = load_model(tmp_path / "out")
    assert mx.isfinite(model(mx.array([[0, 5, 7]]))).all()


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path, text: Path) -> None:
    """The same command in a process of its own, killed as soon as two blocks are done."""
    source = make(tmp_path / "source", num_hidden_layers=6, intermediate_size=256)
    out = tmp_path / "out"
    arguments = ["convert", source, "-o", out, "--method", "gptq", "--bits", "3", "--calib", text]
    arguments += ["--calib-sequences", "24", "--calib-length", "64", "--no-verify"]
    process = subprocess.Popen([sys.executable, "-c", CODE, *map(str, arguments)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.calibration" / "0002").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left(tmp_path) == [".out.calibration"]
    steps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.calibration").iterdir() if p.name.isdigit()}
    assert {"0000", "0001", "0002"} <= steps.keys() < {f"{i:04d}" for i in range(8)}
    done = mlxq(*arguments)
    assert done.returncode == 0, done.stderr
    assert left(tmp_path) == ["out"]
    again = mlxq(*[a if a != out else tmp_path / "again" for a in arguments])
    assert again.returncode == 0
    assert files(out) == files(tmp_path / "again")


@pytest.mark.slow
def test_interrupted_at_the_terminal(tmp_path: Path, text: Path) -> None:
    source = make(tmp_path / "source", num_hidden_layers=6, intermediate_size=256)
    arguments = ["convert", source, "-o", tmp_path / "out", "--method", "gptq", "--calib", text]
    arguments += ["--calib-sequences", "24", "--calib-length", "64", "--no-verify"]
    process = subprocess.Popen([sys.executable, "-c", CODE, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".out.calibration" / "0001").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said.count("the same command goes on from there") == 1
    assert said.splitlines()[-1] == "mlxq: interrupted"
    assert left(tmp_path) == [".out.calibration"]


def test_two_runs_in_one_place(tmp_path: Path, source: Path, text: Path) -> None:
    with code_store.CodeStore(tmp_path / "out", {}), pytest.raises(OutputError, match="another run"):
        run(source, tmp_path / "out", text)
    assert left(tmp_path) == []


@pytest.mark.slow
def test_experts_some_at_a_time_give_the_same_codes(
    tmp_path: Path, experts: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxq.calibration.observe import Moments

    held: list[int] = []
    empty = Moments.empty

    def recorded(n: int, K: int, some: range) -> Moments:
        held.append(4 * K * K * len(some))
        return empty(n, K, some)

    monkeypatch.setattr(Moments, "empty", recorded)
    for name, limit in (("a", None), ("b", "200KB")):
        held.clear()
        result = run(experts, tmp_path / name, text, calib_sequences=3, max_memory=limit)
        assert any("too few tokens" in n for n in result.notes)
        # Of 8 experts with 64 and 128 inputs: 16 and 65 kB each; a single one is always held.
        assert (max(held) > 4 * 65536) if limit is None else (max(held) <= 65536)
    a, b = (files(tmp_path / name) for name in ("a", "b"))
    assert json.loads(a.pop("mlxq.json"))["notes"] == json.loads(b.pop("mlxq.json"))["notes"]
    assert a == b


@pytest.mark.slow
def test_stacks_whose_inputs_are_not_understood_are_searched_and_keep_their_grid(tmp_path: Path, text: Path) -> None:
    """Latent attention multiplies by a stack of matrices, one a head, from either side."""
    from mlx.utils import tree_flatten

    from mlxq.architectures.registry import build_model

    source = tmp_path / "source"
    source.mkdir()
    mx.random.seed(1)
    arrays = dict(tree_flatten(build_model(tiny.DEEPSEEK).parameters()))
    mx.save_safetensors(str(source / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (source / "config.json").write_text(json.dumps(tiny.DEEPSEEK))
    tiny.write_tokenizer(source)
    result = run(source, tmp_path / "out", text, bits=None, target_bpw=5.0, method="search", calib_sequences=4)
    assert any("4 tensors was not seen" in n and "embed_q" in n for n in result.notes)
    assert np.isfinite(logits_by_stock_mlx_lm(tmp_path / "out")).all()
    budget = 5.0 * result.plan.n_weights / 8
    assert 0.98 * budget < result.plan.nbytes <= budget


@pytest.mark.slow
def test_on_what_the_model_writes_itself(tmp_path: Path, source: Path) -> None:
    for name in ("a", "b"):
        run(source, tmp_path / name / "out", "self", calib_sequences=2, calib_length=96, seed=3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
