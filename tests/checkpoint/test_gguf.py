"""GgufCheckpoint: names, row order, values, row ranges, and configurations that mlx-lm builds."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf_models import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    add_byte_tokenizer,
    add_tensor,
    finish,
    gguf_name,
    llama_weights,
    new_writer,
    permute,
    write_llama,
)

from mlxq.architectures.registry import build_model
from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.checkpoint.gguf.heads import unpermuted_rows
from mlxq.errors import CheckpointError, FormatError, MlxqError
from mlxq.formats.affine import unpack
from mlxq.types import QuantSpec

TYPES = {
    "F32": None,
    "F16": None,
    "BF16": None,
    "Q4_0": QuantSpec(4, 32),
    "Q4_1": QuantSpec(4, 32),
    "Q5_0": QuantSpec(5, 32),
    "Q5_1": QuantSpec(5, 32),
    "Q8_0": QuantSpec(8, 32),
}


def stored(w: np.ndarray, type_name: str) -> np.ndarray:
    """The float32 values a type stores for `w`."""
    kind = gguf.GGMLQuantizationType[type_name]
    return gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind).reshape(w.shape)


def as_float32(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a.astype(np.float32)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_reads_with_hugging_face_names_and_rows(tmp_path, type_name):
    weights = llama_weights()
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", weights, type_name)) as checkpoint:
        assert checkpoint.kind == "gguf"
        assert checkpoint.files() == [tmp_path / "m.gguf"]
        assert set(checkpoint.tensors) == set(weights)
        for name, w in weights.items():
            info = checkpoint.tensors[name]
            kind = type_name if w.ndim > 1 else "F32"
            assert (info.shape, info.dtype) == (w.shape, kind)
            assert info.spec == (TYPES[kind])
            assert info.scales_dtype == ("F16" if info.spec else None)
            assert info.nbytes == gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind]).nbytes
            values = checkpoint.read(name)
            assert values.dtype == {"F16": np.float16, "BF16": np.uint16}.get(kind, np.float32)
            np.testing.assert_array_equal(as_float32(values), stored(w, kind), err_msg=name)


@pytest.mark.parametrize("type_name", ["F16", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("rows", [slice(0, 7), slice(5, 6), slice(3, 29), slice(16, 32), slice(30, None), slice(9, 9)])
@pytest.mark.parametrize("tensor", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm"])
def test_rows_are_rows_of_the_whole(tmp_path, type_name, rows, tensor):
    name = f"model.layers.1.{tensor}.weight"
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", llama_weights(), type_name)) as checkpoint:
        whole = checkpoint.read(name)
        np.testing.assert_array_equal(checkpoint.read(name, rows), whole[rows])
        if checkpoint.tensors[name].spec:
            part, full = checkpoint.read_quantized(name, rows), checkpoint.read_quantized(name)
            for field in ("w_q", "scales", "biases"):
                np.testing.assert_array_equal(getattr(part, field), getattr(full, field)[rows])
            assert part.shape == (whole[rows].shape[0], HIDDEN)


@pytest.mark.parametrize("type_name", [t for t, spec in TYPES.items() if spec])
def test_quantized_codes_decode_to_the_values(tmp_path, type_name):
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", llama_weights(), type_name)) as checkpoint:
        for name in ("model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"):
            t = checkpoint.read_quantized(name)
            n, k = t.shape
            q = unpack(t.w_q, t.spec.bits, k).reshape(n, -1, 32).astype(np.float32)
            w_hat = t.scales[..., None].astype(np.float32) * q + t.biases[..., None].astype(np.float32)
            np.testing.assert_array_equal(w_hat.reshape(n, k), checkpoint.read(name))


def test_unpermuted_rows_inverts_the_converter():
    rows = np.arange(48)
    np.testing.assert_array_equal(permute(rows, 3)[unpermuted_rows(0, 48, 16)], rows)
    np.testing.assert_array_equal(permute(rows, 3)[unpermuted_rows(5, 37, 16)], rows[5:37])


def test_permuted_bias(tmp_path):
    weights = llama_weights()
    rng = np.random.default_rng(5)
    biases = {}
    for layer in range(LAYERS):
        for proj, heads in (("q", HEADS), ("k", KV_HEADS)):
            name = f"model.layers.{layer}.self_attn.{proj}_proj.bias"
            biases[name] = rng.normal(size=heads * HEAD_DIM).astype(np.float32)
    path = write_llama(tmp_path / "m.gguf", weights | biases)
    with GgufCheckpoint(path) as checkpoint:
        assert checkpoint.config["attention_bias"] is True
        for name, b in biases.items():
            np.testing.assert_array_equal(checkpoint.read(name), b)
            np.testing.assert_array_equal(checkpoint.read(name, slice(3, 21)), b[3:21])


def test_arrays_are_the_callers_own(tmp_path):
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", llama_weights())) as checkpoint:
        a = checkpoint.read("model.norm.weight")
        a += 1
        assert not np.array_equal(checkpoint.read("model.norm.weight"), a)


def test_tied_and_untied(tmp_path):
    with GgufCheckpoint(write_llama(tmp_path / "t.gguf", llama_weights())) as checkpoint:
        assert checkpoint.config["tie_word_embeddings"] is True
    with GgufCheckpoint(write_llama(tmp_path / "u.gguf", llama_weights(tied=False))) as checkpoint:
        assert checkpoint.config["tie_word_embeddings"] is False
        assert checkpoint.tensors["lm_head.weight"].shape == (VOCAB, HIDDEN)


def test_llama_config_builds_the_mlx_model(tmp_path):
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", llama_weights(), "Q4_1")) as checkpoint:
        expected = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "torch_dtype": "float16",
        }
        assert {k: checkpoint.config[k] for k in expected} == expected
        assert "rope_scaling" not in checkpoint.config
        _assert_model_takes(checkpoint)


def _assert_model_takes(checkpoint: GgufCheckpoint) -> None:
    """Every parameter of mlx-lm's model is in the checkpoint with its shape, and nothing is left over."""
    from mlx.utils import tree_flatten

    model = build_model(checkpoint.config)
    if checkpoint.config["tie_word_embeddings"] and "lm_head" in model:
        model.pop("lm_head")
    wanted = {name: a.shape for name, a in tree_flatten(model.parameters())}
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == wanted


