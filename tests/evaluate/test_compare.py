"""Every kind of difference between two artifacts of a model is found and named, and none is invented."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from gguf_models import add_byte_tokenizer, llama_weights, write_llama

from mlxq import CancelToken, compare
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import Cancelled, CheckpointError, UsageError
from mlxq.evaluate.comparison.configs import compare_configs
from mlxq.formats.floats import bf16_bits_to_float32, float32_to_bf16_bits

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("compare") / "source")


def load(directory: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(directory / "model.safetensors"))
    mx.eval(arrays)
    return dict(arrays)


def save(directory: Path, arrays: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "mlx"})


def copy(directory: Path, out: Path, **config: object) -> Path:
    """A copy of a model; `config` goes into its config.json."""
    shutil.copytree(directory, out)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def quantized(source: Path, out: Path, bits: int = 4, group_size: int = 64, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """What `mlx_lm.convert` writes: every matrix quantized, by mlx itself."""
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    copy(source, out, quantization=settings, quantization_config=settings)
    arrays = {}
    for name, w in load(source).items():
        w = w.astype(dtype)
        if w.ndim == 1:
            arrays[name] = w
            continue
        module = name.removesuffix(".weight")
        parts = mx.quantize(w, group_size=group_size, bits=bits)
        arrays |= zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True)
    save(out, arrays)
    return out


def by_name(comparison) -> dict:
    return {t.name: t for t in comparison.tensors}


def dequantized(directory: Path, bits: int = 4, group_size: int = 64) -> dict[str, np.ndarray]:
    """`scales * q + biases` in float64 from mlx's own unpacking: the yardstick of what is decoded."""
    arrays, out = load(directory), {}
    for name in (n for n in arrays if f"{n.removesuffix('.weight')}.scales" in arrays):
        module = name.removesuffix(".weight")
        w_q = arrays[name]
        ones = mx.ones(arrays[f"{module}.scales"].shape, mx.float32)
        codes = mx.dequantize(w_q, ones, ones * 0, group_size=group_size, bits=bits)
        parts = (np.array(arrays[f"{module}.{p}"].astype(mx.float32), np.float64) for p in ("scales", "biases"))
        scales, biases = (np.repeat(p, group_size, axis=-1) for p in parts)
        out[name] = scales * np.array(codes, np.float64) + biases
    return out


def test_a_model_is_identical_to_itself(source: Path, tmp_path: Path) -> None:
    for a, b in ((source, source), (quantized(source, tmp_path / "q"), tmp_path / "q")):
        found = compare(a, b)
        assert (found.passed, found.identical, found.failure) == (True, True, "")
        assert {t.status for t in found.tensors} == {"identical"}
        assert len(found.tensors) == 21
        assert found.config == ()
        assert found.tokenizer.same
        assert found.template.same


def test_float32_with_the_same_numbers_is_identical(source: Path, tmp_path: Path) -> None:
    other = copy(source, tmp_path / "f32", torch_dtype="float32")
    save(other, {n: a.astype(mx.float32) for n, a in load(source).items()})
    found = compare(source, other)
    assert found.identical, found.failure
    assert {(t.format_a, t.format_b) for t in found.tensors} == {("BF16", "F32")}


@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["one chunk", "many chunks"])
def test_one_weight_by_one_ulp(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: slice) -> None:
    if rows.start:
        monkeypatch.setattr("mlxq.evaluate.comparison.tensors._CHUNK", 128)
    arrays = load(source)
    bits = np.array(arrays[f"{DOWN}.weight"].view(mx.uint16))
    before = bf16_bits_to_float32(bits).astype(np.float64)
    bits[rows.start or 0, 5] += 1
    after = bf16_bits_to_float32(bits).astype(np.float64)
    other = copy(source, tmp_path / "ulp")
    save(other, arrays | {f"{DOWN}.weight": mx.array(bits).view(mx.bfloat16)})
    found = compare(source, other)
    assert not found.passed
    assert [t.name for t in found.outside] == [f"{DOWN}.weight"]
    tensor = found.outside[0]
    assert tensor.n_different == 1
    assert tensor.max_error == np.abs(after - before).max()
    # Sums of squares in float32, 2^15 of them: within 2^15 * 2^-24 at the very worst, and half of that in the root.
    assert tensor.rmse == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=2e-3)
    assert f"{DOWN}.weight" in found.failure
    assert compare(source, other, tolerance=2 * tensor.rmse).passed
    assert not compare(source, other, tolerance=2 * tensor.rmse).identical
    assert not compare(source, other, tolerance=tensor.rmse / 2).passed


