"""From checkpoint tensors to model parameters, lazily: names, shapes and roles without reading a weight.

mlx-lm's models know how to rename, stack or drop the tensors of a Hugging Face checkpoint (`Model.sanitize`).
That function is run once over placeholders that hold shapes alone. What comes out as the very object that went in
is a plain (renamed) tensor and streams by rows; what was computed (stacked experts, say) is made when it is asked for,
by running `sanitize` again with the real arrays of the tensors that it depends on.
"""

from __future__ import annotations

import dataclasses
import io
import re
import threading
from typing import Any

import numpy as np

from mlxq.architectures.registry import build_model
from mlxq.checkpoint.base import Checkpoint
from mlxq.errors import CheckpointError
from mlxq.ops.threads import in_own_thread
from mlxq.types import ModuleKind, QuantizedTensor, TensorInfo

_LAYER = re.compile(r"\.(\d+)\.")


class ParameterMap:
    """The parameters of a model, each traced to the checkpoint tensors it is made of.

    Attributes:
        checkpoint: the source.
        model: the skeleton (`mlx.nn.Module`) with lazily initialized parameters.
        tensors: parameter name -> `TensorInfo` in the model's own names, with the kind of module that owns it.
        dropped: source tensors that the architecture does not use.
        cast_protected: parameters that must stay in their own dtype (mlx-lm's `cast_predicate`).
        float_modules: module paths that the architecture itself never quantizes, and minimum bits for others
            (mlx-lm's `quant_predicate`): path -> 0 for never, else the bits it asks for.

    Raises:
        CheckpointError: unknown architecture; tensors missing, left over, or of shapes other than config.json's.
    """

    def __init__(self, checkpoint: Checkpoint):
        from mlx.utils import tree_flatten

        self.checkpoint = checkpoint
        self.model = build_model(checkpoint.config)
        self._wanted = {name: tuple(a.shape) for name, a in tree_flatten(self.model.parameters())}
        self._trace()
        self._check()
        self._find_modules()
        self._lock = threading.Lock()
        self._cached: tuple[str, np.ndarray] | None = None

    def _sanitize(self, arrays: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(self.model, "sanitize"):
            return arrays
        try:
            return self.model.sanitize(arrays)
        except (KeyError, IndexError, ValueError, TypeError) as e:
            what = f"tensor {e} is missing" if isinstance(e, KeyError) else str(e).replace("\n", " ")
            kind = self.checkpoint.config.get("model_type")
            raise CheckpointError(f"{self.checkpoint.path}: not a complete {kind} checkpoint: {what}") from e

    def _placeholder(self, info: TensorInfo) -> Any:
        import mlx.core as mx

        dtypes = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
        dtype = dtypes.get(info.dtype, mx.float32)
        return mx.zeros(info.shape, dtype)

    def _trace(self) -> None:
        placeholders = {name: self._placeholder(info) for name, info in self.checkpoint.tensors.items()}
        sources = {id(a): name for name, a in placeholders.items()}
        outputs = self._sanitize(dict(placeholders))
        self._direct: dict[str, str] = {}
        self._computed: dict[str, frozenset[str]] = {}
        infos: dict[str, TensorInfo] = {}
        for name, array in outputs.items():
            source = sources.get(id(array))
            if source is not None:
                self._direct[name] = source
                infos[name] = dataclasses.replace(self.checkpoint.tensors[source], name=name)
            else:
                self._computed[name] = _dependencies(name, array, placeholders)
                dtype = {"float16": "F16", "bfloat16": "BF16"}.get(str(array.dtype).rpartition(".")[2], "F32")
                nbytes = array.size * (4 if dtype == "F32" else 2)
                infos[name] = TensorInfo(name, tuple(array.shape), dtype, nbytes)
        self.tensors = infos
        used = set(self._direct.values()).union(*self._computed.values())
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
        array = self._compute(name)
        return array if rows is None else array[rows].copy()

    def read_quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Codes and grid of a parameter whose `TensorInfo.spec` is set."""
        return self.checkpoint.read_quantized(self._direct[name], rows)

    def _compute(self, name: str) -> np.ndarray:
        """Make a computed parameter. The last one is remembered, since it is read by rows."""
        with self._lock:
            if self._cached is None or self._cached[0] != name:
                self._cached = None
                self._cached = (name, in_own_thread(lambda: self._compute_now(name)))
            return self._cached[1]

    def _compute_now(self, name: str) -> np.ndarray:
        import mlx.core as mx

        needed = self._computed[name]
        arrays = {
            source: self._load(info) if source in needed else self._placeholder(info)
            for source, info in self.checkpoint.tensors.items()
        }
        array = self._sanitize(arrays)[name]
        return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)

    def _load(self, info: TensorInfo) -> Any:
        import mlx.core as mx

        values = self.checkpoint.read(info.name)
        array = mx.array(values)
        return array.view(mx.bfloat16) if info.dtype == "BF16" else array


def _dependencies(name: str, array: Any, placeholders: dict[str, Any]) -> frozenset[str]:
    """The sources that `array` was computed from, read off mlx's graph of it.

    Only sources of the same layer are candidates, when there are any: graphs print in time linear in their number.
    """
    import mlx.core as mx

    layer = _LAYER.search(name)
    same = [n for n in placeholders if layer and (m := _LAYER.search(n)) and m[1] == layer[1]] or list(placeholders)
    text = io.StringIO()
    mx.export_to_dot(text, array, **{f"source_{i}": placeholders[n] for i, n in enumerate(same)})
    used = {int(i) for i in re.findall(r'"source_(\d+)" ->', text.getvalue())}
    return frozenset(same[i] for i in used)


def _kind(module: Any) -> ModuleKind:
    import mlx.nn as nn

    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) else "switch"


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"
