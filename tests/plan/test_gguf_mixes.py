"""Every choice of `gguf_types` against llama.cpp's own, tensor by tensor, on files of tiny tensors."""

from itertools import pairwise

import gguf
import numpy as np
import pytest

from mlxq.errors import PlanError
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.plan.gguf_file_types import FILE_TYPES, file_type
from mlxq.plan.gguf_mixes import GgufModel, bpw, gguf_types, stays_float
from mlxq.plan.gguf_overrides import TENSOR_TYPES
from mlxq.plan.roles import is_sensitive

#: Weights of one block by layout: GGUF stem -> (role of its first axes); "K" stands for the row.
DENSE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
EXPERTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def tensors(stems=DENSE, layers=4, K=256, tied=True, extra=()):
    """Names and shapes of a model whose matrices have two rows: llama.cpp's choice looks at no more than the rows."""
    shapes = {"token_embd.weight": (2, K), "output_norm.weight": (K,)}
    if not tied:
        shapes["output.weight"] = (2, K)
    for i in range(layers):
        for stem in stems:
            shapes[f"blk.{i}.{stem}.weight"] = (2, 2, K) if stem.endswith("_exps") else (2, K)
        shapes[f"blk.{i}.attn_norm.weight"] = (K,)
        shapes[f"blk.{i}.attn_output.bias"] = (K,)
    return list((shapes | dict(extra)).items())


#: name -> (model, tensors, most of the rows' width)
MODELS = {
    "tied": (GgufModel("llama", 4, 4, 4), tensors()),
    "untied": (GgufModel("llama", 4, 4, 4), tensors(tied=False)),
    "32 layers": (GgufModel("llama", 32, 4, 2), tensors(layers=32, tied=False)),
    "22 layers": (GgufModel("llama", 22, 4, 4), tensors(layers=22)),
    "shared heads": (GgufModel("llama", 16, 8, 2), tensors(layers=16)),
    "70B": (GgufModel("llama", 80, 8, 1), tensors(("attn_v", "ffn_down"), layers=80)),
    "65B": (GgufModel("llama", 80, 4, 4), tensors(("attn_v", "ffn_down"), layers=80)),
    "qwen2 72B": (GgufModel("qwen2", 80, 8, 1), tensors(("attn_v", "ffn_down"), layers=80)),
    "qwen2": (GgufModel("qwen2", 8, 14, 2), tensors(layers=8)),
    "qwen3": (GgufModel("qwen3", 12, 4, 2), tensors((*DENSE, "attn_q_norm"), layers=12)),
    "gemma": (GgufModel("gemma", 18, 8, 1), tensors(layers=18)),
    "gemma3": (GgufModel("gemma3", 26, 4, 1), tensors((*DENSE, "post_attention_norm"), layers=26)),
    "phi3": (GgufModel("phi3", 16, 4, 4), tensors(FUSED, layers=16, tied=False)),
    "mixtral": (GgufModel("llama", 16, 8, 2, 8), tensors(EXPERTS, layers=16, tied=False)),
    "4 experts": (GgufModel("llama", 16, 4, 4, 4), tensors(EXPERTS, layers=16, tied=False)),
    "qwen3moe": (GgufModel("qwen3moe", 16, 8, 1, 128), tensors(EXPERTS, layers=16)),
    "rows of 96": (GgufModel("llama", 16, 4, 4), tensors(layers=16, K=96, tied=False)),
    "rows of 96, tied": (GgufModel("llama", 16, 8, 2), tensors(layers=16, K=96)),
    "experts of 96": (GgufModel("llama", 16, 4, 4, 8), tensors(EXPERTS, layers=16, K=96)),
    "gpt2": (
        GgufModel("gpt2", 12, 4, 4),
        tensors(FUSED, layers=12, extra={"position_embd.weight": (2, 256), "output_norm.bias": (256,)}),
    ),
    # A matrix of one row is a vector to ggml, and not every layer has every tensor.
    "odd tensors": (
        GgufModel("llama", 16, 4, 4),
        [t for t in tensors(layers=16) if t[0] not in ("blk.3.attn_v.weight", "blk.5.ffn_down.weight")]
        + [("blk.3.attn_v.weight", (1, 256)), ("blk.5.something.weight", (2, 3, 256)), ("lora.scale", (2, 256))],
    ),
}


