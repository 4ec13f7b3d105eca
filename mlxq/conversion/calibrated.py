"""Calibrated quantization: the model runs block by block over a text, and each block is quantized as it is met.

For each block: its inputs are what the blocks before it, already quantized, make of the text; the block runs with its
float weights while the second moments of every matrix's input are taken; the matrices are quantized; the block runs
again with the quantized weights, and what comes out goes into the next. The codes wait in a `CodeStore`, so a killed
run goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Moments, Observations, observing
from mlxq.calibration.stream import Activations, Block, BlockStream
from mlxq.calibration.texts import CalibrationText
from mlxq.checkpoint.config import context_length
from mlxq.conversion.code_store import CodeStore
from mlxq.conversion.job import Job
from mlxq.conversion.request import CalibrationRequest
from mlxq.errors import CalibrationError, FormatError
from mlxq.formats import floats
from mlxq.plan.planner import Plan
from mlxq.quantizers import calibrated
from mlxq.quantizers.curvature import Curvature
from mlxq.runtime.weights import to_mlx
from mlxq.types import CancelToken, Progress, ProgressCallback, QuantizedTensor, TensorPlan

#: Methods that need a calibration text.
METHODS = ("search", "gptq")
#: Rows of input, as a share of the number of inputs, below which an expert has no Hessian of its own.
_LEAST_COVERAGE = 0.25


@dataclass
class Calibration:
    """A run over the blocks of a model.

    Attributes:
        store: where the codes go.
        notes: what a person should know: fallbacks, experts that the text did not reach.
        errors: parameter -> squared output error, of what the method made and of rounding to nearest, relative.
    """

    parameters: ParameterMap
    plan: Plan
    text: CalibrationText
    request: CalibrationRequest
    store: CodeStore
    progress: ProgressCallback | None
    cancel: CancelToken
    notes: list[str] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans = {
            p.info.name: p
            for p in self.plan.tensors
            if p.spec is not None and p.method in METHODS and p.action != "repack"
        }
        self._starved: dict[str, int] = {}

    def run(self) -> None:
        """Quantize every planned matrix.

        Raises:
            CalibrationError: activations overflow (named, with the layer).
            FormatError: weights that are not finite, or beyond the scales' dtype.
            Cancelled: through `cancel`.
        """
        with BlockStream(self.parameters, self.text.sequences, on_disk=self._on_disk()) as stream:
            self._n_blocks = stream.n_blocks
            self._embedding(stream)
            stream.run(self._visit)
            self._head(stream)
        if self._starved:
            n = sum(self._starved.values())
            self.notes.append(
                f"{n} experts saw too few tokens for a Hessian of their own and were searched with the importance of "
                f"all experts of their layer: {min(self._starved)}"
            )

    def _visit(self, block: Block, activations: Activations) -> None:
        self.cancel.check()
        names = self._names(block.path)
        total = len(activations.chunks) * 2
        if self.store.finished(block.index + 1) is None and names:
            seen = Observations()
            with observing(block.module, block.path, names, seen):
                for i, hidden in enumerate(activations):
                    self.cancel.check()
                    mx.eval(block(hidden))
                    self._report(block.index, i + 1, total)
            self._quantize(block.index + 1, seen)
        for name in names:
            if name in self.store:
                self._put(block.module, block.path, name)
        for i, hidden in enumerate(activations):
            self.cancel.check()
            output = block(hidden)
            activations[i] = output
            if not bool(mx.isfinite(output).all()):
                raise CalibrationError(f"{block.path}: its output is not finite on the calibration text")
            self._report(block.index, total // 2 + i + 1, total)

    def _quantize(self, step: int, seen: Observations) -> None:
        codes: dict[str, QuantizedTensor] = {}
        notes: dict[str, Any] = {"errors": {}, "starved": {}}
        for group in seen.by_input():
            moments = seen.moments[group[0]]
            curvatures = self._curvatures(moments, group)
            for name in group:
                self.cancel.check()
                codes[name], error = self._matrix(name, moments, curvatures, notes)
                notes["errors"][name] = error
        self.store.put(step, codes, notes)
        self.errors |= notes["errors"]
        self._starved |= notes["starved"]

    def _curvatures(self, moments: Moments, group: Sequence[str]) -> list[Curvature | None]:
        """Of each matrix of a stack; None for an expert that saw too little."""
        if all(self._plans[name].method == "search" for name in group):
            return [None] * len(moments.counts)
        out: list[Curvature | None] = []
        for i, n in enumerate(moments.counts):
            enough = len(moments.counts) == 1 or n >= _LEAST_COVERAGE * moments.total.shape[-1]
            try:
                out.append(Curvature.of(moments.hessian(i)) if enough else None)
            except FormatError as e:
                raise CalibrationError(f"{group[0]}: {e}") from e
        return out

    def _matrix(
        self, name: str, moments: Moments, curvatures: Sequence[Curvature | None], notes: dict[str, Any]
    ) -> tuple[QuantizedTensor, list[float]]:
        plan = self._plans[name]
        w = self._weights(name)
        matrices = w.reshape(-1, *w.shape[-2:])
        pooled = moments.total.sum(axis=0).diagonal() / max(moments.counts.sum(), 1)
        parts, errors = [], np.zeros(2)
        for i, matrix in enumerate(matrices):
            self.cancel.check()
            curvature = curvatures[i] if plan.method == "gptq" else None
            if plan.method == "gptq" and curvature is None:
                notes["starved"][name] = notes["starved"].get(name, 0) + 1
            importance = moments.mean_squares(i) if moments.counts[i] and curvature is None else pooled
            part, error = self._best(matrix, plan, curvature, importance.astype(np.float32), moments.hessian(i))
            parts.append(part)
            errors += error
        return _stacked(parts, w.shape), [float(e) for e in errors]

    def _best(
        self, w: np.ndarray, plan: TensorPlan, curvature: Curvature | None, importance: np.ndarray, hessian: np.ndarray
    ) -> tuple[QuantizedTensor, np.ndarray]:
        """What loses least on the calibration text: the method's codes, or those of rounding to nearest."""
        made = calibrated.quantize(
            w, plan.spec, plan.dtype, curvature=curvature, importance=importance, sweeps=self.request.sweeps
        )
        plain = calibrated.rounded(w, plan.spec, plan.dtype)
        size = max(_output_error(w, hessian), 1e-30)
        errors = [_output_error(w - w_hat, hessian) / size for _, w_hat in (made, plain)]
        best = made if errors[0] <= errors[1] else plain
        return best[0], np.array([min(errors), errors[1]])

    def _embedding(self, stream: BlockStream) -> None:
        """Matrices that are looked up: searched, all columns alike."""
        names = [n for n in self._plans if self._plans[n].info.module == "embedding" and not self._is_head(n)]
        if self.store.finished(0) is None:
            codes = {}
            for name in names:
                plan = self._plans[name]
                codes[name] = calibrated.quantize(self._weights(name), plan.spec, plan.dtype)[0]
            self.store.put(0, codes, {})
        for name in names:
            layer = stream.part(name.removesuffix(".weight"))
            layer.weight = mx.array(self._decoded(name))
        stream.embed()

    def _head(self, stream: BlockStream) -> None:
        step = stream.n_blocks + 1
        names = [n for path in stream.parts for n in self._names(path) if n not in self.store]
        if self.store.finished(step) is not None or not names:
            return
        seen = stream.inputs_of_head(lambda path: [n for n in names if n.startswith(f"{path}.")])
        self._quantize(step, seen)

    def _names(self, path: str) -> list[str]:
        return [n for n in self._plans if n.startswith(f"{path}.")]

    def _is_head(self, name: str) -> bool:
        """Whether an embedding is the output projection, too."""
        return not any(n.startswith("lm_head.") or ".lm_head." in n for n in self.parameters.tensors)

    def _weights(self, name: str) -> np.ndarray:
        w = self.parameters.read(name)
        return floats.to_float32(w, floats.dtype_of(w))

    def _decoded(self, name: str) -> np.ndarray:
        from mlxq.formats import crossings

        return crossings.dequantize(self.store.read(name))

    def _put(self, module: Any, prefix: str, name: str) -> None:
        """Put the decoded weights into the block that runs."""
        module.load_weights([(name.removeprefix(f"{prefix}."), to_mlx(self._decoded(name)))], strict=False)

    def _on_disk(self) -> bool:
        limit = self.request.max_memory
        return limit is not None and 4 * self.text.n_tokens * self._width() > limit // 4

    def _width(self) -> int:
        return int(self.parameters.checkpoint.config.get("hidden_size") or 0)

    def _report(self, index: int, done: int, total: int) -> None:
        """`done` of the `total` passes of chunks through a block."""
        if self.progress:
            of_all = self._n_blocks * total
            self.progress(Progress("calibrate", index * total + done, of_all, "passes", f"block {index + 1}"))


