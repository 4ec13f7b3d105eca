"""The whole of a conversion: checkpoint, plan, quantizers, writers, proof. The only module that sees all stages."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxq.api import public
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.base import Checkpoint
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import CheckpointError, FormatError, OutputError, VerificationError
from mlxq.formats import floats
from mlxq.ops.threads import map_in_threads
from mlxq.plan.planner import Plan, PlanOptions, make_plan
from mlxq.quantizers import rtn
from mlxq.types import FLOAT_BYTES, CancelToken, Progress, ProgressCallback, QuantizedTensor, TensorPlan
from mlxq.writers import mlx as mlx_writer
from mlxq.writers.manifest import NAME as MANIFEST
from mlxq.writers.manifest import manifest_json
from mlxq.writers.output import OutputDirectory
from mlxq.writers.safetensors import SafetensorsWriter, sha256

#: Source bytes of the rows that one thread has in hand: large enough to amortize calls, small enough that a few
#: of them stay far below one tensor of a large model.
_CHUNK_BYTES = 8 << 20
_MAX_THREADS = 8


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did. `path` is None for a dry run; `verification` is None when it was skipped."""

    path: Path | None
    plan: Plan
    config: dict[str, Any]
    verification: Any = None
    notes: tuple[str, ...] = field(default=())


