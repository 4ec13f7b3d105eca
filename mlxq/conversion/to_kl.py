"""The smallest result whose measured divergence is at most what was asked for, found by making some and measuring them.

Every trial is a whole conversion, measured against its source on text that it was not calibrated on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxq.api import DEFAULT_SEQUENCES
from mlxq.architectures.parameters import ParameterMap
from mlxq.calibration.texts import SELF
from mlxq.checkpoint.source import open_checkpoint
from mlxq.conversion.budget import Frontier, Known
from mlxq.conversion.calibrated import read_text
from mlxq.conversion.job import ConversionResult, Job, refuse_source
from mlxq.conversion.request import CalibrationRequest, manifest_name
from mlxq.errors import PlanError
from mlxq.evaluate.quality.measure import measure_on
from mlxq.evaluate.quality.results import ModelQuality
from mlxq.evaluate.quality.text import TextOptions, Windows, read_windows
from mlxq.plan.planner import Plan
from mlxq.plan.trials import MOST_TRIALS, Trial, next_size, smallest
from mlxq.runtime.tokenizer import load_tokenizer
from mlxq.types import Progress
from mlxq.writers.files import remove_tree, writing
from mlxq.writers.manifest import NAME as MANIFEST
from mlxq.writers.output import OutputDirectory
from mlxq.writers.output_file import OutputFile

#: Sequences left of the calibration text from which on they are what is measured on.
_ENOUGH = 4

#: Converts by a job, with what is known already.
Convert = Callable[[Job, Known], ConversionResult]


def to_kl(
    job: Job, limit: float, calibration: CalibrationRequest, convert: Convert, beside: tuple[str, ...] | None
) -> ConversionResult:
    """Convert until the smallest result within `limit` nats per token is found, or near enough; see `mlxq.convert`.

    `beside` are the names of files beside a GGUF file, None for a directory.

    Raises:
        PlanError: not even the largest result is within the limit.
    """
    stage: OutputDirectory
    if beside is None:
        stage = OutputDirectory(job.path, overwrite=job.overwrite)
    else:
        stage = OutputFile(job.path, overwrite=job.overwrite, beside=beside)
    with open_checkpoint(job.source, job.revision, job.progress) as checkpoint:
        refuse_source(stage.path, checkpoint)
        parameters = ParameterMap(checkpoint)
        known = Known(read_text(job, parameters, calibration))
        windows = _held_out(job, parameters, calibration, *known.text.sequences.shape)
    with stage:
        loop = _Loop(job, limit, stage, known, windows, convert)
        best = loop.run()
        with writing(stage.path):
            for entry in list((best.place if beside is not None else best.place / stage.path.name).iterdir()):
                entry.rename(stage.stage / entry.name)
        name = MANIFEST if beside is None else manifest_name(stage.path)
        loop.describe(stage.stage / name, best)
        loop.clear()
        stage.commit()
    return dataclasses.replace(best.result, path=stage.path, notes=(*best.result.notes, *loop.history()))


def _held_out(job: Job, parameters: ParameterMap, request: CalibrationRequest, n_used: int, length: int) -> Windows:
    """Sequences to measure on: those of the text that follow what is calibrated on, else the sample of `mlxq eval`."""
    if request.source != SELF:
        more = dataclasses.replace(request, n_sequences=n_used + DEFAULT_SEQUENCES)
        text = read_text(job, parameters, more)
        left = text.sequences[n_used:]
        if len(left) >= _ENOUGH:
            return Windows(
                tuple(left), f"{len(left)} sequences of {text.name} that are not calibrated on", "second-half"
            )
    windows = read_windows(load_tokenizer(parameters.checkpoint), TextOptions(length=length))
    return dataclasses.replace(windows, name=f"the {windows.name} of mlxq eval, the calibration text being used up")


@dataclass
class _Made:
    """A trial, what it made, and the directory that holds it."""

    trial: Trial
    place: Path
    result: ConversionResult
    quality: ModelQuality


@dataclass
class _Loop:
    job: Job
    limit: float
    stage: OutputDirectory
    known: Known
    windows: Windows
    convert: Convert
    made: list[_Made] = field(default_factory=list)
    frontier: Frontier | None = None
    wanted: int | None = None

    def run(self) -> _Made:
        """The smallest that is within the limit.

        Raises:
            PlanError: none is.
        """
        self.known.aim = self._aim
        while not self.made or self.wanted is not None:
            self.made.append(self._try())
            self._keep_best()
            self.wanted = self._next()
        trials = [m.trial for m in self.made]
        found = smallest(trials, self.limit)
        if found is None:
            last = self.made[-1]
            raise PlanError(
                f"--target-kl {self.limit:g}: even {last.result.plan.bpw:.2f} bits per weight, the most there is, were"
                f" measured to diverge by {last.trial.measured:.3g} nats per token"
            )
        return next(m for m in self.made if m.trial is found)

    def _aim(self, frontier: Frontier) -> int:
        """What the next trial may take; only when the first has measured the costs, they can say."""
        self.frontier = frontier
        if self.wanted is None:
            self.wanted = self._next()
        return self.wanted

    def _next(self) -> int | None:
        f = self.frontier
        return next_size([m.trial for m in self.made], self.limit, f.least, f.most, f.nbytes_for)

    def _try(self) -> _Made:
        number = len(self.made) + 1
        place = self.stage.stage / f"trial-{number}"
        with writing(self.stage.path):
            place.mkdir()
        shown = f"trial {number} of {MOST_TRIALS} at most"

        def on_plan(plan: Plan) -> None:
            if self.job.on_plan:
                self.job.on_plan(dataclasses.replace(plan, notes=(*plan.notes, *self.history(), shown)))

        def progress(event: Progress) -> None:
            if self.job.progress:
                self.job.progress(dataclasses.replace(event, item=f"{shown}, {event.item}"))

        output = place / self.stage.path.name
        own: dict[str, Any] = {"on_plan": on_plan, "progress": progress, "resumable": False}
        result = self.convert(dataclasses.replace(self.job, output=output, overwrite=False, **own), self.known)
        quality = measure_on(
            self.windows,
            output,
            self.job.source,
            revision=self.job.revision,
            cache=self.stage.stage / "reference",
            progress=progress,
            cancel=self.job.cancel,
        )
        trial = Trial(self.wanted, self.frontier.cost(self.wanted), quality.kl_mean.value)
        return _Made(trial, place, result, quality)

    def _keep_best(self) -> None:
        """Only what may be the result stays on the disk."""
        best = smallest([m.trial for m in self.made], self.limit)
        for made in self.made:
            if made.trial is not best:
                remove_tree(made.place)

    def history(self) -> list[str]:
        """A line for each trial."""
        return [
            f"trial {i}: {m.result.plan.bpw:.3f} bits per weight, divergence {m.quality.kl_mean.value:.4g}"
            f" (standard error {m.quality.kl_mean.se or 0:.2g}) nats per token on {self.windows.name}; at most"
            f" {self.limit:g} was asked for"
            for i, m in enumerate(self.made, 1)
        ]

    def describe(self, manifest: Path, best: _Made) -> None:
        """Add to the manifest what was measured."""
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        content["target_kl"] = {
            "limit": self.limit,
            "text": self.windows.name,
            "kl": best.quality.kl_mean.to_dict(),
            "trials": [{"bpw": round(m.result.plan.bpw, 4), "kl": m.quality.kl_mean.to_dict()} for m in self.made],
        }
        with writing(self.stage.path):
            manifest.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Remove what is not of the result."""
        for place in (self.stage.stage / "reference", *(m.place for m in self.made)):
            remove_tree(place)
