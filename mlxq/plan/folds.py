"""Where channels can be scaled without changing what a block computes: data, by the names of layers. Pure.

A channel that is divided by s where it is made, and multiplied by s in every matrix that takes it in, is the same
channel to the model, and another to whoever rounds the matrices (Lin et al. 2023, "AWQ"). Norms make the inputs of
attention and of the feed-forward part; values go through attention, and the linear half of a gated unit through the
gate, channel by channel.

Names alone do not prove that: a norm that comes after its part, a value that is normalized, an unknown layer that
takes the same input. Whoever folds tries it on the block first (`conversion.folding`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlxq.types import TensorInfo

#: Norms whose output attention takes in, and the feed-forward part; the first that a block has. Where a block has
#: none of the latter, one norm feeds both.
_BEFORE_ATTENTION = ("input_layernorm", "attention_norm", "attn_norm", "operator_norm", "ln_1", "norm_1", "norm1")
_BEFORE_MLP = (
    *("pre_feedforward_layernorm", "pre_ff_layernorm", "pre_mlp_layernorm", "post_attention_layernorm"),
    *("ffn_norm", "ff_norm", "ln_2", "norm_2", "norm2"),
)
_ATTENTION = r"(?:self_attn|attention|attn|self_attention)"
_MLP = r"(?:mlp|feed_forward|block_sparse_moe|ffn|ff|moe)"
_INNER = r"(?:switch_mlp|experts|shared_experts?|shared_mlp)"
_MERGED = ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "W_pack", "c_attn")
_ATTENTION_INPUTS = re.compile(
    rf"{_ATTENTION}\.(?:[qkvg]_proj|w[qkv]|q_a_proj|kv_a_proj_with_mqa|{'|'.join(_MERGED)})\.weight"
)
_MLP_INPUTS = re.compile(
    rf"{_MLP}\.(?:{_INNER}\.)?(?:gate_proj|up_proj|gate_up_proj|w1|w3|fc1|c_fc|dense_h_to_4h|gate|router|"
    r"router\.(?:layer|proj)|shared_expert_gate)\.weight"
)
_VALUES = re.compile(rf"({_ATTENTION})\.(v_proj|wv|{'|'.join(_MERGED)})\.weight")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_UPS = re.compile(rf"({_MLP}(?:\.{_INNER})?)\.(up_proj|gate_up_proj|w3)\.weight")
_DOWNS = ("down_proj", "w2")


@dataclass(frozen=True)
class Fold:
    """Channels between the one parameter that makes them and the matrices that take them in.

    Attributes:
        made_by: weight of a norm `[n]`, or a matrix `[..., N, J]` whose last `n` outputs are meant.
        taken_by: matrices `[..., M, K]`: all that have this input.
        n: channels.
        heads, head_dim: how many heads of the input share those of one head that is made; 1 and n where none do.
        is_norm: whether a norm makes them.
    """

    made_by: str
    taken_by: tuple[str, ...]
    n: int
    heads: int = 1
    head_dim: int = 1
    is_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "taken_by", tuple(self.taken_by))

    def spread(self, a: np.ndarray) -> np.ndarray:
        """Of the channels that are made, `[..., n]`, to those that are taken in, `[..., K]`."""
        if self.heads == 1:
            return a
        by_head = a.reshape(*a.shape[:-1], -1, 1, self.head_dim)
        return np.repeat(by_head, self.heads, axis=-2).reshape(*a.shape[:-1], -1)

    def gathered(self, a: np.ndarray) -> np.ndarray:
        """The other way, by the geometric mean over what shares a channel; `a` is positive."""
        if self.heads == 1:
            return a
        by_head = np.log(a).reshape(*a.shape[:-1], -1, self.heads, self.head_dim)
        return np.exp(by_head.mean(axis=-2)).reshape(*a.shape[:-1], -1)


def folds_of(tensors: Mapping[str, TensorInfo], path: str, n_heads: int | None) -> list[Fold]:
    """What may be folded in the block at `path` (`model.layers.3`), by its parameters' names and shapes.

    `n_heads` are the query heads, None where that is not known.
    """
    start = f"{path}."
    inside = {name.removeprefix(start): info for name, info in tensors.items() if name.startswith(start)}
    found = _of_norms(inside) + _of_values(inside, n_heads) + _of_gates(inside)
    return [
        Fold(start + f.made_by, tuple(start + name for name in f.taken_by), f.n, f.heads, f.head_dim, f.is_norm)
        for f in found
    ]


def _of_norms(inside: Mapping[str, TensorInfo]) -> list[Fold]:
    norms = [
        next((n for n in (f"{norm}.weight" for norm in of) if n in inside), None)
        for of in (_BEFORE_ATTENTION, _BEFORE_MLP)
    ]
    takers = [tuple(n for n in inside if of.fullmatch(n)) for of in (_ATTENTION_INPUTS, _MLP_INPUTS)]
    if norms[1] is None:
        norms, takers = norms[:1], [takers[0] + takers[1]]
    return [
        Fold(norm, of, inside[norm].shape[0], is_norm=True)
        for norm, of in zip(norms, takers, strict=True)
        if norm is not None and of and all(inside[n].shape[-1] == inside[norm].shape[0] for n in of)
    ]


def _of_values(inside: Mapping[str, TensorInfo], n_heads: int | None) -> list[Fold]:
    """Values and the output projection; of a merged matrix the last rows are the values."""
    out = []
    for name, info in inside.items():
        match = _VALUES.fullmatch(name)
        taker = _first(inside, match[1], _OUTPUTS) if match else None
        if taker is None or len(info.shape) != 2:
            continue
        K, rows = inside[taker].shape[-1], info.shape[0]
        n = (rows - K) // 2 if match[2] in _MERGED else rows
        if n == K:
            out.append(Fold(name, (taker,), n))
        elif n_heads and n > 0 and K % n_heads == 0 and K % n == 0 and n % (K // n_heads) == 0:
            out.append(Fold(name, (taker,), n, K // n, K // n_heads))
    return out


def _of_gates(inside: Mapping[str, TensorInfo]) -> list[Fold]:
    """The linear half of a gated unit, the last rows of a merged matrix, and the projection after it."""
    out = []
    for name, info in inside.items():
        match = _UPS.fullmatch(name)
        taker = _first(inside, match[1], _DOWNS) if match else None
        if taker is None or info.shape[:-2] != inside[taker].shape[:-2]:
            continue
        n = inside[taker].shape[-1]
        if info.shape[-2] == (2 * n if match[2] == "gate_up_proj" else n):
            out.append(Fold(name, (taker,), n))
    return out


def _first(inside: Mapping[str, TensorInfo], owner: str, names: tuple[str, ...]) -> str | None:
    return next((n for n in (f"{owner}.{name}.weight" for name in names) if n in inside), None)
