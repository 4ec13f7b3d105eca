"""Calibrated quantization: the model runs block by block over a text, and each block is quantized as it is met.

For each block: its inputs are what the blocks before it, already quantized, make of the text; the block runs with its
float weights while the second moments of every matrix's input are taken; the matrices are quantized; the block runs
again with the quantized weights, and what comes out goes into the next. The codes wait in a `CodeStore`, so a killed
run goes on where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.observe import InputSeen, Observations, observing
from mlxq.calibration.stream import Activations, Block, BlockStream, put_weight, share_of
from mlxq.calibration.texts import CalibrationText, digest
from mlxq.conversion.code_store import Codes, CodeStore
from mlxq.conversion.coders import coder_of
from mlxq.conversion.cost_file import Costs
from mlxq.conversion.folding import FoldedParameters
from mlxq.conversion.matrices import HELD_OUT_ROWS, Found, Matrices, held_out, other_methods
from mlxq.conversion.request import CalibrationRequest
from mlxq.conversion.scaling import Scaling
from mlxq.conversion.tuning import Tuning
from mlxq.errors import CalibrationError
from mlxq.plan.methods import FEEDBACK, is_calibrated
from mlxq.plan.planner import Plan
from mlxq.runtime.weights import to_mlx
from mlxq.types import CancelToken, Progress, ProgressCallback
from mlxq.writers.measured import counted

#: Tokens that say which scales are best, as multiples of the widest input of a block.
_SCALING_TOKENS = 4
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
        self._aside = held_out(len(self.text.sequences))
        of_model = self._matrices, self.cancel, self.progress
        self._tuning = Tuning(self.request.tune, self._aside, self.request.seed, *of_model)
        #: Bytes for hidden states, and for the second moments of a stack of experts.
        self._room = self.request.room
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
        for i, hidden in enumerate(activations):
            self.cancel.check()
            output = block(hidden)
            activations[i] = output
            if not bool(mx.isfinite(output).all()):
                raise CalibrationError(f"{block.path}: its output is not finite on the calibration text")
            self._report(block.index, (1, 2), activations.chunks[i].stop)

    def _observed(
        self,
        block: Block,
        activations: Activations,
        names: Sequence[str],
        stage: tuple[int, int] = (0, 2),
        last: str | None = None,
        only: np.ndarray | None = None,
    ) -> Iterator[Observations]:
        """What goes into the matrices of a block; stacks of experts that have no room at once, some at a time.

        `stage` says which part of the work on the block this is, and of how many; nothing is run after `last`, and of
        the sequences `only` (bool `[S]`) those that it marks.
        """
        for turn in count():
            seen = Observations(room=self._room, turn=turn)
            with observing(block.module, block.path, names, seen, last=last):
                done = 0
                for which, hidden, marked in activations.apart(self._aside):
                    self.cancel.check()
                    if only is not None and not only[which].all():
                        some = np.flatnonzero(only[which])
                        if not len(some):
                            continue
                        hidden, which = hidden[mx.array(some)], which[some]
                    seen.weights = self._weights_of(which)
                    seen.aside = share_of(HELD_OUT_ROWS, len(which), self._aside) if marked else None
                    with contextlib.suppress(InputSeen):
                        mx.eval(block(hidden))
                    done += len(which)
                    if turn == 0 and only is None:
                        self._report(block.index, stage, done)
            yield seen
            names = seen.waiting()
            if not names:
                return

    def _weights_of(self, sequences: np.ndarray) -> Callable[[str], np.ndarray | None]:
        """How much each token of some sequences counts for a matrix's Hessian: half alike, half by its gradients.

        Measured: KL of 4-bit codes 0.0727 with all alike, 0.0653 by gradients alone, 0.0620 by halves.
        """
        length = self.text.sequences.shape[1]

        def of(name: str) -> np.ndarray | None:
            found = self._measured.token_weights.get(name) if self._measured else None
            if found is None:
                return None
            weights = np.ones((len(sequences), length), np.float32)
            known = found.reshape(-1, length)
            some = sequences < len(known)
            weights[some] = 0.5 + 0.5 * known[sequences[some]]
            return weights.ravel()

        return of

    def _quantize_block(self, block: Block, activations: Activations, names: Sequence[str]) -> None:
        """With scales, again without those with which a matrix loses more than by rounding to nearest without them."""
        # A model that runs whole would have to run once for each of its layers.
        groups = self._groups(block, activations[0][:1], names) if block.path else []
        scaling = self._scaling.of_block(block, activations[0][:1], names)
        if scaling.has_places:
            turns = self._observed(block, activations, names, only=self._some(names))
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
        tuned, notes = self._tuning.of_block(block, activations, found, self._measured, self._weights_of)
        self._store(block.index + 1, found, scaling.arrays() | tuned, scaling.notes() | notes)

    def _some(self, names: Sequence[str]) -> np.ndarray:
        """Sequences that are enough to choose scales by, bool `[S]`, those that are held out among them."""
        n, length = self.text.sequences.shape
        wanted = _SCALING_TOKENS * max(self._plans[name].info.shape[-1] for name in names)
        return self._aside | (np.arange(n) % max(1, n * length // wanted) == 0)

    def _at_once(self, block: Block, activations: Activations, names: Sequence[str]) -> Found:
        found = Found()
        for seen in self._observed(block, activations, names):
            self._add(found, seen)
        return found

    def _groups(self, block: Block, hidden: mx.array, names: Sequence[str]) -> list[list[str]]:
        """Matrices by what goes into them, in the order of their use; none where one is used more than once."""
        seen = Observations(room=self._room)
        with observing(block.module, block.path, names, seen):
            mx.eval(block(hidden))
        again = any(len(m.counts) == 1 and m.counts[0] > hidden.shape[1] for m in seen.moments.values())
        return [] if again else seen.by_input()

    def _one_by_one(self, block: Block, activations: Activations, groups: list[list[str]]) -> Found:
        """What goes into a matrix is what those before it, already quantized, make of the text.

        Measured at 4.5 bpw: KL 0.0479, where all matrices of a block see what its float weights make 0.0512.
        """
        found = Found()
        for at, group in enumerate(groups):
            for seen in self._observed(block, activations, group, (at, 2 * len(groups)), group[-1]):
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
        if stream.whole:
            names = [n for n in names if not self._is_head(n)]
        if not self._is_done(0):
            seen = self._inputs_of_tied_head([n for n in names if self._is_head(n)])
            looked_up = [n for n in names if n not in seen.order]
            curvature = None
            if self._measured and looked_up:
                curvature = self._matrices.curvature(self._measured.embedding, _EMBEDDING_DAMP)
            codes = {n: self._matrices.looked_up(n, curvature) for n in looked_up}
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
            return self._inputs_of_head(stream, names)

    def _inputs_of_head(self, stream: BlockStream, names: Sequence[str]) -> Observations:
        aside = held_out(stream.n_sequences)
        return stream.inputs_of_head(lambda path: [n for n in names if n.startswith(f"{path}.")], aside, HELD_OUT_ROWS)

    def _head(self, stream: BlockStream) -> None:
        step = stream.n_blocks + 1
        names = [n for path in stream.parts for n in self._names(path) if n not in self.store]
        if self._is_done(step) or not names:
            return
        self._quantize(step, [self._inputs_of_head(stream, names)])

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

    def _is_head(self, name: str) -> bool:
        """Whether an embedding is the output projection, too."""
        return not any(n.startswith("lm_head.") or ".lm_head." in n for n in self.parameters.tensors)

    def _decoded(self, name: str) -> np.ndarray:
        return self._coder.decoded(self.store.read(name), self._plans[name])

    def _put(self, block: Block, name: str, decoded: np.ndarray) -> None:
        """Let the block that runs compute with decoded weights."""
        path = name.removesuffix(".weight").removeprefix(f"{block.path}.")
        put_weight(block.module, path, to_mlx(decoded))

    def _report(self, index: int, stage: tuple[int, int], done: int) -> None:
        """`done` of the sequences in a part of the work on a block, of how many."""
        if self.progress:
            n, (at, of) = len(self._aside), stage
            per_block = 4 * n
            step = index * per_block + (at * n + done) * 4 // of
            self.progress(Progress("calibrate", step, self._n_blocks * per_block, "passes", f"block {index + 1}"))