def store_key(
    parameters: ParameterMap, plan: Plan, text: CalibrationText, request: CalibrationRequest
) -> dict[str, Any]:
    """What the codes depend on: the weights' files, the plan, the text, and how it is read."""
    from mlxq import __version__

    files = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in parameters.checkpoint.files()]
    sequences = hashlib.sha256(np.ascontiguousarray(text.sequences, "<i4")).hexdigest()
    planned = [[p.info.name, str(p.spec), p.dtype, p.method] for p in plan.tensors if p.spec is not None]
    return {
        "mlxq": __version__,
        "files": files,
        "tensors": hashlib.sha256(repr(planned).encode()).hexdigest(),
        "text": [text.name, text.sha256, sequences],
        "sweeps": request.sweeps,
    }


def _output_error(errors: np.ndarray, hessian: np.ndarray) -> float:
    """Sum over rows of `e H e`."""
    return float(np.einsum("nk,nk->", errors @ hessian, errors, dtype=np.float64))


def _stacked(parts: Sequence[QuantizedTensor], shape: tuple[int, ...]) -> QuantizedTensor:
    first = parts[0]
    if len(shape) == 2:
        return first
    arrays = [np.stack([getattr(p, a) for p in parts]) for a in ("w_q", "scales", "biases")]
    arrays = [a.reshape(*shape[:-1], a.shape[-1]) for a in arrays]
    return QuantizedTensor(*arrays, first.spec, shape, first.dtype)


