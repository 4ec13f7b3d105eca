"""Names, shapes and options in, a plan out: per tensor the action, the spec and the reason. Pure: no arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from mlxq.errors import PlanError
from mlxq.formats import geometry
from mlxq.plan import dtypes, four_way
from mlxq.plan.methods import check_method
from mlxq.plan.patterns import check_legal, pattern, tensor_type, texts
from mlxq.plan.recipes import PORTABLE_GROUP, RECIPES, check_portable, recipe_bits
from mlxq.plan.recoding import FOREIGN, recoding_of
from mlxq.plan.remarks import remarks
from mlxq.plan.roles import layer_index, module_path, role
from mlxq.types import DTYPE_NAMES, FLOAT_BYTES, QuantSpec, TensorInfo, TensorPlan

DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class PlanOptions:
    """What a person asked for.

    `bits` and `group_size` None mean: keep the codes of a source that is already quantized (or what comes close to
    them, where MLX has no such codes, see `recoding`), else 4 and 64.
    `tensor_types` holds `REGEX=BITS` or `REGEX=BITS:GROUP`, `keep` regular expressions, each in a tuple or list; both
    are searched in the parameter name, and the last that matches wins. `dtype` is `float32`, `float16` or `bfloat16`.
    `exact` refuses whatever would change a decoded weight. `method` is how codes are chosen, `rtn` by default.

    Raises:
        PlanError: an illegal value, named with the legal ones, or a malformed or empty pattern.
    """

    bits: int | None = None
    group_size: int | None = None
    recipe: str | None = None
    tensor_types: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    dtype: str | None = None
    exact: bool = False
    method: str | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_types", "keep"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if self.recipe is not None and self.recipe not in RECIPES:
            raise PlanError(f"unknown recipe {self.recipe!r}: choose one of {', '.join(RECIPES)}")
        check_legal(self.base.bits, self.base.group_size, "")
        if self.recipe == "portable":
            check_portable(self.base.bits, self.base.group_size)
        check_method(self.method)
        if self.method is not None and self.recipe == "portable":
            raise PlanError("--recipe portable has a search of its own: leave --method out")
        if self.dtype is not None and self.dtype not in DTYPE_NAMES.values():
            raise PlanError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(sorted(DTYPE_NAMES.values()))}")
        object.__setattr__(self, "_types", [tensor_type(t, DEFAULT_GROUP_SIZE) for t in self.tensor_types])
        if self.is_four_way:
            four_way.check_options(self.base.bits, self.dtype, [(t[1], t[3]) for t in self._types])
            object.__setattr__(self, "dtype", "float16")
        object.__setattr__(self, "_keep", [(pattern(k, "--keep"), k) for k in self.keep])

    @property
    def says_how(self) -> bool:
        """Whether bits, group size or recipe were asked for."""
        return any(v is not None for v in (self.bits, self.group_size, self.recipe))

    @property
    def is_four_way(self) -> bool:
        return self.recipe == "four-way"

    @property
    def base(self) -> QuantSpec:
        bits = DEFAULT_BITS if self.bits is None else self.bits
        default = PORTABLE_GROUP if self.recipe == "portable" else DEFAULT_GROUP_SIZE
        return QuantSpec(bits, default if self.group_size is None else self.group_size)


@dataclass(frozen=True)
class Plan:
    """The decisions for every tensor of a model, in the model's order.

    `notes` are remarks to be read before the work; `exact` forbids that writing changes a weight, where only the
    weights themselves tell.
    """

    tensors: tuple[TensorPlan, ...]
    dtype: str
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exact: bool = False
    nbytes_by_name: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes_by_name", {p.info.name: planned_bytes(p) for p in self.tensors})

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors, scales and biases included."""
        return sum(self.nbytes_by_name.values())

    @property
    def n_weights(self) -> int:
        return sum(p.info.size for p in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, scales and biases counted."""
        return 8 * self.nbytes / max(self.n_weights, 1)

    @property
    def kept_weights(self) -> tuple[TensorPlan, ...]:
        """Weights of layers that could be quantized and stay float."""
        return tuple(p for p in self.tensors if p.action == "keep" and p.info.module != "other")


def planned_bytes(plan: TensorPlan) -> int:
    """Bytes that a planned tensor takes in the result."""
    if plan.spec is None:
        stored = geometry.block_format(plan.dtype)
        return plan.info.size // stored.block_size * stored.type_size
    return geometry.quantized_bytes(plan.info.shape, plan.spec, plan.dtype)


def make_plan(
    tensors: Iterable[TensorInfo],
    options: PlanOptions,
    *,
    float_modules: Mapping[str, int] | None = None,
    cast_protected: frozenset[str] = frozenset(),
    dropped: tuple[str, ...] = (),
    model_dtype: str | None = None,
) -> Plan:
    """Decide for every tensor.

    `float_modules` maps module paths to 0 (the architecture never quantizes it) or to its least bits;
    `cast_protected` names tensors that keep their own float dtype; `dropped` is passed on to the plan; `model_dtype`
    (`float16`, `bfloat16`, `float32`) is what the model computes in where its weights, being ggml blocks, do not tell.

    Raises:
        PlanError: a `--tensor-type` or `--keep` pattern matches no tensor, or asks for what cannot be; with `exact`,
            the first tensor that would change.
    """
    infos = list(tensors)
    layers = [i for i in (layer_index(t.name) for t in infos) if i is not None]
    n_layers = max(layers) + 1 if layers else 0
    dtype = dtypes.model_dtype(infos, options.dtype, model_dtype)
    quantized_source = any(t.spec or t.dtype not in FLOAT_BYTES for t in infos)
    chooser = _Chooser(options, float_modules or {}, n_layers, quantized_source)
    plans = []
    for info in infos:
        spec, reason = chooser.choose(info)
        if spec is None:
            stored, why = dtypes.kept_dtype(info, dtype, cast_protected)
            plans.append(TensorPlan(info, "keep", None, stored, reason + why))
        else:
            scales = dtypes.scales_dtype(info, spec, dtype, options.dtype) if spec.mode == "affine" else "U8"
            # Codes as in the source have another grid.
            taken = info if not options.is_four_way else replace(info, spec=None)
            action, reason = _action(taken, spec, scales, reason)
            if scales not in (dtype, "U8"):
                reason += f", scales in {DTYPE_NAMES[scales]}: {DTYPE_NAMES[dtype]} would round them"
            plans.append(TensorPlan(info, action, spec, scales, reason, chooser.method, four_way=options.is_four_way))
    chooser.refuse_unmatched()
    if options.is_four_way:
        four_way.check_plan(plans)
    if options.exact:
        for plan in plans:
            _refuse_lossy(plan)
    return Plan(tuple(plans), dtype, dropped, remarks(plans, dtype), exact=options.exact)


class _Chooser:
    """Chooses the spec of one tensor, and remembers which patterns matched."""

    def __init__(self, options: PlanOptions, float_modules: Mapping[str, int], n_layers: int, quantized: bool):
        self.options = options
        self.float_modules = float_modules
        self.n_layers = n_layers
        self.as_stored = quantized and not options.says_how
        self.method = "portable" if options.recipe == "portable" else options.method or "rtn"
        self.unmatched = {text for _, _, _, text in options._types} | {text for _, text in options._keep}
        #: `--tensor-type` -> the first tensor that it matches and that no layer holds quantized.
        self.unfit: dict[str, str] = {}

    def choose(self, info: TensorInfo) -> tuple[QuantSpec | None, str]:
        kept = self._kept_by_pattern(info)
        asked = self._asked(info)
        if info.module == "other":
            return None, "norm, bias or buffer: no layer holds it quantized"
        if kept is not None:
            return None, f"--keep {kept}"
        if asked is not None:
            return self._fit(info, QuantSpec(asked[0], asked[1] or self.options.base.group_size), "--tensor-type")
        least = self.float_modules.get(module_path(info.name))
        if least == 0:
            return None, "the architecture keeps this layer float"
        if self.as_stored:
            return self._as_stored(info)
        base = self.options.base
        bits, reason = recipe_bits(
            self.options.recipe or "uniform", role(info), layer_index(info.name), self.n_layers, base.bits
        )
        if least and bits < least:
            bits, reason = least, f"the architecture asks for at least {least} bits here"
        return self._fit(info, QuantSpec(bits, base.group_size), reason)

    def _as_stored(self, info: TensorInfo) -> tuple[QuantSpec | None, str]:
        recoding = recoding_of(info)
        if info.spec is not None and (recoding is None or self.options.exact):
            return info.spec, "codes as in the source"
        if recoding is None or (self.options.exact and info.dtype in FOREIGN):
            return None, _why_float(info)
        reason = f"adds a relative error of about {recoding.added:.2g} to the {recoding.own:.2g} that the type has"
        return self._fit(info, recoding.spec, reason)

    def refuse_unmatched(self) -> None:
        for text in sorted(self.unmatched):
            if text in self.unfit:
                raise PlanError(
                    f"--tensor-type {text!r} matches only what no layer can hold quantized, such as {self.unfit[text]}"
                )
            raise PlanError(f"pattern {text!r} matches no tensor; list them with --dry-run")

    def _kept_by_pattern(self, info: TensorInfo) -> str | None:
        found = None
        for regex, text in self.options._keep:
            if regex.search(info.name):
                self.unmatched.discard(text)
                found = text
        return found

    def _asked(self, info: TensorInfo) -> tuple[int, int | None] | None:
        """Bits and group size of the last pattern that matches; norms, biases and buffers that match are passed by."""
        found = None
        for regex, bits, group_size, text in self.options._types:
            if not regex.search(info.name):
                continue
            if info.module == "other":
                self.unfit.setdefault(text, info.name)
            else:
                self.unmatched.discard(text)
                found = (bits, group_size)
        return found

    @staticmethod
    def _fit(info: TensorInfo, spec: QuantSpec, reason: str) -> tuple[QuantSpec | None, str]:
        """The spec with the largest legal group that divides the rows, or None."""
        in_features = info.shape[-1]
        group_size = geometry.largest_group(in_features, spec.group_size)
        if group_size is None:
            legal = ", ".join(map(str, geometry.AFFINE_GROUP_SIZES))
            return None, f"rows of {in_features} divide by no legal group ({legal})"
        if group_size != spec.group_size:
            reason += f"; group {group_size} because rows of {in_features} do not divide by {spec.group_size}"
        return QuantSpec(spec.bits, group_size), reason


def _why_float(info: TensorInfo) -> str:
    if info.dtype in FLOAT_BYTES:
        return "float in the source"
    if info.permuted_spec is not None:
        return "its columns are out of order (act-order), which no MLX grid holds; --bits quantizes it anew"
    return "no MLX grid holds its weights; --bits quantizes it anew"


def _action(info: TensorInfo, spec: QuantSpec, dtype: str, reason: str) -> tuple[str, str]:
    if info.spec == spec:
        if info.scales_dtype is None or not dtypes.narrows(info.scales_dtype, dtype):
            return "repack", "codes as in the source"
        own, stored = DTYPE_NAMES[info.scales_dtype], DTYPE_NAMES[dtype]
        return "repack", f"codes as in the source, scales rounded from {own} to {stored}"
    if info.dtype in FLOAT_BYTES:
        return "quantize", reason
    return "requantize", f"{reason} (source: {info.dtype})"


def _refuse_lossy(plan: TensorPlan) -> None:
    """With `--exact`, refuse a tensor that is known to change.

    Whether rounded scales and kept floats change shows when they are written: GGUF files hold norms in float32 that
    were bfloat16 once.
    """
    info = plan.info
    if plan.action == "quantize":
        raise PlanError(
            f"--exact: {info.name} is {info.dtype} and would be quantized to {plan.spec}; --keep '{info.name}' keeps it"
        )
    if plan.action == "requantize":
        way = "leave its bits and group size as they are, or" if info.spec else "no MLX grid holds its weights;"
        raise PlanError(
            f"--exact: {info.name} would change from {info.dtype} to {plan.spec}: {way} keep its decoded values with "
            f"--keep '{info.name}' --dtype float32"
        )