def test_qwen3(tmp_path):
    weights = llama_weights()
    norms = {f"blk.{i}.attn_{p}_norm.weight": np.full(HEAD_DIM, 2.0, np.float32) for i in range(LAYERS) for p in "qk"}
    path = write_llama(tmp_path / "m.gguf", weights, arch="qwen3", extra=norms, qwen3__attention__key_length=HEAD_DIM)
    with GgufCheckpoint(path) as checkpoint:
        assert checkpoint.config["model_type"] == "qwen3"
        # No permutation for this architecture.
        name = "model.layers.0.self_attn.q_proj.weight"
        np.testing.assert_array_equal(checkpoint.read(name), weights[name])
        _assert_model_takes(checkpoint)


def test_qwen2_biases(tmp_path):
    weights = llama_weights()
    biases = {
        f"blk.{i}.attn_{p}.bias": np.arange(n * HEAD_DIM, dtype=np.float32)
        for i in range(LAYERS)
        for p, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    with GgufCheckpoint(write_llama(tmp_path / "m.gguf", weights, arch="qwen2", extra=biases)) as checkpoint:
        np.testing.assert_array_equal(
            checkpoint.read("model.layers.1.self_attn.k_proj.bias"), np.arange(KV_HEADS * HEAD_DIM)
        )
        _assert_model_takes(checkpoint)


def write_gemma(path, arch, weights, **numbers):
    """Gemma 2 or 3: four norms a layer, written with 1 added."""
    names = {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    }
    writer = new_writer(path, arch, **numbers)
    for name, w in weights.items():
        stem = name.split(".")[-2]
        target = f"blk.{name.split('.')[2]}.{names[stem]}.weight" if stem in names else gguf_name(name)
        add_tensor(writer, target, w + 1 if "norm" in name else w)
    finish(writer)
    return path


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_gemma(tmp_path, arch):
    weights = llama_weights()
    # Values with few bits: adding 1 and taking it off again is exact.
    rng = np.random.default_rng(1)
    extra = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in [n for n in weights if "norm" in n]:
        weights[name] = rng.integers(-8, 8, HIDDEN).astype(np.float32) / 16
    for layer in range(LAYERS):
        for stem in extra:
            weights[f"model.layers.{layer}.{stem}.weight"] = rng.integers(-8, 8, HIDDEN).astype(np.float32) / 16
        for stem in ("q_norm", "k_norm") if arch == "gemma3" else ():
            weights[f"model.layers.{layer}.self_attn.{stem}.weight"] = np.full(HEAD_DIM, 0.25, np.float32)
    numbers = {f"{arch}__attention__key_length": HEAD_DIM, f"{arch}__attention__sliding_window": 32}
    path = write_gemma(tmp_path / "m.gguf", arch, weights, **numbers)
    with GgufCheckpoint(path) as checkpoint:
        for name, w in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name), w, err_msg=name)
        assert checkpoint.config["sliding_window"] == 32
        assert checkpoint.config["query_pre_attn_scalar"] == HEAD_DIM
        assert checkpoint.config["tie_word_embeddings"] is True
        if arch == "gemma3":
            assert checkpoint.config["model_type"] == "gemma3_text"
            assert checkpoint.config["rope_local_base_freq"] == 10000.0
        _assert_model_takes(checkpoint)


