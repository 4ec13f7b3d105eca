"""Channels scaled between layers: the same function in float, in every architecture, and results that hold it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architecture_zoo
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlxq.architectures.parameters import ParameterMap
from mlxq.architectures.registry import build_model
from mlxq.calibration.stream import BlockStream
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion import code_store, convert, scaling
from mlxq.conversion.calibration import Calibration
from mlxq.conversion.folding import FoldedParameters, proven
from mlxq.evaluate import verify
from mlxq.plan.folds import folds_of
from mlxq.plan.planner import PlanOptions, make_plan
from mlxq.runtime.layers import install_layers
from mlxq.runtime.weights import load_parameters

IDS = np.random.default_rng(5).integers(0, 101, (3, 12)).astype(np.int32)
#: Of logits, relative to the largest: sums of some hundred float32 products, three blocks deep.
ROUNDING = 2e-4
BASE = architecture_zoo.BASE | {"num_hidden_layers": 2}
#: Architecture -> its settings, and what makes channels that can be scaled in a block.
LLAMA = ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj")
GEMMA = ("input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj")
MIXTRAL = (*LLAMA[:3], "block_sparse_moe.switch_mlp.up_proj")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, LLAMA),
    "qwen2": ({}, LLAMA),
    "qwen3": ({}, LLAMA),
    "gemma": ({}, LLAMA),
    "gemma2": ({"query_pre_attn_scalar": 16.0}, GEMMA),
    "gemma3_text": ({"sliding_window": 8, "sliding_window_pattern": 2}, GEMMA),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, MIXTRAL),
    "qwen3_moe": (
        MOE | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        (*LLAMA[:3], "mlp.switch_mlp.up_proj"),
    ),
    "qwen2_moe": (
        MOE | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
        (*LLAMA[:3], "mlp.shared_expert.up_proj", "mlp.switch_mlp.up_proj"),
    ),
    "phi3": ({}, (*LLAMA[:2], "self_attn.qkv_proj", "mlp.gate_up_proj")),
    "olmo2": ({}, ("self_attn.v_proj", "mlp.up_proj")),
    "cohere2": (
        architecture_zoo.CONFIGS["cohere2"] | {"num_hidden_layers": 4},
        ("input_layernorm", "self_attn.v_proj", "mlp.up_proj"),
    ),
    "starcoder2": ({}, (*LLAMA[:2], "self_attn.v_proj")),
    "gpt2": (architecture_zoo.CONFIGS["gpt2"], ("ln_1", "ln_2", "attn.c_attn")),
}
#: Those that only repeat what others show.
_MORE = ("qwen3", "gemma", "gemma2", "qwen3_moe", "cohere2", "starcoder2", "gpt2", "olmo2")
EACH = [pytest.param(n, marks=pytest.mark.slow) if n in _MORE else n for n in ARCHITECTURES]


def save(directory: Path, name: str, dtype: mx.Dtype = mx.float32) -> Path:
    """A random model whose parameters all matter, in the names of mlx-lm's own."""
    config = BASE | {"model_type": name} | ARCHITECTURES[name][0]
    directory.mkdir()
    mx.random.seed(3)
    arrays = [(n, a + 0.1 * mx.random.normal(a.shape)) for n, a in tree_flatten(build_model(config).parameters())]
    stored = {n: a.astype(dtype) for n, a in arrays}
    mx.save_safetensors(str(directory / "model.safetensors"), stored, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def logits(model: Any, parameters: Any) -> np.ndarray:
    install_layers(model, parameters.tensors)
    load_parameters(model, "", parameters, compute_dtype=mx.float32)
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def fold_all(parameters: ParameterMap, options: PlanOptions, seed: int = 0) -> tuple[FoldedParameters, list[str]]:
    """Every fold of every block, by random scales between 1/3 and 3, each tried on its block; and their names."""
    plan = make_plan(parameters.tensors.values(), options, float_modules=parameters.float_modules)
    folded, rng = FoldedParameters(parameters, plan), np.random.default_rng(seed)
    heads = parameters.checkpoint.config["num_attention_heads"]
    found = []
    with BlockStream(parameters, IDS) as stream:
        stream.embed()
        assert not stream.whole

        def visit(block: Any, activations: Any) -> None:
            for fold, offset in proven(
                folds_of(parameters.tensors, block.path, heads), folded, block, activations[0][:1]
            ):
                lead = parameters.tensors[fold.made_by].shape[:-2]
                s = np.exp(rng.uniform(-1.1, 1.1, (*lead, fold.n)))
                folded.fold(fold, folded.settled(fold, s, offset), offset)
                found.append(fold.made_by.removeprefix(f"{block.path}.").removesuffix(".weight"))

        stream.run(visit)
    return folded, found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", EACH)
def test_a_scaled_model_is_the_same_function(tmp_path: Path, name: str, dtype: mx.Dtype) -> None:
    """With stored norms and biases in bfloat16, too: the ratios are those of what is stored."""
    with open_checkpoint(save(tmp_path / "m", name, dtype)) as checkpoint:
        parameters = ParameterMap(checkpoint)
        folded, found = fold_all(parameters, PlanOptions())
        assert sorted(found) == sorted(ARCHITECTURES[name][1] * len(parameters.model.layers))
        before, after = (logits(parameters.new_model(), p) for p in (parameters, folded))
        changed = [n for n in folded.scaled if not np.array_equal(folded.read(n), parameters.read(n))]
    assert np.abs(after - before).max() < ROUNDING * np.abs(before).max()
    assert changed == folded.scaled


def test_rows_of_scaled_weights_are_those_of_the_whole(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "m", "mixtral", mx.bfloat16)) as checkpoint:
        folded, _ = fold_all(ParameterMap(checkpoint), PlanOptions())
        for name in folded.scaled:
            whole = folded.read(name)
            assert np.array_equal(folded.read(name, slice(1, 3)), whole[1:3]), name


