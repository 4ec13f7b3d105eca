"""Where channels can be scaled, by names and shapes alone."""

from __future__ import annotations

import numpy as np
import pytest

from mlxq.plan.folds import Fold, folds_of
from mlxq.types import TensorInfo

PATH = "model.layers.3"


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    infos = {f"{PATH}.{name}.weight": shape for name, shape in shapes.items()}
    infos |= {"model.layers.30.mlp.up_proj.weight": (8, 8), "model.norm.weight": (8,)}
    return {name: TensorInfo(name, shape, "BF16", 0) for name, shape in infos.items()}


def found(shapes: dict[str, tuple[int, ...]], n_heads: int | None = 4) -> dict[str, Fold]:
    """By what makes the channels, inside the block."""
    folds = folds_of(tensors(shapes), PATH, n_heads)
    assert all(f.made_by.startswith(f"{PATH}.") for f in folds)
    return {f.made_by.removeprefix(f"{PATH}.").removesuffix(".weight"): f for f in folds}


def takers(fold: Fold) -> set[str]:
    return {n.removeprefix(f"{PATH}.").removesuffix(".weight") for n in fold.taken_by}


ATTENTION = {
    "input_layernorm": (64,),
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
}
MLP = {"post_attention_layernorm": (64,), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}


def test_a_block_of_llamas() -> None:
    folds = found(ATTENTION | MLP)
    assert {n: takers(f) for n, f in folds.items()} == {
        "input_layernorm": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
        "self_attn.v_proj": {"self_attn.o_proj"},
        "mlp.up_proj": {"mlp.down_proj"},
    }
    assert {n for n, f in folds.items() if f.is_norm} == {"input_layernorm", "post_attention_layernorm"}
    values = folds["self_attn.v_proj"]
    assert (values.n, values.heads, values.head_dim) == (32, 2, 16)


def test_the_norm_right_before_the_feed_forward_part() -> None:
    folds = found(ATTENTION | MLP | {"pre_feedforward_layernorm": (64,), "post_feedforward_layernorm": (64,)})
    assert "post_attention_layernorm" not in folds
    assert takers(folds["pre_feedforward_layernorm"]) == {"mlp.gate_proj", "mlp.up_proj"}


def test_one_norm_before_both_parts() -> None:
    folds = found({n: s for n, s in (ATTENTION | MLP).items() if n != "post_attention_layernorm"})
    assert len(takers(folds["input_layernorm"])) == 5


def test_merged_matrices_end_in_what_is_meant() -> None:
    folds = found(
        {
            "self_attn.qkv_proj": (128, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_up_proj": (192, 64),
            "mlp.down_proj": (64, 96),
        }
    )
    assert (folds["self_attn.qkv_proj"].n, folds["self_attn.qkv_proj"].heads) == (32, 2)
    assert folds["mlp.gate_up_proj"].n == 96


def test_experts_and_their_router_share_a_norm() -> None:
    folds = found(
        {
            "post_attention_layernorm": (64,),
            "mlp.gate": (4, 64),
            "mlp.switch_mlp.gate_proj": (4, 48, 64),
            "mlp.switch_mlp.up_proj": (4, 48, 64),
            "mlp.switch_mlp.down_proj": (4, 64, 48),
            "mlp.shared_expert.up_proj": (32, 64),
            "mlp.shared_expert.gate_proj": (32, 64),
            "mlp.shared_expert.down_proj": (64, 32),
            "mlp.shared_expert_gate": (1, 64),
        }
    )
    assert len(takers(folds["post_attention_layernorm"])) == 6
    assert takers(folds["mlp.switch_mlp.up_proj"]) == {"mlp.switch_mlp.down_proj"}
    assert takers(folds["mlp.shared_expert.up_proj"]) == {"mlp.shared_expert.down_proj"}


@pytest.mark.parametrize(
    "shapes",
    [
        {"mlp.fc1": (96, 64), "mlp.fc2": (64, 96)},
        {"mlp.up_proj": (96, 64), "mlp.down_proj": (64, 80)},
        {"input_layernorm": (64,), "self_attn.q_proj": (64, 32)},
        {"self_attn.v_proj": (24, 64), "self_attn.o_proj": (64, 64)},
    ],
    ids=["not gated", "other widths", "not what the norm makes", "no whole heads"],
)
def test_what_does_not_fit_is_left(shapes: dict[str, tuple[int, ...]]) -> None:
    assert found(shapes) == {}


def test_shared_heads_need_the_number_of_heads() -> None:
    assert "self_attn.v_proj" not in found(ATTENTION, None)
    assert "self_attn.v_proj" in found(ATTENTION | {"self_attn.v_proj": (64, 64)}, None)


def test_heads_share_the_scales_of_the_head_that_is_made() -> None:
    """As attention repeats keys and values: each for `heads` successive query heads."""
    fold = Fold("v", ("o",), n=6, heads=2, head_dim=3)
    a = np.arange(1.0, 7)
    assert fold.spread(a).tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert np.allclose(fold.gathered(fold.spread(a)), a)
    assert np.allclose(fold.gathered(np.array([1, 1, 1, 4, 4, 4, 1, 1, 1, 9.0, 9, 9])), [2, 2, 2, 3, 3, 3])
    by_expert = np.stack([a, 2 * a])
    assert fold.spread(by_expert).shape == (2, 12)
    plain = Fold("v", ("o",), n=6)
    assert plain.spread(a) is plain.gathered(a) is a