def test_phi3(tmp_path):
    rng = np.random.default_rng(2)
    writer = new_writer(tmp_path / "m.gguf", "phi3", 1, phi3__rope__scaling__original_context_length=64)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_up": (2 * FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
        "rope_factors_long": (HEAD_DIM // 2,),
        "rope_factors_short": (HEAD_DIM // 2,),
    }
    for name, shape in shapes.items():
        add_tensor(writer, f"{name}.weight", rng.uniform(1, 2, shape).astype(np.float32))
    finish(writer)
    with GgufCheckpoint(tmp_path / "m.gguf") as checkpoint:
        scaling = checkpoint.config["rope_scaling"]
        assert scaling["type"] == scaling["rope_type"] == "longrope"
        assert len(scaling["long_factor"]) == len(scaling["short_factor"]) == HEAD_DIM // 2
        assert checkpoint.config["original_max_position_embeddings"] == 64
        assert not any("rope" in n for n in checkpoint.tensors)
        _assert_model_takes(checkpoint)


def llama3_divisors(factor: float, original: int, base: float = 10000.0, dim: int = HEAD_DIM) -> np.ndarray:
    """Frequency by frequency, in float32, as converters do."""
    out = []
    for i in range(0, dim, 2):
        wavelength = np.float32(2 * np.pi * base ** (i / dim))
        if wavelength < original / 4:
            out.append(1.0)
        elif wavelength > original:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama3_rope_scaling_is_derived(tmp_path, factor, original):
    divisors = llama3_divisors(factor, original)
    # At least one frequency lies between the two limits, so the rule is really tested.
    assert ((divisors > 1) & (divisors < factor)).any()
    path = write_llama(tmp_path / "m.gguf", llama_weights(), extra={"rope_freqs.weight": divisors})
    with GgufCheckpoint(path) as checkpoint:
        assert checkpoint.config["rope_scaling"] == {
            "rope_type": "llama3",
            "type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        model = build_model(checkpoint.config)
        freqs = np.array(model.layers[0].self_attn.rope._freqs)
        expected = 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM) * divisors
        # mlx computes the powers in float32: a few ulp.
        np.testing.assert_allclose(freqs, expected, rtol=1e-5)


def test_rope_freqs_of_ones_mean_no_scaling(tmp_path):
    ones = np.ones(HEAD_DIM // 2, np.float32)
    path = write_llama(tmp_path / "m.gguf", llama_weights(), extra={"rope_freqs.weight": ones})
    with GgufCheckpoint(path) as checkpoint:
        assert "rope_scaling" not in checkpoint.config
        assert "rope_freqs.weight" not in checkpoint.tensors


def test_rope_freqs_of_no_known_rule_are_refused(tmp_path):
    odd = np.linspace(1, 3, HEAD_DIM // 2).astype(np.float32)
    path = write_llama(tmp_path / "m.gguf", llama_weights(), extra={"rope_freqs.weight": odd})
    with pytest.raises(
        CheckpointError, match=r"rope_freqs.weight holds 8 frequency divisors that follow no known rule"
    ):
        GgufCheckpoint(path)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"llama__rope__scaling__factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}, {"factor": 2.0}),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 8.0,
                "llama__rope__scaling__original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
        ({"llama__rope__scaling__type": "none"}, None),
    ],
)
def test_rope_scaling_keys(tmp_path, numbers, expected):
    path = write_llama(tmp_path / "m.gguf", llama_weights(), **numbers)
    with GgufCheckpoint(path) as checkpoint:
        scaling = checkpoint.config.get("rope_scaling")
        assert scaling is None if expected is None else expected.items() <= scaling.items()
        build_model(checkpoint.config)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"llama__rope__scaling__type": "magic"}, "rope scaling 'magic' is not supported for llama"),
        ({"llama__expert_count": 8}, "tensor 'blk.0.ffn_gate.weight' is unknown to the architecture 'llama'"),
        ({"llama__attention__key_length": 0}, "llama.attention.key_length is 0, expected a positive integer"),
        ({"llama__attention__key_length": 32}, "rope.dimension_count is 16 of a head of 32: partial rotation"),
        ({"split__count": 3}, "one of 3 parts of a split GGUF"),
        ({"llama__block_count": 999999999}, "llama.block_count is 999999999, but the file has tensors of 2 blocks"),
    ],
)
def test_metadata_that_is_refused(tmp_path, numbers, message):
    path = write_llama(tmp_path / "m.gguf", llama_weights(), **numbers)
    with pytest.raises(MlxqError, match=message):
        GgufCheckpoint(path)