@public
def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: Sequence[str] = (),
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> ConversionResult:
    """Quantize a model into an MLX directory that stock mlx-lm loads, and prove the result.

    Args:
        source: a Hugging Face or MLX directory, a GGUF file, or a Hub id `org/name`.
        output: the directory to make; not needed for a dry run.
        bits, group_size: of the affine grid; default 4 and 64, or the codes of an already quantized source.
        recipe: `uniform` or `mixed` (more bits for sensitive tensors).
        tensor_types: `REGEX=BITS[:GROUP]` overrides; the last that matches a parameter name wins.
        keep: regular expressions of parameters that stay float.
        dtype: `float16`, `bfloat16` or `float32` for scales and kept tensors; default the source's.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing model directory, on success only.
        verify: run source and result over a short text, and fail when the result is broken.
        dry_run: plan only; nothing is read but headers, nothing is written.
        progress: called with `Progress` events, from this thread.
        cancel: stops the conversion within one chunk of rows.

    Raises:
        MlxqError: a subclass for each stage; nothing is left at `output` then.
    """
    options = PlanOptions(bits, group_size, recipe, tuple(tensor_types), tuple(keep), dtype)
    stage = None if dry_run else OutputDirectory(_output_path(output, source), overwrite=overwrite)
    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        parameters = ParameterMap(checkpoint)
        plan = make_plan(
            parameters.tensors.values(),
            options,
            float_modules=parameters.float_modules,
            cast_protected=parameters.cast_protected,
            dropped=parameters.dropped,
        )
        if stage is None:
            return ConversionResult(None, plan, checkpoint.config)
        companions = checkpoint.companion_files()
        if not any(n in companions for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
            raise CheckpointError(
                f"{checkpoint.path}: no tokenizer (tokenizer.json or tokenizer.model) beside the weights"
            )
        job = _Job(parameters, plan, progress, cancel or CancelToken())
        stage.check_space(plan.nbytes + (16 << 20))
        with stage:
            for name, content in companions.items():
                stage.write(name, content)
            stage.write("config.json", mlx_writer.config_json(checkpoint.config, plan.tensors, plan.dtype))
            weights, source_files = job.write_weights(stage.stage)
            verification = _verify(parameters, stage.stage, plan, progress, cancel) if verify else None
            files = {name: sha256(stage.stage / name) for name in ("config.json", *companions)} | weights
            stage.write(
                MANIFEST,
                manifest_json(
                    source=_describe(source, checkpoint, source_files),
                    options=_options(options),
                    plan=plan,
                    files=dict(sorted(files.items())),
                    verification=verification.to_dict() if verification else None,
                    notes=job.notes,
                ),
            )
            stage.commit()
        return ConversionResult(stage.path, plan, checkpoint.config, verification, tuple(job.notes))


class _Chunk(NamedTuple):
    """Some rows of a planned tensor, and where they go."""

    writer: SafetensorsWriter
    plan: TensorPlan
    rows: slice | None


class _Job:
    """Streams every planned tensor from source to writer, some rows at a time, on a few threads."""

    def __init__(self, parameters: ParameterMap, plan: Plan, progress: ProgressCallback | None, cancel: CancelToken):
        self.parameters = parameters
        self.plan = plan
        self.progress = progress
        self.cancel = cancel
        self.notes: list[str] = []
        self._rounding: dict[str, float] = {}
        self._lock = threading.Lock()

    def write_weights(self, directory: Path) -> tuple[dict[str, str], dict[str, str]]:
        """Write the shards; returns the SHA-256 of each shard and of each source file."""
        writer = SafetensorsWriter(directory, [mlx_writer.entries(p) for p in self.plan.tensors])
        n_threads = min(os.cpu_count() or 1, _MAX_THREADS)
        done, total = 0, sum(p.info.nbytes for p in self.plan.tensors)
        sources: dict[str, str] = {}
        work = itertools.chain(self.parameters.checkpoint.files(), self._chunks(writer))
        results = map_in_threads(self._run, work, n_threads)
        try:
            with contextlib.closing(results):
                for name, outcome in results:
                    if isinstance(outcome, str):
                        sources[name] = outcome
                        continue
                    done += outcome
                    if self.progress:
                        self.progress(Progress("quantize", min(done, total), total, "bytes", name))
            self._note_rounding()
            return writer.close(), sources
        finally:
            writer.abort()

    def _run(self, work: Path | _Chunk) -> tuple[str, str | int]:
        """Digest of a source file, or source bytes converted."""
        self.cancel.check()
        if isinstance(work, Path):
            return work.name, sha256(work, self.cancel.check)
        return work.plan.info.name, self._convert(work)

    def _chunks(self, writer: SafetensorsWriter) -> Iterator[_Chunk]:
        for p in self.plan.tensors:
            if not p.info.shape:
                yield _Chunk(writer, p, None)
                continue
            n = p.info.shape[0]
            row_bytes = max(p.info.size // max(n, 1) * 4, 1)
            step = max(_CHUNK_BYTES // row_bytes, 1)
            for start in range(0, n, step):
                yield _Chunk(writer, p, slice(start, min(start + step, n)))

    def _convert(self, chunk: _Chunk) -> int:
        plan, rows = chunk.plan, chunk.rows
        start, count = (rows.start, rows.stop - rows.start) if rows else (0, 1)
        total = plan.info.shape[0] if rows else 1
        try:
            parts = self._parts(plan, rows)
        except FormatError as e:
            raise FormatError(f"{plan.info.name}: {e}") from e
        for entry, part in zip(mlx_writer.entries(plan), parts, strict=True):
            chunk.writer.write(entry.name, part.data, entry.nbytes // total * start)
        return plan.info.nbytes * count // total

    def _parts(self, plan: TensorPlan, rows: slice | None) -> list[Any]:
        name = plan.info.name
        if plan.action == "repack":
            q = self.parameters.read_quantized(name, rows)
            return _contiguous(q)
        w = self.parameters.read(name, rows)
        if plan.spec is not None:
            return _contiguous(rtn.quantize(w, plan.spec, plan.dtype))
        if plan.dtype not in FLOAT_BYTES:
            return [w]
        return [self._cast(plan, w)]

    def _cast(self, plan: TensorPlan, w: Any) -> Any:
        """A kept tensor in its stored dtype; what rounding changes is noted."""
        if not floats.all_finite(w):
            raise FormatError("a weight is NaN or infinite")
        dtype = floats.dtype_of(w)
        if dtype == plan.dtype:
            return w
        exact = floats.to_float32(w, dtype)
        cast = floats.from_float32(exact, plan.dtype)
        if not floats.all_finite(cast):
            raise FormatError(f"the weights exceed the range of {plan.dtype}; choose another --dtype")
        largest = abs(exact).max(initial=0)
        error = abs(floats.to_float32(cast, plan.dtype) - exact).max(initial=0) / largest if largest else 0.0
        with self._lock:
            self._rounding[plan.info.name] = max(self._rounding.get(plan.info.name, 0.0), float(error))
        return cast

    def _note_rounding(self) -> None:
        rounded = {name: error for name, error in self._rounding.items() if error}
        if rounded:
            worst = max(rounded, key=lambda n: rounded[n])
            self.notes.append(
                f"{len(rounded)} kept tensors were rounded to {self.plan.dtype}; the largest error is "
                f"{rounded[worst]:.1e} of the tensor's maximum, in {worst}"
            )


def _contiguous(q: QuantizedTensor) -> list[Any]:
    return [np.ascontiguousarray(a) for a in (q.w_q, q.scales, q.biases)]


def _output_path(output: str | os.PathLike[str] | None, source: str | os.PathLike[str]) -> Path:
    if output is None:
        raise OutputError("no output directory given")
    path, origin = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if path == origin or path in origin.parents:
        raise OutputError(f"{output} holds the source; choose another output")
    return Path(output)


def _verify(
    parameters: ParameterMap, result: Path, plan: Plan, progress: ProgressCallback | None, cancel: CancelToken | None
) -> Any:
    from mlxq.evaluate.verify import verify

    outcome = verify(parameters, result, bpw=plan.bpw, progress=progress, cancel=cancel)
    if not outcome.passed:
        raise VerificationError(f"{parameters.checkpoint.path}: {outcome.failure}; nothing was written")
    return outcome


def _describe(source: Any, checkpoint: Checkpoint, files: dict[str, str]) -> dict[str, Any]:
    text = os.fspath(source)
    name = os.path.basename(os.path.abspath(text)) if os.path.exists(text) else text
    return {"name": name, "kind": checkpoint.kind, "files": dict(sorted(files.items()))}


def _options(options: PlanOptions) -> dict[str, Any]:
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "recipe": options.recipe,
        "tensor_types": list(options.tensor_types),
        "keep": list(options.keep),
        "dtype": options.dtype,
    }
