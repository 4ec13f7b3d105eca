"""Calibrated quantization: the model runs block by block over a text, and each block is quantized as it is met.

The inputs of a block are what the blocks before it, already quantized, make of the text. Its matrices are quantized in
the order of their use: the block runs up to each (`inputs`), with those before it quantized, while the second moments
of what goes in are taken. Then the whole block runs, and what comes out goes into the next. The codes wait in a
`CodeStore`, so a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import Observations
from mlxq.calibration.stream import Activations, Block, BlockStream, put_weight
from mlxq.calibration.texts import CalibrationText, digest
from mlxq.conversion.code_store import Codes, CodeStore
from mlxq.conversion.coders import coder_of
from mlxq.conversion.cost_file import Costs
from mlxq.conversion.folding import FoldedParameters
from mlxq.conversion.inputs import Inputs
from mlxq.conversion.matrices import Found, Matrices, other_methods
from mlxq.conversion.request import CalibrationRequest
from mlxq.conversion.scaling import Scaling
from mlxq.conversion.tuning import Tuning
from mlxq.errors import CalibrationError
from mlxq.plan.methods import FEEDBACK, is_calibrated
from mlxq.plan.planner import Plan
from mlxq.runtime.weights import to_mlx
from mlxq.types import CancelToken, Progress, ProgressCallback
from mlxq.writers.measured import counted

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
        errors: parameter -> squared output error, of what was kept and of rounding to nearest, relative, on sequences
            that are held out; before tuning, which looks at whole blocks.
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
        self.folded = FoldedParameters(self.parameters, self.plan)
        self._matrices = Matrices(self._plans, coder_of(self.plan), self.folded, self.request.sweeps)
        self._coder = self._matrices.coder
        self._scaling = Scaling(self._matrices)
        self._starved: dict[str, int] = {}
        self._blind: list[str] = []
        #: Parameter -> method -> matrices that it was kept for, instead of the one that was asked for.
        self._instead: dict[str, dict[str, int]] = {}
        #: Bytes for hidden states, and for the second moments of a stack of experts.
        self._room = self.request.room
        length = self.text.sequences.shape[1]
        self._measured = self.costs.sensitivity if self.costs else None
        if self._measured and self.costs.text != digest(self.text.sequences[: self._measured.n_tokens // length]):
            self.notes.append("the costs were measured on another text, so all tokens of this one count alike")
            self._measured = None
        self._inputs = Inputs(self.text.sequences, self._measured, self._room, self.cancel)
        of_model = self._matrices, self.cancel, self.progress
        self._tuning = Tuning(self.request.tune, self._inputs.aside, self.request.seed, *of_model)

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
            self._tuning.begin(stream)
            self._embedding(stream)
            stream.run(self._visit)
            self._head(stream)
            self._rest(stream.n_blocks + 2)
        if self._blind:
            self.notes.append(
                f"what goes into {counted(self._blind)} was not seen, so they were searched with all inputs alike: "
                f"{self._blind[0]}"
            )
        self.notes += other_methods(self._instead) + self._scaling.said() + self._tuning.said()
        if self._starved:
            n = sum(self._starved.values())
            self.notes.append(
                f"{n} experts saw too few tokens for a Hessian of their own and were searched with the importance of "
                f"all experts of their layer: {min(self._starved)}"
            )

    def _visit(self, block: Block, activations: Activations) -> None:
        self.cancel.check()
        names = self._names(block.path)
        self._tuning.run_float(block)
        if not self._is_done(block.index + 1) and names:
            self._quantize_block(block, activations, names)
        for name in names:
            if name in self.store:
                self._put(block, name, self._decoded(name))
        inside = [n for n in self.folded.scaled if n.startswith(f"{block.path}.") and n not in self.store]
        self.folded.put(block, inside)
        report = self._reporter(block.index, 1)
        for i, hidden in enumerate(activations):
            self.cancel.check()
            output = block(hidden)
            activations[i] = output
            if not bool(mx.isfinite(output).all()):
                raise CalibrationError(f"{block.path}: its output is not finite on the calibration text")
            report(activations.chunks[i].stop)

    def _quantize_block(self, block: Block, activations: Activations, names: Sequence[str]) -> None:
        """With scales, again without those with which a matrix loses more than by rounding to nearest without them."""
        # A model that runs whole would have to run once for each of its layers.
        groups = self._inputs.groups(block, activations[0][:1], names) if block.path else []
        scaling = self._scaling.of_block(block, activations[0][:1], names)
        if scaling.has_places:
            width = max(self._plans[name].info.shape[-1] for name in names)
            turns = self._inputs.of_block(block, activations, names, only=self._inputs.some(width))
            scaling.choose(next(turns))
            turns.close()
            self._matrices.forget()
        changed = scaling.changed
        while True:
            self.folded.put(block, changed)
            found = self._one_by_one(block, activations, groups) if groups else self._at_once(block, activations, names)
            if not scaling.take_back(found.errors):
                break
            changed = sorted({*changed, *names})
        tuned, notes = self._tuning.of_block(block, activations, found, self._measured, self._inputs.weights_of)
        self._store(block.index + 1, found, scaling.arrays() | tuned, scaling.notes() | notes)

    def _at_once(self, block: Block, activations: Activations, names: Sequence[str]) -> Found:
        found = Found()
        for seen in self._inputs.of_block(block, activations, names, on_sequences=self._reporter(block.index)):
            self._add(found, seen)
        return found

    def _one_by_one(self, block: Block, activations: Activations, groups: list[list[str]]) -> Found:
        """What goes into a matrix is what those before it, already quantized, make of the text.

        Measured at 4.5 bpw: KL 0.0479, where all matrices of a block see what its float weights make 0.0512.
        """
        found = Found()
        for at, group in enumerate(groups):
            report = self._reporter(block.index, at, 2 * len(groups))
            for seen in self._inputs.of_block(block, activations, group, group[-1], on_sequences=report):
                self._add(found, seen)
            for name in group:
                plan = self._plans[name]
                codes = self._coder.stacked(found.parts[name], plan.info.shape)
                self._put(block, name, self._coder.decoded(codes, plan))
        return found

    def _quantize(
        self, step: int, turns: Iterable[Observations], others: Mapping[str, Codes] = MappingProxyType({})
    ) -> None:
        found = Found()
        for seen in turns:
            self._add(found, seen)
        self._store(step, found, others)

    def _add(self, found: Found, seen: Observations) -> None:
        """Codes of the matrices whose inputs were seen."""
        for group in seen.by_input():
            moments = seen.moments[group[0]]
            for i in moments.held:
                curvature = self._matrices.curvature_of(moments, i, group)
                for name in group:
                    self.cancel.check()
                    asked = self._plans[name].method
                    found.add(name, asked, self._matrices.made(name, i, moments, curvature))
                    if curvature is None and asked in FEEDBACK:
                        found.starved[name] = found.starved.get(name, 0) + 1
        self._matrices.forget()

    def _store(
        self, step: int, found: Found, others: Mapping[str, Codes], notes: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        codes = {n: self._coder.stacked(p, self._plans[n].info.shape) for n, p in found.parts.items()}
        self.store.put(step, codes | others, found.notes() | notes)
        self._is_done(step)

    def _is_done(self, step: int) -> bool:
        """Whether a step is whole, by this run or an earlier one; then what was noted of it counts."""
        notes = self.store.finished(step)
        if notes is not None:
            self.errors |= notes["errors"]
            self._starved |= notes["starved"]
            self._instead |= notes["instead"]
            self._blind += notes.get("blind", [])
            self._scaling.take_up(notes, self.store.read)
            self._tuning.take_up(notes)
        return notes is not None

    def _embedding(self, stream: BlockStream) -> None:
        """Matrices that are looked up: by the gradients that come back to them, else searched.

        One that is the head, too, is quantized as a head.
        """
        names = [n for n in self._plans if self._plans[n].info.module == "embedding"]
        tied = not self.parameters.has_output_projection
        if stream.whole and tied:
            names = []
        if not self._is_done(0):
            heads = names if tied else []
            width = max((self._plans[n].info.shape[-1] for n in heads), default=0)
            seen = self._inputs.of_tied_head(self.parameters, heads, width)
            looked_up = [n for n in names if n not in seen.order]
            curvature = None
            if self._measured and looked_up:
                curvature = self._matrices.curvature(self._measured.embedding, _EMBEDDING_DAMP)
            codes = {n: self._matrices.looked_up(n, curvature) for n in looked_up}
            self._quantize(0, [seen], codes)
        looked_up = () if stream.whole else names
        stream.embed({n.removesuffix(".weight"): to_mlx(self._decoded(n)) for n in looked_up})

    def _head(self, stream: BlockStream) -> None:
        step = stream.n_blocks + 1
        names = [n for path in stream.parts for n in self._names(path) if n not in self.store]
        if self._is_done(step) or not names:
            return
        self._quantize(step, [self._inputs.of_head(stream, names)])

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
                parts.append(self._coder.quantize(self._matrices.weights(name, i), plan)[0])
            codes[name] = self._coder.stacked(parts, plan.info.shape)
        self.store.put(step, codes, Found().notes() | {"blind": names})
        self._is_done(step)

    def _names(self, path: str) -> list[str]:
        return [n for n in self._plans if n.startswith(f"{path}." if path else "")]

    def _decoded(self, name: str) -> np.ndarray:
        return self._coder.decoded(self.store.read(name), self._plans[name])

    def _put(self, block: Block, name: str, decoded: np.ndarray) -> None:
        """Let the block that runs compute with decoded weights."""
        path = name.removesuffix(".weight").removeprefix(f"{block.path}.")
        put_weight(block.module, path, to_mlx(decoded))

    def _reporter(self, index: int, part: int = 0, parts: int = 2) -> Callable[[int], None]:
        """Is told how many sequences were run in one of the parts of the work on a block."""

        def report(done: int) -> None:
            if self.progress:
                n = len(self.text.sequences)
                per_block = 4 * n
                step = index * per_block + (part * n + done) * 4 // parts
                self.progress(Progress("calibrate", step, self._n_blocks * per_block, "passes", f"block {index + 1}"))

        return report