def test_errors_are_those_of_the_exact_reconstruction(source: Path, tmp_path: Path) -> None:
    other = quantized(source, tmp_path / "q")
    found = by_name(compare(source, other, only=["tensors"]))
    w = {n: np.array(a.astype(mx.float32), np.float64) for n, a in load(source).items()}
    for name, w_hat in dequantized(other).items():
        difference = w_hat - w[name]
        # As above; an error of a weight is rounded to float32 twice, at 2^-24 of weights up to 2.
        assert found[name].rmse == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(w[name]), rel=2e-3)
        assert found[name].max_error == pytest.approx(np.abs(difference).max(), abs=2.0**-22)
        assert found[name].format_b == "4-bit g64 BF16"
    assert {t.status for t in found.values() if t.shape_a and len(t.shape_a) == 1} == {"identical"}


def test_one_code_is_found(source: Path, tmp_path: Path) -> None:
    a = quantized(source, tmp_path / "a")
    arrays = load(a)
    words = np.array(arrays[f"{DOWN}.weight"])
    words[3, 4] ^= 1
    save(copy(a, tmp_path / "b"), arrays | {f"{DOWN}.weight": mx.array(words)})
    found = compare(a, tmp_path / "b")
    assert [(t.name, t.n_different) for t in found.outside] == [(f"{DOWN}.weight", 1)]


def test_the_same_numbers_on_another_grid_are_identical(source: Path, tmp_path: Path) -> None:
    """A group of 64 is two groups of 32 with the same scale and bias."""
    a = quantized(source, tmp_path / "a")
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    b = copy(a, tmp_path / "b", quantization=settings, quantization_config=settings)
    arrays = load(a)
    save(b, {n: mx.repeat(v, 2, axis=-1) if n.endswith(("scales", "biases")) else v for n, v in arrays.items()})
    found = compare(a, b)
    assert found.identical, found.failure
    assert by_name(found)[f"{DOWN}.weight"].format_b == "4-bit g32 BF16"


def test_what_mx_dequantize_makes_of_a_model_is_recognized(source: Path, tmp_path: Path) -> None:
    a = quantized(source, tmp_path / "a")
    arrays, floats = load(a), {}
    for name, w in arrays.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" in arrays:
            scales, biases = (arrays[f"{module}.{p}"] for p in ("scales", "biases"))
            floats[name] = mx.dequantize(w, scales, biases, group_size=64, bits=4)
        elif w.ndim == 1:
            floats[name] = w
    b = copy(source, tmp_path / "b")
    save(b, floats)
    for pair in ((a, b), (b, a)):
        found = compare(*pair)
        assert found.passed, found.failure
        assert {t.status for t in found.tensors if len(t.shape_a) > 1} == {"rounded"}
    bits = np.array(floats[f"{DOWN}.weight"].view(mx.uint16))
    bits[-1, -1] ^= 1
    save(b, floats | {f"{DOWN}.weight": mx.array(bits).view(mx.bfloat16)})
    assert [t.name for t in compare(a, b).outside] == [f"{DOWN}.weight"]


