"""Whole models that GPTQ and AWQ quantized: converted, exported and run with the codes that they have."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from packed_models import awq_parts, awq_settings, gptq_parts, gptq_settings, make_packed_model, write_tensors

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import PlanError
from mlxq.formats.crossings import dequantize
from mlxq.formats.floats import dtype_of, to_float32
from mlxq.runtime import weights
from mlxq.runtime.layers import PermutedLinear, PermutedSwitchLinear

TOKENS = [[1, 5, 9, 200, 31, 7, 77, 12]]


def shuffled(K, group_size=32):
    """Groups of columns in the order that act-order may give, the same for all matrices of a width."""
    return np.random.default_rng(K).permutation(np.arange(K) // group_size)


MODELS = {
    "gptq": (lambda w, n: gptq_parts(w), gptq_settings(), {}),
    "gptq-v2-asym": (
        lambda w, n: gptq_parts(w, sym=False, version=2),
        gptq_settings(sym=False, checkpoint_format="gptq_v2"),
        {},
    ),
    "gptq-3-bit": (lambda w, n: gptq_parts(w, bits=3, group_size=64), gptq_settings(bits=3, group_size=64), {}),
    "gptq-rows": (lambda w, n: gptq_parts(w, bits=8, group_size=-1), gptq_settings(bits=8, group_size=-1), {}),
    "gptq-act": (
        lambda w, n: gptq_parts(w, sym=False, group_of=shuffled(w.shape[1])),
        gptq_settings(sym=False, desc_act=True),
        {},
    ),
    "gptq-head": (lambda w, n: gptq_parts(w), gptq_settings(), {"keep": ()}),
    "awq": (lambda w, n: awq_parts(w), awq_settings(), {}),
    "awq-bfloat16": (lambda w, n: awq_parts(w, group_size=128), awq_settings(group_size=128), {"dtype": "BF16"}),
    "awq-gemv": (lambda w, n: awq_parts(w, "gemv"), awq_settings(version="gemv"), {}),
    "awq-fast": (lambda w, n: awq_parts(w, "gemv_fast"), awq_settings(version="gemv_fast"), {}),
    "llm-awq": (lambda w, n: awq_parts(w, "llm-awq"), awq_settings(version="gemv", backend="llm-awq"), {}),
}
IN_ORDER = [n for n in MODELS if "act" not in n]


def make(name, directory):
    parts, settings, options = MODELS[name]
    return make_packed_model(directory, parts, settings, **options)


def decoded(source):
    """Every weight as the number that its code stands for, in float32."""

    def number(name):
        if checkpoint.kind == "mlx" and checkpoint.tensors[name].spec is not None:
            return dequantize(checkpoint.read_quantized(name))
        values = checkpoint.read(name)
        return to_float32(values, dtype_of(values))

    with open_checkpoint(source) as checkpoint:
        return {name: number(name) for name in checkpoint.tensors}


def as_float(source, directory):
    """The same model with its decoded weights in float32."""
    shutil.copytree(source, directory)
    tensors = decoded(source)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    tiny.write_safetensors(directory / "model.safetensors", tensors, "F32")
    return directory


def logits(path, tokens=TOKENS):
    with mlxq.load(path) as model:
        return np.array(model.module(mx.array(tokens)).astype(mx.float32))


@pytest.mark.parametrize("name", IN_ORDER)
def test_converted_weights_are_the_source_s_own(name, tmp_path):
    source = make(name, tmp_path / "source")
    result = mlxq.convert(source, tmp_path / "out", verify=name == "awq")
    packed = [p for p in result.plan.tensors if p.info.dtype in ("GPTQ", "AWQ")]
    assert len(packed) == (15 if name == "gptq-head" else 14)
    assert {p.action for p in packed} == {"repack"}
    if name == "awq":
        assert result.verification.passed
        assert result.verification.n_identical == result.plan.n_weights
    expected, found = decoded(source), decoded(tmp_path / "out")
    for tensor, w in expected.items():
        np.testing.assert_array_equal(found[tensor], w, err_msg=tensor)


@pytest.mark.parametrize("name", ["gptq", "gptq-act", "awq-bfloat16"])
def test_runs_as_its_decoded_weights_do(name, tmp_path):
    source = make(name, tmp_path / "source")
    expected, found = logits(as_float(source, tmp_path / "float")), logits(source)
    # float32 sums of at most 256 products, in another order.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gptq", mx.float16), ("awq", mx.float32), ("awq-fast", mx.float16), ("awq-bfloat16", mx.float32)],
)
def test_a_gpu_computes_in_what_holds_the_scales(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "on_accelerator", lambda: True)
    with open_checkpoint(make(name, tmp_path / "source")) as checkpoint:
        assert weights.default_compute_dtype(ParameterMap(checkpoint)) == dtype


def test_columns_out_of_order_run_with_their_codes(tmp_path):
    source = make("gptq-act", tmp_path / "source")
    with mlxq.load(source) as model:
        layer = model.module.model.layers[0].mlp.down_proj
        assert type(layer) is PermutedLinear
        assert (layer.bits, layer.group_size) == (4, 32)


def test_columns_out_of_order_stay_float_unless_asked(tmp_path):
    source = make("gptq-act", tmp_path / "source")
    plan = mlxq.convert(source, dry_run=True).plan
    kept = [p for p in plan.tensors if p.info.dtype == "GPTQ"]
    assert {p.action for p in kept} == {"keep"}
    assert all("act-order" in p.reason for p in kept)
    assert any("14 tensors" in note and "--bits" in note for note in plan.notes)
    anew = mlxq.convert(source, dry_run=True, bits=4).plan
    assert {p.action for p in anew.tensors if p.info.dtype == "GPTQ"} == {"requantize"}
    exact = mlxq.convert(source, dry_run=True, exact=True).plan
    assert {p.action for p in exact.tensors if p.info.dtype == "GPTQ"} == {"keep"}


def test_scales_are_wide_where_only_that_is_exact(tmp_path):
    symmetric = mlxq.convert(make("gptq", tmp_path / "sym"), dry_run=True).plan
    assert {p.dtype for p in symmetric.tensors if p.spec} == {"F16"}
    assert symmetric.notes == ()
    source = make("awq", tmp_path / "asym")
    wide = mlxq.convert(source, dry_run=True).plan
    assert {p.dtype for p in wide.tensors if p.spec} == {"F32"}
    assert {p.dtype for p in wide.tensors if not p.spec} == {"F16"}
    assert "--dtype float16" in wide.notes[0]
    narrow = mlxq.convert(source, tmp_path / "out", dtype="float16")
    assert {p.dtype for p in narrow.plan.tensors} == {"F16"}
    assert any("scales rounded to float16; relative error up to 0.000" in n for n in narrow.notes)
    with pytest.raises(mlxq.MlxqError, match="--exact: rounding to float16"):
        mlxq.convert(source, tmp_path / "exact", dtype="float16", exact=True)
    assert not (tmp_path / "exact").exists()


def test_stock_mlx_lm_runs_what_was_converted(tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm")
    source = make("awq", tmp_path / "source")
    mlxq.convert(source, tmp_path / "out", verify=False)
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    found = model(mx.array(TOKENS))
    assert found.dtype == mx.float32
    expected = logits(as_float(source, tmp_path / "float"))
    # The embedding and the norms are float16, as in the source; all behind the first product is float32.
    assert np.abs(np.array(found) - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "kind", "identical"), [("gptq", "Q4_0", True), ("awq", "Q4_1", False)])
def test_straight_to_gguf(name, kind, identical, tmp_path):
    source = tiny.add_merge(make(name, tmp_path / "source"))
    result = mlxq.convert(source, tmp_path / "out.gguf")
    packed = [p for p in result.plan.tensors if p.info.dtype in ("GPTQ", "AWQ")]
    assert {(p.action, p.dtype) for p in packed} == {("repack", kind)}
    assert result.verification.passed
    if identical:
        assert result.verification.n_identical == result.plan.n_weights
    else:
        assert any("scales rounded to float16" in n for n in result.notes)


def test_a_type_that_holds_no_offset_is_refused_with_exact(tmp_path):
    source = tiny.add_merge(make("awq", tmp_path / "source"))
    with pytest.raises(PlanError, match=r"--exact: .* Q4_1 does not hold"):
        mlxq.convert(source, tmp_path / "out.gguf", exact=True)


MOE = {
    "model_type": "qwen3_moe", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64, "norm_topk_prob": True,
    "vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "max_position_embeddings": 512, "torch_dtype": "float16", "bos_token_id": 257, "eos_token_id": 256,
}  # fmt: skip


def make_experts(directory, parts, settings):
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    norms = {"model.norm": 128, f"{layer}input_layernorm": 128, f"{layer}post_attention_layernorm": 128}
    norms |= {f"{layer}self_attn.q_norm": 32, f"{layer}self_attn.k_norm": 32}
    floats = {"model.embed_tokens": (320, 128), "lm_head": (320, 128), f"{layer}mlp.gate": (4, 128)}
    packed = {f"{layer}self_attn.{n}_proj": (s, 128) for n, s in (("q", 128), ("k", 64), ("v", 64), ("o", 128))}
    for e in range(4):
        expert = f"{layer}mlp.experts.{e}."
        packed |= {expert + "gate_proj": (64, 128), expert + "up_proj": (64, 128), expert + "down_proj": (128, 64)}
    tensors = {f"{n}.weight": np.ones(s, np.float16) for n, s in norms.items()}
    tensors |= {f"{n}.weight": (rng.standard_normal(s) * 0.1).astype(np.float16) for n, s in floats.items()}
    for module, shape in packed.items():
        w = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        tensors |= {f"{module}.{p}": a for p, a in parts(w).items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MOE | {"quantization_config": settings}))
    write_tensors(directory / "model.safetensors", tensors)
    tiny.write_tokenizer(directory)
    return directory


def test_experts_keep_their_codes(tmp_path):
    source = make_experts(tmp_path / "source", awq_parts, awq_settings())
    result = mlxq.convert(source, tmp_path / "out")
    stacks = [p for p in result.plan.tensors if p.info.module == "switch"]
    assert [(p.action, p.info.dtype, p.info.shape[0]) for p in stacks] == [("repack", "AWQ", 4)] * 3
    assert result.verification.n_identical == result.plan.n_weights
    w, stacked = decoded(source), decoded(tmp_path / "out")
    for e in range(4):
        np.testing.assert_array_equal(
            stacked["model.layers.0.mlp.switch_mlp.up_proj.weight"][e],
            w[f"model.layers.0.mlp.experts.{e}.up_proj.weight"],
        )


def test_experts_out_of_order_keep_their_codes_when_run(tmp_path):
    rng = np.random.default_rng(3)

    def parts(w):
        # Each expert in an order of its own.
        return gptq_parts(w, group_of=rng.permutation(np.arange(w.shape[1]) // 32))

    source = make_experts(tmp_path / "source", parts, gptq_settings(desc_act=True))
    plan = mlxq.convert(source, dry_run=True).plan
    assert {p.action for p in plan.tensors if p.info.module == "switch"} == {"keep"}
    as_float(source, tmp_path / "float")
    # Many tokens are sorted by expert.
    for tokens in (TOKENS, [list(range(40))]):
        expected = logits(tmp_path / "float", tokens)
        assert np.abs(logits(source, tokens) - expected).max() < 2e-3 * np.abs(expected).max()
    with mlxq.load(source) as model:
        experts = [m for m in model.module.modules() if isinstance(m, PermutedSwitchLinear)]
        assert sorted(m.order.shape for m in experts) == [(4, 64), (4, 128), (4, 128)]