def test_what_stays_a_short_float_is_scaled_by_powers_of_two(tmp_path: Path) -> None:
    """The values stay bfloat16: no digit of theirs may change, nor of what goes into the output projection."""
    with open_checkpoint(save(tmp_path / "m", "llama", mx.bfloat16)) as checkpoint:
        parameters = ParameterMap(checkpoint)
        folded, found = fold_all(parameters, PlanOptions(keep=("v_proj", "o_proj")))
        assert "self_attn.v_proj" in found
        for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
            a, b = (p.read(name) for p in (parameters, folded))
            # Sign and digits of a bfloat16.
            assert a.dtype == b.dtype == np.uint16
            assert np.array_equal(a & 0x807F, b & 0x807F)
            assert not np.array_equal(a, b)
        before, after = (logits(parameters.new_model(), p) for p in (parameters, folded))
    assert np.abs(after - before).max() < ROUNDING * np.abs(before).max()


def test_gemmas_norms_beside_kept_matrices_are_left_alone(tmp_path: Path) -> None:
    """1 + weight has no digit to spare, and a kept matrix cannot make up for it."""
    with open_checkpoint(save(tmp_path / "m", "gemma3_text", mx.bfloat16)) as checkpoint:
        _, found = fold_all(ParameterMap(checkpoint), PlanOptions(keep=("q_proj",)))
    assert "input_layernorm" not in found
    assert "pre_feedforward_layernorm" in found


WORDS = "the quick brown fox jumps over a lazy dog while nine wizards box jars and the night is long "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.permutation(WORDS.split() * 70)))
    return path


def make(directory: Path, name: str = "llama") -> Path:
    """A bfloat16 model of some architecture that reads bytes."""
    config = architecture_zoo.config_of(name) | {"vocab_size": 320, "num_hidden_layers": 2}
    if name == "gemma3_text":
        config["query_pre_attn_scalar"] = 16
    architecture_zoo.save(directory, config)
    tiny.write_tokenizer(directory)
    path = str(directory / "model.safetensors")
    arrays = {n: a.astype(mx.bfloat16) for n, a in mx.load(path).items()}
    mx.save_safetensors(path, arrays, metadata={"format": "pt"})
    return directory


def run(source: Path, output: Path, text: Path, **options: Any) -> Any:
    asked = {"calib": text, "calib_sequences": 24, "calib_length": 48, "verify": False, "method": "awq+gptq"}
    return convert(source, output, **asked | options)


def by_stock_mlx_lm(path: Path) -> np.ndarray:
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(IDS)))


def any_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strong scales everywhere, whatever they cost."""
    rng = np.random.default_rng(1)

    def scales(fold: Any, offset: float, seen: Any, matrices: Any) -> np.ndarray:
        lead = matrices.folded.tensors[fold.made_by].shape[:-2]
        return matrices.folded.settled(fold, np.exp(rng.uniform(-0.7, 0.7, (*lead, fold.n))), offset)

    monkeypatch.setattr(scaling, "best_scales", scales)
    monkeypatch.setattr(scaling.BlockScaling, "take_back", lambda self, errors: False)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("qwen2", 8), *(pytest.param(n, 8, marks=pytest.mark.slow) for n in ("llama", "gemma3_text", "mixtral", "phi3"))],
)
def test_stock_mlx_lm_computes_the_same_function(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str, bits: int
) -> None:
    """Of 8 bits little is lost: norms that were not written scaled, or matrices not, would change everything.

    At most tokens: some go to another expert.
    """
    source = make(tmp_path / "source", name)
    run(source, tmp_path / "plain", text, bits=bits, method="search")
    any_scales(monkeypatch)
    result = run(source, tmp_path / "scaled", text, bits=bits, method="awq")
    before, plain, scaled = (by_stock_mlx_lm(tmp_path / d) for d in ("source", "plain", "scaled"))
    lost = [float(np.median(np.square(a - before).mean(axis=-1))) for a in (plain, scaled)]
    assert lost[1] < 4 * lost[0] < 0.01 * np.square(before).mean()
    norms = [p for p in result.plan.tensors if p.scaled and p.spec is None]
    assert {p.action for p in norms} == {"keep"}
    stored = mx.load(str(tmp_path / "scaled" / "model.safetensors"))
    original = mx.load(str(source / "model.safetensors"))
    assert all(not mx.array_equal(stored[p.info.name], original[p.info.name]) for p in norms)
    places = (len(ARCHITECTURES[name][1]) if name in ARCHITECTURES else 4) * 2
    assert any(f"scaled in {places} of {places} places" in n for n in result.notes)


@pytest.mark.parametrize("name", ["gemma3_text", pytest.param("llama", marks=pytest.mark.slow)])
def test_gguf_files_hold_the_same_function(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Gemma's norms are stored there with the 1 added."""
    source = tiny.add_merge(make(tmp_path / "source", name))
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 60)
    any_scales(monkeypatch)
    result = run(source, tmp_path / "out.gguf", text, type="Q8_0", method="awq", verify=True, pre="gpt-2")
    assert any("scaled in 8 of 8 places" in n for n in result.notes)
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        parameters = ParameterMap(checkpoint)
        scaled = logits(parameters.new_model(), parameters)
    before = by_stock_mlx_lm(source)
    assert np.square(scaled - before).mean() < 0.003 * np.square(before).mean()


