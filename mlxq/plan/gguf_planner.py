"""What a GGUF file will hold of each tensor: a file type's choice, or what the source holds already. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlxq.errors import PlanError
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.formats.superblocks import SUPER_BLOCK
from mlxq.plan.gguf_file_types import FILE_TYPES, file_type
from mlxq.plan.gguf_mixes import GgufModel, GgufTensorPlan, bpw, gguf_types, stays_float
from mlxq.plan.gguf_overrides import Overrides
from mlxq.plan.methods import check_method
from mlxq.plan.planner import Plan
from mlxq.plan.recoding import recoding_of
from mlxq.types import FLOAT_BYTES, Method, TensorInfo, TensorPlan

#: File type of a float model when none is asked for: the usual compromise.
DEFAULT_FILE_TYPE = "Q4_K_M"
#: Type for codes of these bits where no block type holds their grid exactly, and whether the codes stay.
_NEAREST = {2: ("Q4_1", True), 3: ("Q4_1", True), 4: ("Q4_1", True), 5: ("Q5_1", True), 6: ("Q8_0", False)}
_NEAREST |= {8: ("Q8_0", False)}


@dataclass(frozen=True)
class GgufOptions:
    """What a person asked for.

    `file_type` None means: as the source holds it, or for a float source `DEFAULT_FILE_TYPE` (unless `as_stored`).
    `tensor_types` are `REGEX=TYPE`, searched in the GGUF names. `exact` refuses whatever changes a decoded weight.
    `method` is how codes of matrices are chosen; by default each weight counts alike.

    Raises:
        PlanError: an unknown file type or method.
    """

    file_type: str | None = None
    tensor_types: tuple[str, ...] = ()
    exact: bool = False
    as_stored: bool = False
    method: Method | None = None

    def __post_init__(self) -> None:
        if self.file_type is not None:
            object.__setattr__(self, "file_type", file_type(self.file_type)[0])
        check_method(self.method)


@dataclass(frozen=True)
class GgufSource:
    """A tensor before anything is decided: its name in the file, and the block types that hold its codes exactly."""

    info: TensorInfo
    name: str
    exact_types: tuple[str, ...] = ()


def make_gguf_plan(
    sources: Sequence[GgufSource],
    options: GgufOptions,
    model: GgufModel,
    *,
    has_imatrix: bool = False,
    dropped: tuple[str, ...] = (),
) -> Plan:
    """Decide for every tensor; `TensorPlan.dtype` is its ggml type, `Plan.dtype` the file type or `as stored`.

    Raises:
        PlanError: patterns that match nothing, a file type that needs an importance matrix, or with `exact` the first
            tensor that would change.
    """
    wanted = options.file_type
    notes: tuple[str, ...] = ()
    if wanted is None and not options.as_stored and not any(_is_quantized(s.info) for s in sources):
        wanted = DEFAULT_FILE_TYPE
    if wanted is None:
        overrides = Overrides(options.tensor_types)
        plans = [_as_stored(s, overrides, options.exact) for s in sources]
        overrides.refuse_unmatched()
    else:
        shapes = [(s.name, s.info.shape) for s in sources]
        chosen = gguf_types(shapes, wanted, model, has_imatrix=has_imatrix, overrides=options.tensor_types)
        plans = [_plan(s, c.type_name, c.reason) for s, c in zip(sources, chosen, strict=True)]
        notes = _fallbacks(chosen)
    if options.exact:
        _refuse_lossy(sources, plans)
    plans = [_with_method(p, options.method) for p in plans]
    return Plan(tuple(plans), wanted or "as stored", dropped, notes)


def with_nearest_file_type(plan: Plan, names: Mapping[str, str], model: GgufModel) -> Plan:
    """A plan whose types were chosen tensor by tensor, under the name of llama.cpp's that is nearest to it in size.

    `names` are those of the tensors in the file.
    """
    shapes = [(names[p.info.name], p.info.shape) for p in plan.tensors]
    quantized = [name for name, (_, base) in FILE_TYPES.items() if base not in FLOAT_BYTES]
    sizes = {name: bpw(gguf_types(shapes, name, model, has_imatrix=True)) for name in quantized}
    nearest = min(sizes, key=lambda name: abs(sizes[name] - plan.bpw))
    note = (
        f"types were chosen tensor by tensor; llama.cpp's name for the nearest size, which general.file_type says, is "
        f"{nearest} ({sizes[nearest]:.2f} bpw of this model)"
    )
    return replace(plan, dtype=nearest, notes=(*plan.notes, note))


def _fallbacks(chosen: Sequence[GgufTensorPlan]) -> tuple[str, ...]:
    """One line for each width of rows that the blocks of the type asked for do not divide."""
    counts: dict[tuple[int, str, str], int] = {}
    for c in chosen:
        if c.instead_of is not None:
            key = c.shape[-1], c.instead_of, c.type_name
            counts[key] = counts.get(key, 0) + 1
    return tuple(
        f"{count} {'tensors are' if count > 1 else 'tensor is'} {given} instead of {asked}, whose blocks do not divide "
        f"rows of {K} weights"
        for (K, asked, given), count in counts.items()
    )


def _is_quantized(info: TensorInfo) -> bool:
    return info.spec is not None or info.dtype not in FLOAT_BYTES


def _as_stored(source: GgufSource, overrides: Overrides, exact: bool) -> TensorPlan:
    info = source.info
    kept = stays_float(source.name, info.shape)
    asked = overrides.find(source.name, kept)
    if kept is not None:
        return _plan(source, "F32", kept)
    if asked is not None:
        return _plan(source, *asked)
    if info.dtype in BLOCK_FORMATS:
        return _plan(source, info.dtype, "as in the source")
    if source.exact_types:
        return _plan(source, source.exact_types[0], f"holds the {info.spec} codes exactly")
    if info.permuted_spec is not None:
        why = "its columns are out of order (act-order), which no ggml type holds; --type quantizes it anew"
        return _plan(source, "F16", why)
    if info.spec is None or info.spec.mode != "affine":
        return _plan(source, _nearest_to_floats(info, exact), f"no ggml type holds {info.dtype} exactly")
    name, _ = _NEAREST[info.spec.bits]
    return _plan(source, name, f"no ggml type holds this {info.spec} grid exactly")


def _nearest_to_floats(info: TensorInfo, exact: bool) -> str:
    """The type of floats under scales: one that adds much less than they have lost, or if `exact` floats again."""
    if exact:
        return "BF16" if info.spec is not None else "F32"
    recoding = recoding_of(info)
    fits = recoding is not None and recoding.spec.bits < 8 and info.shape[-1] % SUPER_BLOCK == 0
    return "Q6_K" if fits else "Q8_0"


def _plan(source: GgufSource, type_name: str, reason: str) -> TensorPlan:
    info = source.info
    if info.dtype in FLOAT_BYTES:
        return TensorPlan(info, "keep" if type_name in FLOAT_BYTES else "quantize", None, type_name, reason)
    if info.dtype == type_name:
        return TensorPlan(info, "repack", None, type_name, f"{reason}; blocks as in the source")
    if type_name in source.exact_types:
        return TensorPlan(info, "repack", None, type_name, f"{reason}; codes as in the source")
    affine = info.spec is not None and info.spec.mode == "affine"
    if affine and _NEAREST[info.spec.bits] == (type_name, True):
        return TensorPlan(info, "repack", None, type_name, f"{reason}; codes as in the source, scales in float16")
    action = "keep" if type_name in FLOAT_BYTES else "requantize"
    return TensorPlan(info, action, None, type_name, f"{reason} (source: {info.spec or info.dtype})")


def _with_method(plan: TensorPlan, method: Method | None) -> TensorPlan:
    """Matrices of layers are calibrated; what else is quantized has no inputs to look at."""
    calibrated = plan.action in ("quantize", "requantize") and plan.info.module != "other"
    return replace(plan, method=method) if method is not None and calibrated else plan


def _refuse_lossy(sources: Sequence[GgufSource], plans: Sequence[TensorPlan]) -> None:
    for source, plan in zip(sources, plans, strict=True):
        kept = plan.dtype == source.info.dtype or plan.dtype in source.exact_types
        if plan.action in ("quantize", "requantize") or (plan.action == "repack" and not kept):
            what = source.info.spec or source.info.dtype
            way = f"--tensor-type '{source.name.removesuffix('.weight')}=F32' does"
            if plan.action == "quantize":
                way = "--type BF16, F16 or F32 keeps floats, and mlxq export all that a GGUF file can hold"
            raise PlanError(
                f"--exact: {source.name} would change: {plan.dtype} does not hold its {what} weights exactly; {way}"
            )
