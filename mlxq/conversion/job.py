"""What every conversion is told and gives back, whatever it writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.huggingface import is_tokenizer
from mlxq.errors import CheckpointError, OutputError, VerificationError
from mlxq.plan.planner import Plan
from mlxq.types import CancelToken, ProgressCallback

#: Room for tokenizer, configuration and manifest, beside the weights.
OTHER_FILES = 64 << 20


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did.

    `path` is None for a dry run, `verification` None when it was skipped; `gguf` and `gguf_plan` are the file that was
    made beside a directory, and its plan. `stored_names` are the names of a GGUF file's tensors by those of the plan.
    """

    path: Path | None
    plan: Plan
    config: dict[str, Any]
    verification: Any = None
    notes: tuple[str, ...] = field(default=())
    gguf: Path | None = None
    gguf_plan: Plan | None = None
    stored_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Source, place of the result, and how the work is run; see `mlxq.convert`.

    `name` is what the source is called where that is not its place; `origin` and `options` are what a manifest says of
    it and of how it was made then. Codes that calibration made stay when a `resumable` job is interrupted.
    """

    source: str | os.PathLike[str]
    output: str | os.PathLike[str] | None
    revision: str | None
    overwrite: bool
    verify: bool
    dry_run: bool
    on_plan: Callable[[Plan], None] | None
    progress: ProgressCallback | None
    cancel: CancelToken
    name: str | os.PathLike[str] | None = None
    origin: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    resumable: bool = True

    @property
    def path(self) -> Path:
        """Where the result goes.

        Raises:
            OutputError: nothing was given.
        """
        if self.output is None or not os.fspath(self.output):
            raise OutputError("no output given: a directory, or a file name that ends in .gguf")
        return Path(self.output).expanduser()

    @property
    def source_name(self) -> str:
        """The source as the person named it."""
        return os.fspath(self.source if self.name is None else self.name)

    def prove(self, parameters: ParameterMap, result: Path, plan: Plan, scaled: ParameterMap | None = None) -> Any:
        """Run source and result over a text; None where that is not asked for.

        `scaled` are the weights that the result's were made of, where those are not the source's.

        Raises:
            VerificationError: the result is broken.
        """
        if not self.verify:
            return None
        from mlxq.evaluate.verify import verify

        outcome = verify(parameters, result, bpw=plan.bpw, scaled=scaled, progress=self.progress, cancel=self.cancel)
        if not outcome.passed:
            raise VerificationError(f"{parameters.checkpoint.path}: {outcome.failure}; nothing was written")
        return outcome

    def describe(self, checkpoint: Checkpoint, files: dict[str, str]) -> dict[str, Any]:
        """The source as the manifest names it; `files` are the SHA-256 digests of its weight files."""
        if self.origin is not None:
            return self.origin
        text = self.source_name
        name = os.path.basename(os.path.abspath(text)) if os.path.exists(text) else text
        described: dict[str, Any] = {"name": name, "kind": checkpoint.kind}
        if checkpoint.path.parent.name == "snapshots":
            described["commit"] = checkpoint.path.name
        return described | {"files": dict(sorted(files.items()))}


def companions_of(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """`Checkpoint.companion_files`, with a tokenizer among them.

    Raises:
        CheckpointError: there is none.
    """
    companions = checkpoint.companion_files()
    if not is_tokenizer(companions):
        raise CheckpointError(f"{checkpoint.path}: no tokenizer (tokenizer.json or tokenizer.model) is there")
    return companions


def refuse_source(output: Path, checkpoint: Checkpoint) -> None:
    """An output must neither be, hold nor lie in its source. Files are compared, not names: names may differ in case.

    Raises:
        OutputError: it does.
    """
    source = checkpoint.path
    above = [p for p in (output, *output.resolve().parents) if p.exists()]
    if output.exists():
        if any(output.samefile(p) for p in (source, *checkpoint.files())):
            what = "is the source" if output.samefile(source) else "is a part of the source"
            raise OutputError(f"{output} {what}; choose another output")
        if any(output.samefile(p) for p in source.resolve().parents):
            raise OutputError(f"{output} holds the source; choose another output")
    if any(p.samefile(source) for p in above):
        raise OutputError(f"{output} lies in the source directory; choose another output")