def write(path, model, shapes):
    """A file that llama.cpp's quantizer opens: hyperparameters, and tensors of zeros."""
    writer = gguf.GGUFWriter(str(path), model.arch)
    writer.add_block_count(model.n_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(2)
    writer.add_sliding_window(32)
    writer.add_rope_dimension_count(256 // model.n_heads)
    if model.n_experts:
        writer.add_expert_count(model.n_experts)
        writer.add_expert_used_count(2)
    for name, shape in shapes:
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("with_imatrix", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "imatrix"])
@pytest.mark.parametrize("case", MODELS)
def test_every_type_is_llama_cpps(tmp_path, case, with_imatrix):
    import cyllama_quantize

    model, shapes = MODELS[case]
    src = write(tmp_path / "m.gguf", model, shapes)
    weights = {n: np.ones(s[:-2] + s[-1:], np.float32) for n, s in shapes if len(s) > 1} if with_imatrix else None
    for name, (number, _) in FILE_TYPES.items():
        if name == "F32" or (name == "Q2_K_S" and not with_imatrix):
            continue
        ours = gguf_types(shapes, name, model, has_imatrix=with_imatrix)
        reader = cyllama_quantize.quantize(src, tmp_path / "q.gguf", name, weights)
        theirs = cyllama_quantize.types(reader)
        assert {p.name: p.type_name for p in ours} == theirs, name
        assert {p.name: p.nbytes for p in ours} == {t.name: t.n_bytes for t in reader.tensors}, name
        assert reader.fields["general.file_type"].contents() == number
        assert all(p.reason for p in ours)


def test_numbers_of_the_file_types():
    for name, (number, base) in FILE_TYPES.items():
        full = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert number == gguf.LlamaFileType[full]
        assert base in BLOCK_FORMATS
    assert {base for _, base in FILE_TYPES.values()} == set(TENSOR_TYPES)


def test_short_names_and_case():
    assert file_type("q4_k") == ("Q4_K_M", 15, "Q4_K")
    assert file_type("Q5_K")[0] == "Q5_K_M"
    with pytest.raises(PlanError, match=r"type 'Q4' .did you mean Q4_1.*: choose one of F32, F16.*Q4_K_M.*IQ4_XS"):
        file_type("Q4")


def test_f32_is_f32():
    model, shapes = MODELS["mixtral"]
    assert {p.type_name for p in gguf_types(shapes, "f32", model)} == {"F32"}


def test_rows_that_no_block_divides_are_float16():
    """llama.cpp refuses these; its older versions wrote float16 as here."""
    plans = gguf_types(tensors(layers=1, K=40, tied=False), "Q4_K_M", GgufModel("llama", 1, 4, 4))
    plan = {p.name: p for p in plans}
    assert plan["blk.0.attn_q.weight"].type_name == "F16"
    assert "blocks of 256, which do not divide rows of 40, nor do blocks of 32" in plan["blk.0.attn_q.weight"].reason
    assert plan["output.weight"].type_name == "F16"
    assert plan["blk.0.attn_norm.weight"].type_name == "F32"


def test_reasons_say_what_happened():
    plan = {p.name: p.reason for p in gguf_types(MODELS["rows of 96"][1], "Q4_K_M", MODELS["rows of 96"][0])}
    assert plan["blk.3.attn_q.weight"] == (
        "Q4_K_M: Q4_K; Q4_K packs blocks of 256, which do not divide rows of 96: Q5_0 instead"
    )
    assert "a sensitive layer" in plan["blk.0.ffn_down.weight"]
    assert plan["output.weight"] == "Q4_K_M: output"
    assert stays_float("blk.0.ffn_gate_inp.weight", (8, 256)).startswith("a router")
    assert stays_float("blk.0.ffn_down.weight", (8, 256)) is None


def test_more_bits():
    """The layers of 32 that llama.cpp's rule names, counted by hand."""
    assert [i for i in range(32) if is_sensitive(i, 32)] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_bits_per_weight_grow_along_the_mixes():
    model, shapes = MODELS["32 layers"]
    order = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32"]
    sizes = [bpw(gguf_types(shapes, name, model)) for name in order]
    assert all(a < b for a, b in pairwise(sizes))
    # 12 F32 values beside each 16 rows of matrices: exact arithmetic of one file.
    floats = sum(s[0] for _, s in shapes if len(s) == 1)
    matrices = sum(s[0] * s[1] for _, s in shapes if len(s) == 2)
    assert bpw(gguf_types(shapes, "F16", model)) == pytest.approx((16 * matrices + 32 * floats) / (matrices + floats))


def test_overrides_change_what_they_name_and_nothing_else():
    model, shapes = MODELS["32 layers"]
    plain = {p.name: p.type_name for p in gguf_types(shapes, "Q4_K_M", model)}
    wish = (r"blk\.0\.attn_v=q8_0", "attn_k=Q5_K", r"blk\.7\.attn_k=F16", "^output.weight$=Q4_0")
    asked = {p.name: p for p in gguf_types(shapes, "Q4_K_M", model, overrides=wish)}
    assert asked["blk.0.attn_v.weight"].type_name == "Q8_0"
    assert asked["blk.6.attn_k.weight"].type_name == "Q5_K"
    assert asked["blk.7.attn_k.weight"].type_name == "F16"
    assert asked["output.weight"].type_name == "Q4_0"
    assert asked["blk.6.attn_k.weight"].reason == "--tensor-type attn_k=Q5_K"
    named = {"blk.0.attn_v.weight", "output.weight", *(n for n in plain if "attn_k." in n)}
    assert {n for n in plain if plain[n] != asked[n].type_name} <= named


def test_an_override_falls_back_too():
    model, shapes = MODELS["rows of 96"]
    plans = gguf_types(shapes, "Q8_0", model, overrides=["ffn_down=Q3_K"])
    assert {p.type_name for p in plans if "ffn_down" in p.name} == {"Q4_0"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ffn_down", r"'ffn_down': write REGEX=TYPE, e.g. 'ffn_down=Q6_K'"),
        ("=Q6_K", "write REGEX=TYPE"),
        ("ffn_down=Q7_K", "unknown type 'Q7_K': choose one of F32, F16"),
        ("ffn_(=Q6_K", "is not a regular expression"),
        ("ffn_sideways=Q6_K", "pattern 'ffn_sideways=Q6_K' matches no tensor"),
        ("attn_norm=Q8_0", r"matches only what stays float32, such as blk.0.attn_norm.weight \(a vector\)"),
    ],
)
def test_bad_overrides(override, message):
    model, shapes = MODELS["tied"]
    with pytest.raises(PlanError, match=message):
        gguf_types(shapes, "Q4_K_M", model, overrides=[override])


def test_q2_k_s_needs_an_importance_matrix():
    model, shapes = MODELS["tied"]
    with pytest.raises(PlanError, match="needs an importance matrix"):
        gguf_types(shapes, "Q2_K_S", model)
    gguf_types(shapes, "Q2_K_S", model, has_imatrix=True)


def test_a_published_file_has_these_types(smollm2_gguf):
    """SmolLM2's rows of 576 and 1536: fallbacks beside whole super-blocks, as llama.cpp's quantizer left them."""
    from mlxq.checkpoint.gguf.file import GgufFile

    file = GgufFile(smollm2_gguf)
    keys = ("block_count", "attention.head_count", "attention.head_count_kv")
    model = GgufModel("llama", *(file.metadata[f"llama.{key}"] for key in keys))
    plans = gguf_types([(t.name, t.shape) for t in file.tensors.values()], "Q4_1", model)
    assert {p.name: p.type_name for p in plans} == {t.name: t.type_name for t in file.tensors.values()}
