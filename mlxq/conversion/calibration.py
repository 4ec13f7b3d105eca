"""Calibrated quantization: the model runs block by block over a text, and each block is quantized as it is met.

For each block: its inputs are what the blocks before it, already quantized, make of the text; the block runs with its
float weights while the second moments of every matrix's input are taken; the matrices are quantized; the block runs
again with the quantized weights, and what comes out goes into the next. The codes wait in a `CodeStore`, so a killed
run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Moments, Observations, observing
from mlxq.calibration.stream import Activations, Block, BlockStream, put_weight
from mlxq.calibration.texts import CalibrationText, digest
from mlxq.conversion.code_store import Codes, CodeStore
from mlxq.conversion.coders import coder_of
from mlxq.conversion.costs import Costs
from mlxq.conversion.request import CalibrationRequest
from mlxq.errors import CalibrationError, FormatError
from mlxq.formats import floats
from mlxq.plan.methods import is_calibrated
from mlxq.plan.planner import Plan
from mlxq.quantizers.curvature import DAMP, Curvature, output_errors
from mlxq.runtime.weights import to_mlx
from mlxq.types import CancelToken, Progress, ProgressCallback, TensorPlan
from mlxq.writers.measured import counted

#: Rows of input, as a share of the number of inputs, below which an expert has no Hessian of its own.
_LEAST_COVERAGE = 0.25
#: Tokens that say what goes into a head which is the embedding; more where it is wide.
_HEAD_TOKENS = 4096
#: Damping of the gradients' second moments at an embedding, whose free directions cost something where errors are
#: large: KL of Q2_K rows alone 0.097 with 0.01, 0.034 with 0.1, 0.042 with 1, by a search 0.074; of Q4_K rows alone
#: 0.0015 with 0.01, 0.0017 with 0.1, by a search 0.0041.
_EMBEDDING_DAMP = 0.1


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
    costs: Costs | None = None
    notes: list[str] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans = {p.info.name: p for p in self.plan.tensors if is_calibrated(p)}
        self._coder = coder_of(self.plan)
        self._starved: dict[str, int] = {}
        self._blind: list[str] = []
        limit = self.request.max_memory
        #: Bytes for hidden states, and for the second moments of a stack of experts.
        self._room = None if limit is None else limit // 4
        length = self.text.sequences.shape[1]
        self._measured = self.costs.sensitivity if self.costs else None
        if self._measured and self.costs.text != digest(self.text.sequences[: self._measured.n_tokens // length]):
            self.notes.append("the costs were measured on another text, so all tokens of this one count alike")
            self._measured = None

    def run(self) -> None:
        """Quantize every planned matrix.

        Raises:
            CalibrationError: activations overflow (named, with the layer).
            FormatError: weights that are not finite, or beyond the scales' dtype.
            Cancelled: through `cancel`.
        """
        self.cancel.check()
        with BlockStream(self.parameters, self.text.sequences, room=self._room) as stream:
            self._n_blocks = stream.n_blocks
            if stream.whole:
                self.notes.append(f"{stream.whole}: the whole model was run at once, with all its weights in memory")
            self._embedding(stream)
            stream.run(self._visit)
            self._head(stream)
            self._rest(stream.n_blocks + 2)
        if self._blind:
            self.notes.append(
                f"what goes into {counted(self._blind)} was not seen, so they were searched with all inputs alike: "
                f"{self._blind[0]}"
            )
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
        if not self._is_done(block.index + 1) and names:
            self._quantize(block.index + 1, self._observed(block, activations, names))
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

    def _observed(self, block: Block, activations: Activations, names: Sequence[str]) -> Iterator[Observations]:
        """What goes into the matrices of a block; stacks of experts that have no room at once, some at a time."""
        for turn in count():
            seen = Observations(room=self._room, turn=turn)
            with observing(block.module, block.path, names, seen):
                for i, hidden in enumerate(activations):
                    self.cancel.check()
                    seen.weights = self._weights_of(activations.chunks[i])
                    mx.eval(block(hidden))
                    if turn == 0:
                        self._report(block.index, i + 1, 2 * len(activations.chunks))
            yield seen
            names = seen.waiting()
            if not names:
                return

    def _weights_of(self, chunk: slice) -> Callable[[str], np.ndarray | None]:
        """How much each token of some sequences counts for a matrix's Hessian: half alike, half by its gradients.

        Measured: KL of 4-bit codes 0.0727 with all alike, 0.0653 by gradients alone, 0.0620 by halves.
        """
        length = self.text.sequences.shape[1]

        def of(name: str) -> np.ndarray | None:
            found = self._measured.token_weights.get(name) if self._measured else None
            if found is None:
                return None
            weights = np.ones((chunk.stop - chunk.start) * length, np.float32)
            known = found[chunk.start * length : chunk.stop * length]
            weights[: len(known)] = 0.5 + 0.5 * known
            return weights

        return of

    def _quantize(
        self, step: int, turns: Iterable[Observations], others: Mapping[str, Codes] = MappingProxyType({})
    ) -> None:
        parts: dict[str, list[Codes]] = {}
        errors: dict[str, np.ndarray] = {}
        starved: dict[str, int] = {}
        for seen in turns:
            for group in seen.by_input():
                moments = seen.moments[group[0]]
                for i in moments.held:
                    curvature = self._curvature_of(moments, i, group)
                    for name in group:
                        self.cancel.check()
                        part, error = self._matrix(name, i, moments, curvature)
                        parts.setdefault(name, []).append(part)
                        errors[name] = errors.get(name, 0) + error
                        if curvature is None and self._plans[name].method == "gptq":
                            starved[name] = starved.get(name, 0) + 1
        codes = {name: self._coder.stacked(p, self._plans[name].info.shape) for name, p in parts.items()}
        notes = {"errors": {name: [float(e) for e in of] for name, of in errors.items()}, "starved": starved}
        self.store.put(step, codes | others, notes)
        self._is_done(step)

    def _is_done(self, step: int) -> bool:
        """Whether a step is whole, by this run or an earlier one; then what was noted of it counts."""
        notes = self.store.finished(step)
        if notes is not None:
            self.errors |= notes["errors"]
            self._starved |= notes["starved"]
            self._blind += notes.get("blind", [])
        return notes is not None

    def _curvature_of(self, moments: Moments, i: int, group: Sequence[str]) -> Curvature | None:
        """Of one matrix of a stack; None for an expert that saw too little."""
        enough = len(moments.counts) == 1 or moments.counts[i] >= _LEAST_COVERAGE * moments.total.shape[-1]
        if not enough or all(self._plans[name].method == "search" for name in group):
            return None
        try:
            return self._curvature(moments.hessian(i))
        except FormatError as e:
            raise CalibrationError(f"{group[0]}: {e}") from e

    def _curvature(self, hessian: np.ndarray, damp: float = DAMP) -> Curvature:
        return Curvature.of(hessian, damp, sizes=self._coder.sizes)

    def _matrix(self, name: str, i: int, moments: Moments, curvature: Curvature | None) -> tuple[Codes, np.ndarray]:
        plan = self._plans[name]
        w = self._weights(name, slice(i, i + 1) if len(plan.info.shape) > 2 else None)
        curvature = curvature if plan.method == "gptq" else None
        own = moments.counts[i] and curvature is None
        importance = moments.mean_squares(i) if own else moments.pooled_squares()
        return self._best(w.reshape(w.shape[-2:]), plan, curvature, importance, moments.hessian(i))

    def _best(
        self, w: np.ndarray, plan: TensorPlan, curvature: Curvature | None, importance: np.ndarray, hessian: np.ndarray
    ) -> tuple[Codes, np.ndarray]:
        """What loses least on the calibration text: the method's codes, or those of rounding to nearest."""
        how = {"curvature": curvature, "importance": importance, "sweeps": self.request.sweeps}
        made = self._coder.quantize(w, plan, **how)
        plain = self._coder.rounded(w, plan)
        size = max(output_errors(w, hessian).sum(), 1e-30)
        errors = [output_errors(w - w_hat, hessian).sum() / size for _, w_hat in (made, plain)]
        best = made if errors[0] <= errors[1] else plain
        return best[0], np.array([min(errors), errors[1]])

    def _embedding(self, stream: BlockStream) -> None:
        """Matrices that are looked up: by the gradients that come back to them, else searched.

        One that is the head, too, is quantized as a head.
        """
        names = [n for n in self._plans if self._plans[n].info.module == "embedding"]
        if stream.whole:
            names = [n for n in names if not self._is_head(n)]
        if not self._is_done(0):
            seen = self._inputs_of_tied_head([n for n in names if self._is_head(n)])
            looked_up = {n: self._plans[n] for n in names if n not in seen.order}
            curvature = None
            if self._measured and looked_up:
                curvature = self._curvature(self._measured.embedding, _EMBEDDING_DAMP)
            codes = {n: self._coder.quantize(self._weights(n), p, curvature=curvature)[0] for n, p in looked_up.items()}
            self._quantize(0, [seen], codes)
        looked_up = () if stream.whole else names
        stream.embed({n.removesuffix(".weight"): to_mlx(self._decoded(n)) for n in looked_up})

    def _inputs_of_tied_head(self, names: Sequence[str]) -> Observations:
        """What the float model sends into a head that is the embedding: its codes are needed before the first block.

        A part of the text says enough of it.
        """
        seen = Observations()
        if not names:
            return seen
        n, length = self.text.sequences.shape
        width = max(self._plans[name].info.shape[-1] for name in names)
        some = np.linspace(0, n - 1, min(n, -(-max(_HEAD_TOKENS, 4 * width) // length))).astype(int)

        def forwards(block: Block, activations: Activations) -> None:
            for i, hidden in enumerate(activations):
                self.cancel.check()
                activations[i] = block(hidden)

        with BlockStream(self.parameters, self.text.sequences[some], room=self._room) as stream:
            stream.embed()
            stream.run(forwards)
            return stream.inputs_of_head(lambda path: [n for n in names if n.startswith(f"{path}.")])

    def _head(self, stream: BlockStream) -> None:
        step = stream.n_blocks + 1
        names = [n for path in stream.parts for n in self._names(path) if n not in self.store]
        if self._is_done(step) or not names:
            return
        seen = stream.inputs_of_head(lambda path: [n for n in names if n.startswith(f"{path}.")])
        self._quantize(step, [seen])

    def _rest(self, step: int) -> None:
        """Matrices that the text never reached, or whose kind of layer is not known."""
        names = [name for name in self._plans if name not in self.store]
        if self._is_done(step) or not names:
            return
        codes = {}
        for name in names:
            plan, (*lead, _, _) = self._plans[name], self._plans[name].info.shape
            parts = []
            for i in range(prod(lead)):
                self.cancel.check()
                w = self._weights(name, slice(i, i + 1) if lead else None)
                parts.append(self._coder.quantize(w.reshape(w.shape[-2:]), plan)[0])
            codes[name] = self._coder.stacked(parts, plan.info.shape)
        self.store.put(step, codes, {"errors": {}, "starved": {}, "blind": names})
        self._is_done(step)

    def _names(self, path: str) -> list[str]:
        return [n for n in self._plans if n.startswith(f"{path}." if path else "")]

    def _is_head(self, name: str) -> bool:
        """Whether an embedding is the output projection, too."""
        return not any(n.startswith("lm_head.") or ".lm_head." in n for n in self.parameters.tensors)

    def _weights(self, name: str, rows: slice | None = None) -> np.ndarray:
        w = self.parameters.read(name, rows)
        return floats.to_float32(w, floats.dtype_of(w))

    def _decoded(self, name: str) -> np.ndarray:
        return self._coder.decoded(self.store.read(name), self._plans[name])

    def _put(self, module: Any, prefix: str, name: str) -> None:
        """Put the decoded weights into the block that runs."""
        path = name.removesuffix(".weight")
        put_weight(module, path.removeprefix(f"{prefix}."), to_mlx(self._decoded(name)))

    def _report(self, index: int, done: int, total: int) -> None:
        """`done` of the `total` passes of chunks through a block."""
        if self.progress:
            of_all = self._n_blocks * total
            self.progress(Progress("calibrate", index * total + done, of_all, "passes", f"block {index + 1}"))