#: What a key may hold that was written by no converter.
HOSTILE = (
    *(np.array([1, 2], np.int32), np.array([], np.float32), ["a", "b"]),
    *("text", "", True, -1, 0, 2**63, 1e300, np.nan),
)
#: Keys that are read but that the small file lacks.
MORE_KEYS = (
    "split.count",
    "llama.expert_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.attention.key_length",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template",
    "general.alignment",
)


@pytest.mark.filterwarnings("error")
def test_no_value_of_any_key_gets_past_the_checks(tmp_path, monkeypatch):
    """Each key with each value opens, or is refused in one line."""
    path = write_llama(tmp_path / "m.gguf", llama_weights(vocab=300), configure=add_byte_tokenizer)
    parse, put = GgufFile._parse, {}
    monkeypatch.setattr(GgufFile, "_parse", lambda self: (parse(self), self.metadata.update(put)))
    with GgufCheckpoint(path) as checkpoint:
        keys = [*checkpoint.metadata.values, *MORE_KEYS]
    refused = {}
    for key in keys:
        for value in HOSTILE:
            put.clear()
            put[key] = value
            try:
                with GgufCheckpoint(path) as checkpoint:
                    checkpoint.companion_files()
                    assert 0 < checkpoint.config["rope_theta"] < np.inf
            except MlxqError as e:
                refused[key] = str(e)
    assert not any("\n" in message for message in refused.values())
    assert {"split.count", "llama.rope.scaling.type", "tokenizer.ggml.model", "llama.rope.freq_base"} <= refused.keys()


@pytest.mark.parametrize(("rows", "more"), [(300, 0), (261, 1)], ids=["shorter", "longer"])
def test_a_vocabulary_of_another_size_than_the_embedding(tmp_path, rows, more):
    """llama.cpp refuses both."""
    writer = new_writer(tmp_path / "m.gguf")
    add_byte_tokenizer(writer)
    writer.kv_data[0]["tokenizer.ggml.tokens"].value.extend(["more"] * more)
    for name, w in llama_weights(vocab=rows).items():
        add_tensor(writer, gguf_name(name), w)
    finish(writer)
    message = rf"tokenizer.ggml.tokens has {261 + more} entries, but token_embd.weight has {rows} rows, expected one"
    with pytest.raises(FormatError, match=message):
        GgufCheckpoint(tmp_path / "m.gguf")