def is_needed(plan: Plan) -> bool:
    """Whether any tensor is quantized by a method that needs a text."""
    return any(p.method in METHODS and p.spec is not None and p.action != "repack" for p in plan.tensors)


def read_text(job: Job, parameters: ParameterMap, request: CalibrationRequest) -> CalibrationText:
    """The token sequences to calibrate on.

    Raises:
        CalibrationError: the text is unfit.
    """
    from mlxq.calibration.texts import calibration_sequences
    from mlxq.runtime.tokenizer import load_tokenizer

    config = parameters.checkpoint.config
    return calibration_sequences(
        load_tokenizer(parameters.checkpoint),
        request.source,
        n_sequences=request.n_sequences,
        length=min(request.length, context_length(config) or request.length),
        vocab_size=config.get("vocab_size"),
        seed=request.seed,
        progress=job.progress,
    )


def calibrate(
    job: Job, output: Path, parameters: ParameterMap, plan: Plan, text: CalibrationText, request: CalibrationRequest
) -> tuple[CodeStore, list[str]]:
    """Codes of every tensor that the plan gives to a calibrated method, and notes on how they came about.

    Raises:
        CalibrationError: activations overflow.
    """
    store = CodeStore(output, store_key(parameters, plan, text, request))
    run = Calibration(parameters, plan, text, request, store, job.progress, job.cancel)
    run.run()
    return store, run.notes
