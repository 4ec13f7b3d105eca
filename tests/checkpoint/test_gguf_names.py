"""The table of names against the `gguf` package's own, and its two directions against each other."""

import gguf
import numpy as np
import pytest

from mlxq.checkpoint.gguf.heads import permuted_rows, unpermuted_rows
from mlxq.checkpoint.gguf.names import (
    ARCHITECTURES,
    architecture,
    architecture_for,
    map_name,
    to_gguf,
)
from mlxq.errors import CheckpointError

LAYER = 3
#: Hugging Face's names of what mlx-lm's `sanitize` has renamed.
RENAMED = {
    "block_sparse_moe.switch_mlp.gate_proj": "block_sparse_moe.experts.w1",
    "block_sparse_moe.switch_mlp.down_proj": "block_sparse_moe.experts.w2",
    "block_sparse_moe.switch_mlp.up_proj": "block_sparse_moe.experts.w3",
    "mlp.switch_mlp.": "mlp.experts.",
    "model.h.": "transformer.h.",
    "model.w": "transformer.w",
    "model.ln_f": "transformer.ln_f",
}
#: Norms of Command R+ alone, which is refused; and a draft model beside a model of the GLM family.
OTHER_PARTS = (*(f"blk.{LAYER}.attn_{p}_norm" for p in "qk"), f"blk.{LAYER}.nextn.")


def known(arch):
    """Every GGUF tensor of an architecture that our table has, by name without kind, and our parameter's name."""
    yield from arch.top.items()
    for stem, target in arch.layer.items():
        yield f"blk.{LAYER}.{stem}", f"{arch.layers}.{LAYER}.{target}"


def names_of_gguf(arch):
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    return number, gguf.get_tensor_name_map(number, LAYER + 1)


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(arch):
    _, theirs = names_of_gguf(arch)
    for name, parameter in known(arch):
        if name == "output" and arch.always_tied:
            continue
        for ours, hugging_face in RENAMED.items():
            parameter = parameter.replace(ours, hugging_face)
        assert theirs.get_name(parameter) == name


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_nothing_of_the_gguf_package_is_left_out(arch):
    number, _ = names_of_gguf(arch)
    theirs = {gguf.TENSOR_NAMES[t].replace("{bid}", str(LAYER)) for t in gguf.MODEL_TENSORS[number]}
    ours = {name for name, _ in known(arch)} | {name.removesuffix(".weight") for name in arch.rope_tensors}
    # llama holds dense models and mixtures in one list; q, k and v are one tensor or three; no file has the rotary
    # inverse.
    others = {name for a in ARCHITECTURES.values() if a.name == arch.name for name, _ in known(a)}
    fused = {f"blk.{LAYER}.attn_{p}" for p in ("q", "k", "v", "qkv")}
    left = {name for name in theirs - ours - others - fused if not name.startswith(OTHER_PARTS)}
    assert left <= {f"blk.{LAYER}.attn_rot_embd", "rope_freqs"}
    # What never occurs with an architecture, but does no harm: an output of its own, Llama 3's factors.
    assert ours - theirs <= {"output", "rope_freqs"}


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_both_directions_agree(arch, kind):
    for name, parameter in known(arch):
        there, back = to_gguf(arch, f"{parameter}.{kind}"), map_name(arch, f"{name}.{kind}")
        assert (there.name, back.name) == (f"{name}.{kind}", f"{parameter}.{kind}")
        for attribute in ("norm_offset", "heads"):
            assert getattr(there, attribute) == getattr(back, attribute)


def test_what_happens_to_values():
    llama, gemma = (ARCHITECTURES[m] for m in ("llama", "gemma3_text"))
    q, k, v = (to_gguf(llama, f"model.layers.0.self_attn.{p}_proj.weight") for p in "qkv")
    assert (q.heads, k.heads, v.heads) == ("num_attention_heads", "num_key_value_heads", None)
    assert (q.permuted, k.permuted, v.permuted) == (True, True, False)
    assert not to_gguf(ARCHITECTURES["qwen2"], "model.layers.0.self_attn.q_proj.weight").permuted
    assert to_gguf(gemma, "model.layers.0.self_attn.q_norm.weight").norm_offset == 1.0
    assert to_gguf(gemma, "model.norm.weight").norm_offset == 1.0
    assert to_gguf(gemma, "model.embed_tokens.weight").norm_offset == 0.0
    assert to_gguf(llama, "model.norm.weight").norm_offset == 0.0


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.sinks", "model.layers.x.input_layernorm.weight", "lm_head.scales", "model.weight"],
)
def test_unknown_parameters_have_no_name(name):
    assert to_gguf(ARCHITECTURES["llama"], name) is None


def test_permuted_rows_undo_unpermuted_rows():
    rows = np.arange(96)
    np.testing.assert_array_equal(unpermuted_rows(0, 96, 32)[permuted_rows(0, 96, 32)], rows)
    np.testing.assert_array_equal(permuted_rows(0, 96, 32)[unpermuted_rows(0, 96, 32)], rows)
    np.testing.assert_array_equal(permuted_rows(5, 70, 32), permuted_rows(0, 96, 32)[5:70])
    # The converter's own words.
    converted = rows.reshape(3, 2, 16).swapaxes(1, 2).reshape(96)
    np.testing.assert_array_equal(rows[permuted_rows(0, 96, 32)], converted)


def test_architecture_by_model_type():
    assert architecture_for({"model_type": "mistral"}) == ("llama", ARCHITECTURES["llama"])
    assert architecture_for({"model_type": "gemma3_text"})[0] == "gemma3"
    for model_type in ("mamba", None, 3, ["llama"]):
        with pytest.raises(
            CheckpointError, match=r"cannot be written as GGUF; supported are cohere, .*gemma2, .*qwen2"
        ):
            architecture_for({"model_type": model_type})


def test_experts_decide_between_model_types_of_one_architecture():
    assert architecture("llama", "m.gguf").model_type == "llama"
    assert architecture("llama", "m.gguf", experts=True).model_type == "mixtral"
    with pytest.raises(CheckpointError, match="'qwen2' with a mixture of experts is not supported"):
        architecture("qwen2", "m.gguf", experts=True)