def test_zeros_of_either_sign_are_the_same_number(source: Path, tmp_path: Path) -> None:
    arrays = load(source)
    w = arrays[f"{DOWN}.weight"]
    zeros = {f"{DOWN}.weight": mx.where(w > 0.05, mx.zeros_like(w), w)}
    save(copy(source, tmp_path / "a"), arrays | zeros)
    save(copy(source, tmp_path / "b"), arrays | {f"{DOWN}.weight": mx.where(w > 0.05, -mx.zeros_like(w), w)})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.identical
    assert by_name(found)[f"{DOWN}.weight"].status == "equal"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite(source: Path, tmp_path: Path, value: float) -> None:
    arrays = load(source)
    w = np.array(arrays[f"{DOWN}.weight"].astype(mx.float32))
    w[0, 0] = value
    save(copy(source, tmp_path / "b"), arrays | {f"{DOWN}.weight": mx.array(w).astype(mx.bfloat16)})
    found = compare(source, tmp_path / "b", tolerance=100)
    assert [t.name for t in found.outside] == [f"{DOWN}.weight"]
    assert "not finite" in found.failure
    tensors = {t["name"]: t for t in json.loads(json.dumps(found.to_dict(), allow_nan=False))["tensors"]}
    assert tensors[f"{DOWN}.weight"]["relative_rmse"] is None
    assert compare(tmp_path / "b", tmp_path / "b").identical


def test_weights_against_zeros(source: Path, tmp_path: Path) -> None:
    arrays = load(source)
    save(copy(source, tmp_path / "b"), arrays | {f"{DOWN}.weight": mx.zeros_like(arrays[f"{DOWN}.weight"])})
    assert by_name(compare(source, tmp_path / "b"))[f"{DOWN}.weight"].rmse == 1
    assert by_name(compare(tmp_path / "b", source))[f"{DOWN}.weight"].rmse == np.inf


def test_gguf_blocks_and_mlx_codes_of_the_same_numbers(tmp_path: Path) -> None:
    """Q4_1 against its affine grid, written here from the blocks' bytes: float16 `d`, `m`, then 16 bytes of nibbles."""
    import gguf

    # As many rows as `add_byte_tokenizer` has tokens.
    weights = llama_weights(tied=True, vocab=261)
    a = write_llama(tmp_path / "a.gguf", weights, "Q4_1", configure=add_byte_tokenizer)
    with open_checkpoint(a) as checkpoint:
        config, files = checkpoint.config, checkpoint.companion_files()
    b = tmp_path / "b"
    b.mkdir()
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    (b / "config.json").write_text(json.dumps(config | {"quantization": settings}))
    for name, content in files.items():
        (b / name).write_bytes(content)
    arrays = {}
    for name, w in weights.items():
        if w.ndim == 1:
            arrays[name] = mx.array(w)
            continue
        blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q4_1).reshape(w.shape[0], -1, 20)
        codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).reshape(w.shape)
        words = (codes.reshape(w.shape[0], -1, 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1)
        parts = [np.ascontiguousarray(blocks[..., i : i + 2]).view("<f2")[..., 0] for i in (0, 2)]
        module = name.removesuffix(".weight")
        arrays[name] = mx.array(words.astype(np.uint32))
        arrays |= {f"{module}.scales": mx.array(parts[0]), f"{module}.biases": mx.array(parts[1])}
    save(b, arrays)
    for pair in ((a, b), (b, a)):
        found = compare(*pair)
        assert found.identical, found.failure
        assert {t.status for t in found.tensors} == {"identical"}
    assert by_name(compare(a, b))[f"{DOWN}.weight"].format_a == "Q4_1"
    scale = np.array(arrays[f"{DOWN}.scales"])
    scale[0, 0] = np.nextafter(scale[0, 0], np.float16(np.inf))
    save(b, arrays | {f"{DOWN}.scales": mx.array(scale)})
    assert [t.name for t in compare(a, b).outside] == [f"{DOWN}.weight"]


def test_permuted_rows_of_a_gguf_line_up(tmp_path: Path) -> None:
    """Files of the llama family hold q and k in another order; the names differ as well."""
    weights = llama_weights(tied=False, vocab=300)
    config = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}
    config |= {"vocab_size": 300, "max_position_embeddings": 256}
    a = tiny.make_model(tmp_path / "a", tensors=weights, dtype="F32", tokenizer=False, **config)
    b = write_llama(tmp_path / "b.gguf", weights, "F32")
    found = compare(a, b)
    assert found.identical, found.failure
    assert any("tokenizer" in note for note in found.notes)
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"][::-1].copy()
    assert [t.name for t in compare(a, write_llama(b, weights, "F32")).outside] == [f"{DOWN}.weight"]


