"""The ggml type of each tensor of a GGUF file: llama.cpp's file types ("mixes") and fallbacks. Pure.

A file type such as `Q4_K_M` names a base type and gives more bits to the tensors whose errors cost most. The choices
are those of llama.cpp b9190 and later (source: `llama_tensor_get_type` and `tensor_allows_quantization` in
`src/llama-quant.cpp`); older versions fell back from Q2_K and Q3_K to IQ4_NL, and had a rule of their own for
`attn_qkv`. Falcon's exceptions and the types below Q2_K are left out: mlxq writes neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mlxq.errors import PlanError
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.plan.gguf_file_types import file_type
from mlxq.plan.gguf_overrides import Overrides
from mlxq.plan.roles import is_sensitive

_FLOAT = ("F32", "F16", "BF16")
#: Type whose blocks of 256 do not divide a row -> the type of blocks of 32 that takes its place.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

#: Names of weights that stay float although they are matrices: small, and read by few operations.
_STAYS_FLOAT = (
    ("_norm.weight", "a norm"),
    ("ffn_gate_inp.weight", "a router: it decides which experts run"),
    ("position_embd.weight", "position embeddings"),
    ("token_types.weight", "token types"),
    ("ssm_conv1d", "a small convolution"),
    ("shortconv.conv.weight", "a small convolution"),
    ("attn_rel_b.weight", "relative positions"),
    ("altup", "a small matrix"),
    ("laurel", "a small matrix"),
    ("per_layer_model_proj", "a small matrix"),
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"
#: Parts of names -> roles, the first that is found.
_ROLES = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_down", "ffn_down"),
)
#: File types whose attn_output gets Q5_K in models of 8 experts, and what it gets in others.
_OUTPUT_OF_8_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
_ATTN_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_BLOCK = re.compile(r"blk\.(\d+)\.")
_SENSITIVE = "a sensitive layer (the first and last eighth, every third between)"


@dataclass(frozen=True)
class GgufModel:
    """What of a model the choices depend on. `arch` is `general.architecture`; heads are those of the first layer.

    `n_experts` is 0 for a dense model.
    """

    arch: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int = 0

    @property
    def n_gqa(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """What llama.cpp calls a 70B model: there a small attn_v serves eight heads."""
        return self.n_layers == 80 and (self.arch == "qwen2" or (self.arch == "llama" and self.n_gqa != 1))


@dataclass(frozen=True)
class GgufTensorPlan:
    """The type of one tensor, and why. `shape` is row-major and counts weights: `[..., N, K]`.

    `instead_of` is the type that the file type asks for, where its blocks do not divide the rows.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    reason: str
    instead_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, padding not counted."""
        geometry = BLOCK_FORMATS[self.type_name]
        return prod(self.shape) // geometry.block_size * geometry.type_size


def gguf_types(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    file_type_name: str,
    model: GgufModel,
    *,
    has_imatrix: bool = False,
    overrides: Sequence[str] = (),
) -> list[GgufTensorPlan]:
    """The type of every tensor, in the order given.

    Args:
        tensors: all tensors of the file as (GGUF name, row-major shape in weights).
        file_type_name: a key of `FILE_TYPES`, or a short form of one.
        has_imatrix: an importance matrix weights the errors, which changes some choices.
        overrides: `REGEX=TYPE`, searched in the GGUF name; the last that matches wins. Unlike in llama.cpp, an
            override changes the tensors that it names and no others.

    Raises:
        PlanError: no such file type or type, a malformed pattern or one that names no matrix, or a file type that
            needs an importance matrix and has none.
    """
    name, _, base = file_type(file_type_name)
    chooser = _Chooser(name, base, model, has_imatrix, tensors)
    patterns = Overrides(overrides)
    plans = []
    for tensor, shape in tensors:
        kept = stays_float(tensor, shape)
        asked = patterns.find(tensor, kept)
        if kept is not None:
            plans.append(GgufTensorPlan(tensor, shape, "F32", kept))
            continue
        kind, reason = asked or chooser.choose(tensor, shape[-1])
        fitting, why = _fit(kind, reason, shape[-1])
        plans.append(GgufTensorPlan(tensor, shape, fitting, why, None if fitting == kind else kind))
    patterns.refuse_unmatched()
    if name == "Q2_K_S" and not has_imatrix:
        _refuse_plain_q2_k_s(plans)
    return plans


def bpw(plans: Sequence[GgufTensorPlan]) -> float:
    """Bits per weight over all tensors, floats, scales and fallbacks counted."""
    return 8 * sum(p.nbytes for p in plans) / max(sum(prod(p.shape) for p in plans), 1)


def stays_float(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor is stored as F32 in every file type, or None for a matrix that may be quantized."""
    if sum(1 for n in shape[:-1] if n > 1) == 0:
        return "a vector"
    if not name.endswith("weight"):
        return "no weight of a matrix product"
    return next((why for part, why in _STAYS_FLOAT if part in name), None)


def _fit(kind: str, reason: str, K: int) -> tuple[str, str]:
    """The type itself, or the one that takes its place where its blocks do not divide rows of `K` weights."""
    needed = BLOCK_FORMATS[kind].block_size
    if K % needed == 0:
        return kind, reason
    other = _FALLBACK.get(kind, "F16")
    why = f"{reason}; {kind} packs blocks of {needed}, which do not divide rows of {K}"
    if K % BLOCK_FORMATS[other].block_size:
        return "F16", f"{why}, nor do blocks of 32: float16"
    return other, f"{why}: {other} instead"


