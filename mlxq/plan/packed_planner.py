"""What a GPTQ or AWQ directory will hold of each tensor: codes where its grid allows that, else floats. Pure.

Whether a grid has integer zero points is told by its scales and biases: the caller reads them (`GridFacts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlxq.errors import PlanError
from mlxq.formats import awq, gptq
from mlxq.plan import dtypes
from mlxq.plan.planner import Plan, planned_bytes
from mlxq.plan.roles import layer_index, module_path
from mlxq.types import FLOAT_BYTES, QuantSpec, TensorInfo, TensorPlan

#: What `--to` can name: GPTQ in the version that fits (1 where all zero points are the middle code, else 2), GPTQ in
#: version 1 whatever they are, and AWQ in the GEMM layout.
PACKED_FORMATS = ("gptq", "gptq_v1", "awq")
#: Models whose tensors have the same names and values in mlx-lm and in transformers. GPTQ's and AWQ's loaders go by
#: those of transformers.
SAME_NAMES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "granite", "olmo2"),
        *("olmo3", "smollm3", "starcoder2", "cohere", "cohere2", "stablelm", "glm", "glm4", "helium", "seed_oss"),
        *("ernie4_5", "hunyuan_v1_dense", "exaone4", "nemotron"),
    }
)
_FLOAT = "F16"


@dataclass(frozen=True)
class GridFacts:
    """Of one tensor: whether its weights stay bit for bit, and whether every zero point is the middle code."""

    exact: bool
    symmetric: bool


@dataclass(frozen=True)
class PackedPlan(Plan):
    """A plan for such a directory.

    `layout` is `gptq` or `awq`, `version` that of GPTQ's zero points, `base` what the settings say of all modules,
    `symmetric` whether every zero point is the middle code.
    """

    layout: str = "gptq"
    version: int = 1
    base: QuantSpec = QuantSpec(4, 128)  # noqa: RUF009
    symmetric: bool = False

    def __post_init__(self) -> None:
        sizes = {p.info.name: packed_bytes(p, self.layout) for p in self.tensors}
        object.__setattr__(self, "nbytes_by_name", sizes)

    @property
    def float_modules(self) -> tuple[str, ...]:
        """Modules of the model's blocks, and its head, that could be quantized and are not."""
        return tuple(module_path(p.info.name) for p in self.kept_weights if p.info.module == "linear")


def packed_bytes(plan: TensorPlan, layout: str) -> int:
    """Bytes that a tensor takes: words, zero points, scales and in GPTQ the group of each column."""
    if plan.spec is None:
        return planned_bytes(plan)
    N, K = plan.info.shape
    n_groups = K // plan.spec.group_size
    per_row = (K + n_groups) * plan.spec.bits // 8 + n_groups * FLOAT_BYTES[_FLOAT]
    return N * per_row + (4 * K if layout == "gptq" else 0)


def make_packed_plan(
    tensors: Iterable[TensorInfo],
    to: str,
    facts_of: Callable[[TensorInfo], GridFacts],
    *,
    exact: bool = False,
    cast_protected: frozenset[str] = frozenset(),
    dropped: tuple[str, ...] = (),
) -> PackedPlan:
    """Decide for every tensor.

    Args:
        to: one of `PACKED_FORMATS`.
        facts_of: looks at the scales and biases of a tensor.
        exact: refuse what would change a weight.
        cast_protected: tensors that keep their own float type.

    Raises:
        PlanError: an unknown format, stacks of matrices, nothing that the format holds; with `exact`, a grid that is
            not exactly one of integer zero points.
    """
    if to not in PACKED_FORMATS:
        raise PlanError(f"unknown format {to!r}: choose one of {', '.join(PACKED_FORMATS)}, or leave --to out for GGUF")
    layout = to.partition("_")[0]
    infos = list(tensors)
    base = _base(infos, layout)
    facts: dict[str, GridFacts] = {}
    plans = []
    for info in infos:
        why = _why_float(info, layout, base)
        if why is not None:
            stored, rest = dtypes.kept_dtype(info, _FLOAT, cast_protected)
            plans.append(TensorPlan(info, "keep", None, stored, why + rest))
            continue
        found = facts[info.name] = facts_of(info)
        if exact and not found.exact:
            raise PlanError(f"--exact: {info.name} would change: its zero points are integers only when rounded")
        said = "the same codes and weights" if found.exact else "the same codes, zero points rounded to integers"
        plans.append(TensorPlan(info, "repack", info.spec, _FLOAT, said))
    symmetric = all(f.symmetric for f in facts.values())
    version = 1 if symmetric or to == "gptq_v1" else 2
    how = {"layout": layout, "version": version, "base": base, "symmetric": symmetric}
    notes = _notes(plans, facts, layout, version, symmetric)
    plan = PackedPlan(tuple(plans), _FLOAT, dropped, notes, exact=exact, **how)
    if layout == "awq":
        _refuse_ambiguous(plan)
    return plan