def test_tensors_on_one_side_only(source: Path, tmp_path: Path) -> None:
    arrays = load(source)
    del arrays["lm_head.weight"]
    save(copy(source, tmp_path / "b", tie_word_embeddings=True), arrays)
    found = compare(source, tmp_path / "b")
    assert [(t.name, t.status) for t in found.outside] == [("lm_head.weight", "only_a")]
    assert [d.key for d in found.config] == ["tie_word_embeddings"]
    assert "A: lm_head.weight" in found.failure
    assert by_name(compare(tmp_path / "b", source))["lm_head.weight"].status == "only_b"


def test_other_shapes(source: Path, tmp_path: Path) -> None:
    arrays = load(source)
    longer = {n: mx.concatenate([arrays[n], arrays[n][:8]]) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save(copy(source, tmp_path / "b", vocab_size=328), arrays | longer)
    found = compare(source, tmp_path / "b", tolerance=1)
    assert {t.name for t in found.outside} == set(longer)
    assert {t.status for t in found.outside} == {"shape"}
    assert "320 x 128 / 328 x 128" in found.failure
    assert "vocab_size is 320 / 328" in found.failure


def test_models_that_are_plainly_not_the_same(source: Path, tmp_path: Path) -> None:
    smaller = tiny.make_model(tmp_path / "smaller", hidden_size=64)
    found = compare(source, smaller)
    assert "hidden_size is 128 / 64" in found.failure
    assert "320 x 128 / 320 x 64" in found.failure
    assert found.tensors is None
    other = copy(source, tmp_path / "other", model_type="qwen2")
    assert "llama model, B a qwen2" in compare(source, other).failure


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_theta": 10001.0}, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"num_key_value_heads": 1, "head_dim": 32}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_settings_that_change_what_is_computed(source: Path, change: dict, key: str) -> None:
    config = json.loads((source / "config.json").read_text()) | {"hidden_act": "silu"}
    assert key in [d.key for d in compare_configs(config, config | change)]
    assert key in [d.key for d in compare_configs(config | change, config)]


def test_settings_that_do_not(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    harmless = {
        "head_dim": 32,
        "rms_norm_eps": float(np.float32(1e-5)),
        "transformers_version": "9",
        "use_cache": False,
    }
    harmless |= {"torch_dtype": "float32", "model_type": "mistral", "hidden_act": "silu", "initializer_range": 0.5}
    assert compare_configs(config, config | harmless) == ()
    assert compare(source, copy(source, tmp_path / "b", rope_theta=5000.0)).failure == ("rope_theta is 10000 / 5000")


def test_only_what_was_asked_for(source: Path, tmp_path: Path) -> None:
    arrays = load(source)
    save(copy(source, tmp_path / "b"), arrays | {f"{DOWN}.weight": arrays[f"{DOWN}.weight"] * 2})
    found = compare(source, tmp_path / "b", only=["config", "template"])
    assert found.passed
    assert (found.tensors, found.tokenizer) == (None, None)
    assert found.config == ()
    assert found.template.same
    with pytest.raises(UsageError, match="did you mean tensors"):
        compare(source, source, only=["tensor"])
    for tolerance in (-1, np.nan):
        with pytest.raises(UsageError, match="tolerance"):
            compare(source, source, tolerance=tolerance)


def test_predictions_where_asked_for(source: Path, tmp_path: Path) -> None:
    found = compare(source, quantized(source, tmp_path / "q"), logits=True)
    assert found.divergence.kl > 0
    assert compare(source, source, logits=True).divergence.kl == 0
    assert compare(source, source).divergence is None


def test_progress_and_cancelling(source: Path) -> None:
    events = []
    compare(source, source, progress=events.append)
    assert [e.stage for e in events] == ["compare"] * len(events)
    assert events[-1].done == events[-1].total > 0
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        compare(source, source, cancel=token, only=["tensors"])


def test_a_source_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        compare(source, "./nowhere")
    broken = copy(source, tmp_path / "b")
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="safetensors"):
        compare(source, broken)


def test_experts_stacked_by_mlx_lm_are_compared_with_separate_ones(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
    config |= {"num_experts_per_tok": 1, "vocab_size": 320}
    shapes = {n: s for n, s in tiny.llama_shapes(tiny.LLAMA).items() if ".mlp." not in n}
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{moe}.gate.weight"] = (2, 128)
        for e in range(2):
            sizes = {"w1": (256, 128), "w2": (128, 256), "w3": (256, 128)}
            shapes |= {f"{moe}.experts.{e}.{n}.weight": s for n, s in sizes.items()}
    tensors = tiny.random_tensors(shapes)
    a = tiny.make_model(tmp_path / "a", tensors=tensors, **config)
    assert compare(a, a, only=["tensors"]).identical
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    tensors[name] = bf16_bits_to_float32(float32_to_bf16_bits(tensors[name]))
    tensors[name][3, 3] *= 2
    found = compare(a, tiny.make_model(tmp_path / "b", tensors=tensors, **config), only=["tensors"])
    assert [(t.name.rpartition("block_sparse_moe.")[2], t.n_different) for t in found.outside] == [
        ("switch_mlp.down_proj.weight", 1)
    ]


@pytest.mark.slow
def test_stock_conversion_of_a_real_model(reference_checkpoint: Path, tmp_path: Path) -> None:
    """mlx-lm's own conversion: 4-bit group 64 of real weights is off by 0.09 to 0.12, and nothing else differs."""
    from mlx_lm import convert

    convert(str(reference_checkpoint), str(tmp_path / "q"), quantize=True, q_bits=4, q_group_size=64)
    found = compare(reference_checkpoint, tmp_path / "q", tolerance=0.13)
    assert found.passed, found.failure
    assert not found.identical
    assert max(t.rmse for t in found.tensors) > 0.08


@pytest.mark.slow
def test_a_real_gguf_and_its_mlx_repack_are_identical(smollm2_gguf: Path, tmp_path: Path) -> None:
    from mlxq import convert

    convert(smollm2_gguf, tmp_path / "q", verify=False)
    found = compare(smollm2_gguf, tmp_path / "q")
    assert found.identical, found.failure
    assert {t.status for t in found.tensors} == {"identical"}


@pytest.mark.parametrize("name", ["gemma3_text", "mixtral", "phi3", "gpt2", "cohere", "llama3"])
def test_architectures_as_gguf_are_identical(tmp_path: Path, name: str) -> None:
    """Other names, permuted rows, stacked experts, fused matrices, and norms that hold the weight plus 1."""
    import gguf_zoo

    a = gguf_zoo.save(tmp_path / "a", gguf_zoo.ZOO[name])
    b = gguf_zoo.write_gguf(a, tmp_path / "b.gguf")
    for pair in ((a, b), (b, a)):
        found = compare(*pair, only=["tensors", "config"])
        assert found.identical, found.failure
    statuses = {t.status for t in found.tensors}
    # Adding 1 to random float32 numbers and taking it off again loses their last bits.
    assert statuses == ({"identical", "equal"} if name.startswith("gemma") else {"identical"})


def test_a_norm_that_differs_where_a_gguf_adds_1(tmp_path: Path) -> None:
    import gguf_zoo

    a = gguf_zoo.save(tmp_path / "a", gguf_zoo.ZOO["gemma3_text"])
    b = gguf_zoo.write_gguf(a, tmp_path / "b.gguf")
    arrays = load(a)
    # One step of float32 between 1 and 2.
    step = mx.array([2.0**-23] + [0.0] * 63)
    save(a, arrays | {"model.norm.weight": arrays["model.norm.weight"] + step})
    assert "model.norm.weight" in [t.name for t in compare(a, b, only=["tensors"]).outside]
