"""From checkpoint tensors to model parameters, lazily: names, shapes and roles without reading a weight.

mlx-lm's models know how to rename, stack or drop the tensors of a Hugging Face checkpoint (`Model.sanitize`).
That function is run once over placeholders that hold shapes alone. What comes out as the very object that went in
is a plain (renamed) tensor and streams by rows; what was computed (stacked experts, say) is made when it is asked for,
by running `sanitize` again with the real arrays of the tensors that it depends on. Stacks of packed tensors (experts
that another tool quantized) are put together here instead, and keep their codes (`stacks`).

`sanitize` may also change the model (drop the head of a tied one, say), so every run of it has a model of its own, and
the parameters that a model wants are known only afterwards.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from typing import Any

import numpy as np

from mlxq.architectures.graph import dependencies
from mlxq.architectures.registry import build_model
from mlxq.architectures.stacks import find_stacks, stack_quantized, stacked_info
from mlxq.checkpoint.base import Checkpoint
from mlxq.errors import CheckpointError
from mlxq.ops.threads import in_own_thread
from mlxq.types import FLOAT_BYTES, ModuleKind, QuantizedTensor, TensorInfo

#: mlx counts the elements of an axis in a signed 32-bit integer.
_LONGEST_AXIS = 2**31 - 1
#: Paths of output projections, by the names that mlx-lm's models use. A module called `output` is one only outside of
#: the blocks, where its path is `output` or `model.output`; OLMo calls both its head and its down projections `ff_out`.
OUTPUT_PROJECTION = re.compile(
    r"(^|\.)(lm_head|lm_head\.linear|embed_out|output_head|transformer\.ff_out)$|^(language_model\.)?(model\.)?output$"
)


class ParameterMap:
    """The parameters of a model, each traced to the checkpoint tensors it is made of.

    Attributes:
        checkpoint: the source.
        model: the skeleton (`mlx.nn.Module`) with lazily initialized parameters, as `sanitize` left it.
        tensors: parameter name -> `TensorInfo` in the model's own names, with the kind of module that owns it.
        dropped: source tensors that the architecture does not use.
        cast_protected: parameters that must stay in their own dtype (mlx-lm's `cast_predicate`).
        float_modules: module paths that the architecture itself never quantizes, and minimum bits for others
            (mlx-lm's `quant_predicate`): path -> 0 for never, else the bits it asks for.

    Raises:
        CheckpointError: unknown architecture; tensors missing, left over, or of shapes other than config.json's; a
            parameter that is computed, but not from any tensor that can be named.
    """

    def __init__(self, checkpoint: Checkpoint):
        from mlx.utils import tree_flatten

        self.checkpoint = checkpoint
        self._placeholders = self._make_placeholders()
        self.model = build_model(checkpoint.config)
        self._trace()
        self._wanted = {name: tuple(a.shape) for name, a in tree_flatten(self.model.parameters())}
        self._check()
        self._find_modules()
        self._lock = threading.Lock()
        self._cached: tuple[str, np.ndarray] | None = None

    @property
    def has_output_projection(self) -> bool:
        """Whether the model has a head of its own, so that its embedding's rows are looked up and no more."""
        return any(OUTPUT_PROJECTION.search(name.rpartition(".")[0]) for name in self.tensors)

    def new_model(self) -> Any:
        """Another skeleton like `model`: built from config.json, then changed as `sanitize` changes it."""
        model = build_model(self.checkpoint.config)
        self._sanitize(model, dict(self._placeholders))
        return model

    def _sanitize(self, model: Any, arrays: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(model, "sanitize"):
            return arrays
        try:
            return model.sanitize(arrays)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError) as e:
            what = f"tensor {e} is missing" if isinstance(e, KeyError) else str(e).replace("\n", " ")
            kind = self.checkpoint.config.get("model_type")
            raise CheckpointError(f"{self.checkpoint.path}: not a complete {kind} checkpoint: {what}") from e

    def _sanitize_anew(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return self._sanitize(build_model(self.checkpoint.config), arrays)

    def _make_placeholders(self) -> dict[str, Any]:
        """For each source tensor an array of its shape and dtype that takes no memory: one zero, seen many times.

        They are evaluated: so any thread can use them, and they are the leaves of what is computed from them.
        """
        import mlx.core as mx

        dtypes = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
        out = {}
        for name, info in self.checkpoint.tensors.items():
            if max(info.shape, default=0) > _LONGEST_AXIS:
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {name} has shape {list(info.shape)}; mlx's axes hold at most"
                    f" {_LONGEST_AXIS} elements"
                )
            out[name] = mx.broadcast_to(mx.zeros((), dtypes.get(info.dtype, mx.float32)), info.shape)
        mx.eval(list(out.values()))
        return out

    def _trace(self) -> None:
        sources = {id(a): name for name, a in self._placeholders.items()}
        outputs = self._sanitize(self.model, dict(self._placeholders))
        computed = {name: array for name, array in outputs.items() if id(array) not in sources}
        self._direct = {name: sources[id(array)] for name, array in outputs.items() if name not in computed}
        self._computed = dependencies(computed, self._placeholders)
        stored = self.checkpoint.tensors
        self._stacks = find_stacks(self._sanitize_anew, self._placeholders, stored, self._computed)
        self._computed = {n: parts for n, parts in self._computed.items() if n not in self._stacks}
        infos: dict[str, TensorInfo] = {}
        for name, array in outputs.items():
            if name in self._direct:
                infos[name] = dataclasses.replace(self.checkpoint.tensors[self._direct[name]], name=name)
                continue
            if name in self._stacks:
                infos[name] = stacked_info(name, [stored[part] for part in self._stacks[name]])
                continue
            if not self._computed[name]:
                raise CheckpointError(
                    f"{self.checkpoint.path}: {name} is computed by mlx-lm in a way that cannot be traced to the"
                    " tensors of the checkpoint; this architecture is not supported"
                )
            dtype = {"float16": "F16", "bfloat16": "BF16"}.get(str(array.dtype).rpartition(".")[2], "F32")
            infos[name] = TensorInfo(name, tuple(array.shape), dtype, array.size * FLOAT_BYTES[dtype])
        self.tensors = infos
        used = set(self._direct.values()).union(*self._computed.values(), *self._stacks.values())
        self.dropped = tuple(n for n in self.checkpoint.tensors if n not in used)

    def _check(self) -> None:
        where = self.checkpoint.path
        kind = self.checkpoint.config.get("model_type")
        missing = [n for n in self._wanted if n not in self.tensors]
        if missing:
            raise CheckpointError(f"{where}: {_count(missing, 'tensor')} of a {kind} model not found: {missing[0]}")
        extra = [n for n in self.tensors if n not in self._wanted]
        if extra:
            raise CheckpointError(f"{where}: {_count(extra, 'tensor')} unknown to a {kind} model: {extra[0]}")
        for name, shape in self._wanted.items():
            found = self.tensors[name].shape
            if found != shape:
                raise CheckpointError(f"{where}: {name} has shape {list(found)}; config.json asks for {list(shape)}")

    def _find_modules(self) -> None:
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        self.float_modules: dict[str, int] = {}
        predicate = getattr(self.model, "quant_predicate", None)
        leaves = tree_flatten(self.model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module))
        for path, module in leaves:
            if not isinstance(module, nn.Module) or not hasattr(module, "to_quantized"):
                continue
            name = f"{path}.weight"
            if name not in self.tensors:
                continue
            self.tensors[name] = dataclasses.replace(self.tensors[name], module=_kind(module))
            if predicate is not None:
                advice = predicate(path, module)
                if advice is False:
                    self.float_modules[path] = 0
                elif isinstance(advice, dict) and "bits" in advice:
                    self.float_modules[path] = int(advice["bits"])
        cast = getattr(self.model, "cast_predicate", lambda _: True)
        self.cast_protected = frozenset(n for n in self.tensors if not cast(n))
        self.tensors = {n: self.tensors[n] for n in self._wanted}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Values of a parameter as `Checkpoint.read` gives them, in the parameter's own name and shape."""
        if name in self._direct:
            return self.checkpoint.read(self._direct[name], rows)
        if name in self._stacks:
            return np.stack([self.checkpoint.read(part) for part in self._stacks[name][rows or slice(None)]])
        array = self._compute(name)
        return array if rows is None else array[rows].copy()

    def is_computed(self, name: str) -> bool:
        """Whether a parameter is made of several source tensors, in memory as a whole, rather than read by rows."""
        return name in self._computed

    def read_quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Codes and grid of a parameter whose `TensorInfo.spec` is set."""
        if name in self._stacks:
            parts = self._stacks[name][rows or slice(None)]
            return stack_quantized([self.checkpoint.read_quantized(part) for part in parts])
        return self.checkpoint.read_quantized(self._direct[name], rows)

    def read_order(self, name: str) -> np.ndarray:
        """Order of the columns of a parameter whose `TensorInfo.permuted_spec` is set (see `Checkpoint.read_order`);
        of a stack one order for each matrix, int32 `[E, K]`."""
        if name in self._stacks:
            return np.stack([self.checkpoint.read_order(part) for part in self._stacks[name]])
        return self.checkpoint.read_order(self._direct[name])

    def read_blocks(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Blocks of a parameter that a GGUF file holds as such (see `Checkpoint.read_blocks`)."""
        return self.checkpoint.read_blocks(self._direct[name], rows)

    def _compute(self, name: str) -> np.ndarray:
        """Make a computed parameter. The last one is remembered, since it is read by rows."""
        with self._lock:
            if self._cached is None or self._cached[0] != name:
                self._cached = None
                self._cached = (name, in_own_thread(lambda: self._compute_now(name)))
            return self._cached[1]

    def _compute_now(self, name: str) -> np.ndarray:
        """At its height this holds the sources and the result, each once; the array returned is mlx's own memory.

        It is evaluated and depends on nothing any more, so it may outlive the thread that it was made in.
        """
        import mlx.core as mx

        real = {source: self._load(self.checkpoint.tensors[source]) for source in self._computed[name]}
        array = self._sanitize_anew(self._placeholders | real)[name]
        del real
        array = mx.contiguous(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
        mx.eval(array)
        mx.clear_cache()
        result = np.asarray(memoryview(array))
        result.flags.writeable = False
        return result

    def _load(self, info: TensorInfo) -> Any:
        import mlx.core as mx

        values = self.checkpoint.read(info.name)
        array = mx.array(values)
        return array.view(mx.bfloat16) if info.dtype == "BF16" else array


def _kind(module: Any) -> ModuleKind:
    import mlx.nn as nn

    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) else "switch"


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"