@pytest.mark.parametrize("method", ["awq", pytest.param("awq+gptq", marks=pytest.mark.slow)])
def test_nothing_loses_more_than_by_rounding(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Even where the scales are bad: then they are taken back."""
    errors: dict[str, list[float]] = {}
    runs, go = [], Calibration.run

    def recorded(self: Calibration) -> None:
        go(self)
        errors.update(self.errors)
        runs.append(self)

    monkeypatch.setattr(Calibration, "run", recorded)
    source = make(tmp_path / "source")
    run(source, tmp_path / "good", text, bits=3, method=method)
    good = dict(errors)
    assert good
    assert all(made <= plain for made, plain in good.values())
    assert runs[0].folded.folds

    def bad(fold: Any, offset: float, seen: Any, matrices: Any) -> np.ndarray:
        s = np.exp2(np.random.default_rng(0).integers(-6, 7, fold.n))
        return matrices.folded.settled(fold, s, offset)

    monkeypatch.setattr(scaling, "best_scales", bad)
    run(source, tmp_path / "bad", text, bits=3, method=method)
    assert all(made <= plain for made, plain in errors.values())
    assert len(runs[1].folded.folds) < len(runs[0].folded.folds) + 4


class Stopped(BaseException):
    """As if the process ended there."""


@pytest.mark.filterwarnings("ignore:.*the same command goes on")
@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_run_goes_on_where_it_was(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = make(tmp_path / "source", name)
    run(source, tmp_path / "a", text)
    put, count = code_store.CodeStore.put, []

    def stopping(self: code_store.CodeStore, *args: Any) -> None:
        if len(count) == 2:
            raise Stopped
        count.append(1)
        put(self, *args)

    with monkeypatch.context() as m:
        m.setattr(code_store.CodeStore, "put", stopping)
        with pytest.raises(Stopped):
            run(source, tmp_path / "b", text)
    chosen: list[str] = []
    best = scaling.best_scales
    monkeypatch.setattr(scaling, "best_scales", lambda f, *a: chosen.append(f.made_by) or best(f, *a))
    run(source, tmp_path / "b", text)
    assert chosen
    assert all(n.startswith("model.layers.1.") for n in chosen)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in "ab")
    assert a == b


@pytest.mark.slow
def test_models_without_such_places_are_said(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source")
    monkeypatch.setattr(scaling, "folds_of", lambda *a: [])
    result = run(source, tmp_path / "out", text, method="awq")
    assert any("no place is known" in n for n in result.notes)
    run(source, tmp_path / "search", text, method="search")
    names = ["model.safetensors"]
    assert [(tmp_path / "out" / n).read_bytes() for n in names] == [
        (tmp_path / "search" / n).read_bytes() for n in names
    ]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("suffix", ["", pytest.param(".gguf", marks=pytest.mark.slow)])
def test_a_scaled_result_verifies_later_on(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Where tensors are looked at one by one; those that are scaled are not the source's."""
    monkeypatch.setattr(verify, "suspicious_kl", lambda *a: 0.0)
    source = make(tmp_path / "source")
    if suffix:
        text = tmp_path / "text.txt"
        text.write_text(WORDS * 60)
        tiny.add_merge(source)
    any_scales(monkeypatch)
    asked = {"type": "Q8_0", "pre": "gpt-2"} if suffix else {"bits": 8}
    result = run(source, tmp_path / f"out{suffix}", text, method="awq", **asked)
    with open_checkpoint(source) as checkpoint:
        verified = verify.verify(checkpoint, result.path)
    assert verified.passed, verified.failure
    n = sum(p.scaled for p in result.plan.tensors)
    assert any(f"{n} tensors are scaled" in note for note in verified.notes)