def _base(infos: list[TensorInfo], layout: str) -> QuantSpec:
    """The grid of most weights among those that the format holds."""
    weights: dict[QuantSpec, int] = {}
    for info in infos:
        if info.spec is None:
            continue
        if len(info.shape) > 2:
            raise PlanError(
                f"{info.name} is a stack of {info.shape[0]} matrices, as mlx-lm holds experts; GPTQ and AWQ files of "
                "such models cannot be written"
            )
        if _why_float(info, layout, info.spec) is None:
            weights[info.spec] = weights.get(info.spec, 0) + info.size
    if not weights:
        if any(info.permuted_spec for info in infos):
            raise PlanError(
                f"columns of its layers are out of order (act-order), which cannot be exported to {layout.upper()}; "
                "mlxq convert --recipe four-way quantizes them anew"
            )
        held = ", ".join(map(str, gptq.BITS)) if layout == "gptq" else awq.BITS
        raise PlanError(
            f"no layer is quantized with {held} bits, as {layout.upper()} is; mlxq convert --recipe four-way makes "
            "a directory that can be exported"
        )
    return max(weights, key=lambda s: weights[s])


def _why_float(info: TensorInfo, layout: str, base: QuantSpec) -> str | None:
    """Why a tensor is no codes in the result; None where it is."""
    if info.module == "other":
        return "norm, bias or buffer: no layer holds it quantized"
    if info.module != "linear" or layer_index(info.name) is None:
        return f"{layout.upper()} quantizes the layers of blocks alone"
    if info.spec is None:
        permuted = info.permuted_spec is not None
        return "its columns are out of order (act-order)" if permuted else "float in the source"
    if info.spec.mode != "affine" or info.spec.bits not in (gptq.BITS if layout == "gptq" else (awq.BITS,)):
        return f"{layout.upper()} has no {info.spec}"
    if layout == "awq" and info.spec.group_size != base.group_size:
        return f"AWQ has groups of one size, here {base.group_size}, not {info.spec.group_size}"
    N = info.shape[0]
    if N % 8 if layout == "awq" else N * info.spec.bits % 32:
        return f"{N} rows do not fill the words of {layout.upper()}"
    return None


def _notes(
    plans: list[TensorPlan], facts: dict[str, GridFacts], layout: str, version: int, symmetric: bool
) -> tuple[str, ...]:
    n_exact = sum(f.exact for f in facts.values())
    notes = [f"{n_exact} of {len(facts)} quantized tensors keep every weight bit for bit"]
    specs = {p.spec for p in plans if p.spec is not None}
    if layout == "gptq":
        if version == 2:
            notes.append(
                "written as gptq_v2, which GPTQModel, transformers and vLLM read; --to gptq_v1 is for older loaders"
            )
        elif not symmetric:
            notes.append("written as version 1 with zero points of all sizes: GPTQModel takes only its own such files")
        in_blocks = [p for p in plans if p.action == "keep" and _is_of_block(p.info)]
        if len(specs) > 1 or in_blocks:
            notes.append("layers differ: `dynamic` says how, which GPTQModel and vLLM follow and AutoGPTQ does not")
    return tuple(notes)


def _is_of_block(info: TensorInfo) -> bool:
    return info.module == "linear" and layer_index(info.name) is not None


def _refuse_ambiguous(plan: PackedPlan) -> None:
    """Loaders take each name that is not to be converted for a part of names: it must be part of no other."""
    packed = [module_path(p.info.name) for p in plan.tensors if p.spec is not None]
    for module in plan.float_modules:
        other = next((name for name in packed if module in name), None)
        if other is not None:
            raise PlanError(f"{module} stays float, but AWQ's loaders would take {other} for it")