class _Chooser:
    """The choice for one tensor that may be quantized, before its rows are looked at."""

    def __init__(self, name: str, base: str, model: GgufModel, has_imatrix: bool, tensors: Sequence):
        self.name, self.base, self.model, self.has_imatrix = name, base, model, has_imatrix
        self.tied = all(tensor != _OUTPUT for tensor, _ in tensors)
        self.n_values = sum(_role(tensor) == "attn_v" for tensor, _ in tensors)
        # llama.cpp counts attn_v and ffn_down tensors as they come in its order: by block, then by name.
        self._ordinals: dict[str, int] = {}
        counts: dict[str, int] = {}
        for tensor, shape in sorted(tensors, key=lambda t: (_block(t[0]), t[0])):
            role = _role(tensor)
            if stays_float(tensor, shape) is None:
                self._ordinals[tensor] = counts.get(role, 0)
                counts[role] = counts.get(role, 0) + 1

    def choose(self, tensor: str, K: int) -> tuple[str, str]:
        base = self.base, f"{self.name}: {self.base}"
        if self.base in _FLOAT:
            return self.base, self.name
        if tensor == _OUTPUT or (self.tied and tensor in _EMBEDDINGS):
            return self._output(K, "output" if tensor == _OUTPUT else "embedding that is the output too")
        role = _role(tensor)
        if tensor in _EMBEDDINGS or role is None:
            return base
        found = getattr(self, f"_{role}")(tensor)
        return (found[0], f"{self.name}: {role}{found[1]}") if found else base

    def _output(self, K: int, what: str) -> tuple[str, str]:
        if self.base == "Q8_0" or K % BLOCK_FORMATS[self.base].block_size:
            return "Q8_0", f"{self.name}: {what}"
        return "Q6_K", f"{self.name}: {what}"

    def _attn_v(self, tensor: str) -> tuple[str, str] | None:
        if self.model.n_experts == 8:
            return "Q8_0", " of a model of 8 experts, where it is small"
        found = self._attn_v_of_mix(self._ordinals[tensor])
        if self.model.is_70b and (found[0] if found else self.base) in ("Q3_K", "Q4_K"):
            return "Q5_K", " of a 70B model, where it is small"
        return found

    def _attn_v_of_mix(self, i: int) -> tuple[str, str] | None:
        shared = self.model.n_gqa >= 4
        if self.name in ("Q2_K", "Q2_K_S", "IQ4_NL", "IQ4_XS") and shared:
            kind = "Q5_K" if self.name.startswith("IQ4") else "Q4_K"
            return kind, f", shared by {self.model.n_gqa} heads"
        if self.name == "Q2_K":
            return "Q3_K", ""
        if self.name == "Q3_K_M":
            return ("Q5_K", " of the first two layers") if i < 2 else ("Q4_K", "")
        if self.name == "Q3_K_L":
            return "Q5_K", ""
        if self.name in ("Q4_K_M", "Q5_K_M") and is_sensitive(i, self.n_values):
            return "Q6_K", f" of {_SENSITIVE}"
        if self.name == "Q4_K_S" and i < 4:
            return "Q5_K", " of the first four layers"
        return None

    def _attn_k(self, tensor: str) -> tuple[str, str] | None:
        return ("Q8_0", " of a model of 8 experts, where it is small") if self.model.n_experts == 8 else None

    def _attn_output(self, tensor: str) -> tuple[str, str] | None:
        if self.model.n_experts == 8:
            return ("Q5_K", " of a model of 8 experts") if self.name in _OUTPUT_OF_8_EXPERTS else None
        kind = _ATTN_OUTPUT.get(self.name)
        return (kind, "") if kind else None

    def _ffn_down(self, tensor: str) -> tuple[str, str] | None:
        n = self.model.n_layers
        i = _block(tensor) if self.model.n_experts > 1 else self._ordinals[tensor]
        if self.name in ("Q2_K", "Q3_K_L"):
            return ("Q3_K" if self.name == "Q2_K" else "Q5_K"), ""
        if self.name == "Q3_K_M":
            return ("Q5_K", " of the first sixteenth of the layers") if i < n // 16 else ("Q4_K", "")
        if self.name in ("Q4_K_M", "Q5_K_M"):
            return ("Q6_K", f" of {_SENSITIVE}") if is_sensitive(i, n) else None
        early = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K"}
        early |= {"Q4_0": "Q4_1", "Q5_0": "Q5_1"} if self.has_imatrix else {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
        if i < n // 8 and self.name in early:
            return early[self.name], " of the first eighth of the layers"
        return None


def _role(tensor: str) -> str | None:
    if tensor == _OUTPUT or tensor in _EMBEDDINGS:
        return None
    return next((role for part, role in _ROLES if part in tensor), None)


def _block(tensor: str) -> int:
    match = _BLOCK.match(tensor)
    return int(match.group(1)) if match else -1


def _refuse_plain_q2_k_s(plans: Sequence[GgufTensorPlan]) -> None:
    for plan in plans:
        if plan.type_name == "Q2_K" and plan.name != _OUTPUT and plan.name not in _EMBEDDINGS:
            raise PlanError(
                f"Q2_K_S stores {plan.name} and others as Q2_K, which needs an importance matrix: "
                "give one with --imatrix, or choose Q2_K"
            )