def test_missing_key_is_named(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    add_tensor(writer, "token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    finish(writer)
    with pytest.raises(MlxqError, match=r"the metadata lacks llama.block_count"):
        GgufCheckpoint(tmp_path / "m.gguf")


def test_unsupported_architecture_is_named_and_the_supported_listed(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights(), arch="mamba")
    with pytest.raises(CheckpointError, match=r"architecture 'mamba' is not supported; supported are llama, qwen2"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.00.attn_q.weight", "blk.٠.attn_q.weight", "mystery"])
def test_unknown_tensor_is_named(tmp_path, name):
    path = write_llama(tmp_path / "m.gguf", llama_weights(), extra={name: np.zeros(HEADS, np.float32)})
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is unknown to the architecture 'llama'"):
        GgufCheckpoint(path)


def test_types_that_hold_no_weights_are_refused_by_tensor_and_type(tmp_path):
    path = tmp_path / "m.gguf"
    writer = new_writer(path)
    for name, w in llama_weights().items():
        add_tensor(writer, gguf_name(name), w)
    data = np.zeros((8, 292), np.uint8)
    writer.add_tensor("output.weight", data, raw_shape=data.shape, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    finish(writer)
    message = r"tensor 'output.weight' is Q8_K, which is no format of weights .* F32, F16, Q4_0, .*, NVFP4"
    with pytest.raises(CheckpointError, match=message):
        GgufCheckpoint(path)
    with GgufCheckpoint(path, metadata_only=True) as checkpoint:
        info = checkpoint.tensors["lm_head.weight"]
        assert (info.dtype, info.shape, info.nbytes, info.spec) == ("Q8_K", (8, 256), 8 * 292, None)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read("lm_head.weight")
        checkpoint.read("model.norm.weight")


def test_reading_errors(tmp_path):
    path = write_llama(tmp_path / "m.gguf", llama_weights())
    checkpoint = GgufCheckpoint(path)
    with pytest.raises(CheckpointError, match=r"no tensor 'model.nothing'"):
        checkpoint.read("model.nothing")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is F32, which has no affine grid"):
        checkpoint.read_quantized("model.norm.weight")
    with pytest.raises(CheckpointError, match="not with step 2"):
        checkpoint.read("model.norm.weight", slice(0, 8, 2))
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size // 2)
    last = list(checkpoint.tensors)[-1]
    with pytest.raises(CheckpointError, match="the file changed since it was opened"):
        checkpoint.read(last)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="read after close"):
        checkpoint.read("model.norm.weight")


def test_scale_without_affine_form_names_the_tensor(tmp_path):
    weights = llama_weights()
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = 65504.0
    with (
        GgufCheckpoint(write_llama(tmp_path / "m.gguf", weights, "Q8_0")) as checkpoint,
        pytest.raises(
            CheckpointError, match=rf"tensor '{name}': Q8_0: block 0 has scale .* beyond the largest float16"
        ),
    ):
        checkpoint.read_quantized(name)


def test_generation_config_lists_every_end(tmp_path):
    def configure(writer):
        tokens = [f"t{i}" for i in range(VOCAB)]
        tokens[1:6] = ["<s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"]
        # The last one looks like an end but is an ordinary word here.
        types = [3 if 1 <= i <= 4 else 1 for i in range(VOCAB)]
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(3)

    path = write_llama(tmp_path / "m.gguf", llama_weights(), configure=configure)
    with GgufCheckpoint(path) as checkpoint:
        assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [3, 2, 4]}
        assert checkpoint.config["eos_token_id"] == 3
        assert checkpoint.config["bos_token_id"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_memory_does_not_grow_with_the_file(tmp_path):
    rows = 40_000
    writer = new_writer(tmp_path / "m.gguf")
    for name, w in llama_weights(vocab=rows).items():
        add_tensor(writer, gguf_name(name), w if w.shape[0] != rows else np.zeros((rows, 512), np.float32))
    finish(writer)
    # A process of its own: this one's peak was set when the file was made.
    code = f"""
import resource
from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint
checkpoint = GgufCheckpoint({str(tmp_path / "m.gguf")!r})
name = "model.embed_tokens.weight"
assert checkpoint.tensors[name].nbytes > 80e6
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, {rows}, 1000):
    checkpoint.read(name, slice(start, start + 1000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    # One range is 2 MB, read and copied once: far below the tensor's 82 MB.
    assert int(grown) < 15_000


def test_smollm2(smollm2_gguf):
    with GgufCheckpoint(smollm2_gguf) as checkpoint:
        expected = {
            "model_type": "llama",
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        assert {k: checkpoint.config[k] for k in expected} == expected
        _assert_model_takes(checkpoint)
