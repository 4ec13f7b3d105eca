"""`metal_kernel`, with the call of `mx.fast.metal_kernel`: compiles, runs and checks on the CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from metal_on_cpu import source
from metal_on_cpu.arrays import Sparse, about, empty, mlx_array, storage
from metal_on_cpu.compile import compile_kernel
from metal_on_cpu.options import Options, current
from metal_on_cpu.process import worker
from metal_on_cpu.report import Launched, Report, parse
from metal_on_cpu.source import Kernel
from metal_on_cpu.tokens import MslError

_MAX_THREADS = 1024
_INPUT, _OUTPUT, _CONSTANT = 0, 1, 2  # the runtime's Kind


@dataclass(frozen=True)
class _Compiled:
    """A kernel's library, its buffers in order, and how long it took."""

    library: Path
    buffers: list[source.Parameter]
    seconds: float


class metal_kernel:
    """A kernel, made and called as with `mx.fast.metal_kernel`; options are fields of `Options`.

    `report` is of the last call. A call is eager: it evaluates its inputs, and no gradient passes through it.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object | None = None,
        **options: object,
    ) -> None:
        del compile_options  # of Apple's compiler
        names = (tuple(input_names), tuple(output_names))
        self.kernel = Kernel(name, *names, source, header, ensure_row_contiguous, atomic_outputs)
        self.options = options
        self.report: Report | None = None

    def __call__(
        self,
        *,
        inputs: Sequence,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
        **options: object,
    ) -> list[mx.array]:
        """Runs the kernel and returns its outputs.

        Raises:
            MslError: the text does not compile, the launch is impossible, or the checker found a defect.
        """
        del stream
        o = replace(current(), **{**self.options, **options})
        inputs = [x if isinstance(x, mx.array | Sparse) else mx.array(x) for x in inputs]
        outputs = list(zip(output_shapes, output_dtypes, strict=True))
        try:
            made = self._compile(inputs, list(template or []), outputs, o, verbose)
            if o.dry:
                return [mx.zeros(shape, dtype) for shape, dtype in outputs]
            return self._launch(made, inputs, outputs, (grid, _threadgroup(grid, threadgroup)), init_value, o)
        except MslError as error:
            if o.errors is not None:
                o.errors.append(error)
            raise

    def _compile(
        self, inputs: list[mx.array], template: list[tuple], outputs: list[tuple], o: Options, verbose: bool
    ) -> _Compiled:
        shapes, dtypes = zip(*outputs, strict=True)
        text = source.mlx_source(self.kernel, inputs, template, shapes, dtypes)
        if verbose:
            print(text)
        params = source.parameters(text)
        started = time.perf_counter()
        entry = source.entry_text(text, template, params)
        marked = source.with_lines(text, self.kernel)
        library = compile_kernel(marked, entry, o.build, source.user_files(self.kernel))
        return _Compiled(library, [p for p in params if p.space], time.perf_counter() - started)

    def _launch(
        self, made: _Compiled, inputs: list[mx.array], outputs: list[tuple], size: tuple, init_value, o: Options
    ) -> list[mx.array]:
        started = time.perf_counter()
        buffers, arrays = self._buffers(made.buffers, inputs, outputs, init_value, o.part)
        table = made.library.with_name("blocks.json")
        blocks = json.loads(table.read_text()) if o.mode == "count" else []
        initialized = init_value is not None
        rows = worker.run(made.library, buffers, o.config(*size, initialized), len(blocks), o.time_limit)
        sizes = [b["array"].nbytes for b in buffers]
        names = [p.name for p in made.buffers]
        limits = (initialized, o.threadgroup_limit, o.time_limit)
        self.report = parse(rows, Launched(made.library, names, sizes, *limits, blocks))
        self.report.compile_seconds = made.seconds
        self.report.seconds = time.perf_counter() - started
        if o.record is not None:
            o.record.append((self.kernel.name, self.report))
        found = [f for f in self.report.findings if f.kind not in o.allow]
        if o.raises and found:
            raise MslError("\n".join(f"{self.kernel.name}: {f}" for f in found))
        if o.part:
            parts = [arrays[i][o.part[0] : sum(o.part)] for i in range(len(outputs))]
            return [mlx_array(a, a.shape, dtype) for a, (_, dtype) in zip(parts, outputs, strict=True)]
        return [mlx_array(arrays[i], shape, dtype) for i, (shape, dtype) in enumerate(outputs)]

    def _buffers(
        self,
        params: list[source.Parameter],
        inputs: list[mx.array | Sparse],
        outputs: list[tuple],
        init_value: float | None,
        part: tuple[int, int] | None,
    ) -> tuple[list[dict], dict[int, np.ndarray]]:
        """The kernel's buffers in order, and the outputs' arrays by their index."""
        named = dict(zip(self.kernel.input_names, inputs, strict=True))
        buffers, arrays = [], {}
        for p in params:
            start, parts = 0, {}
            base, _, suffix = p.name.rpartition("_")
            if isinstance(named.get(p.name), Sparse):
                array, pieces = named[p.name].storage()
                parts = {"parts": pieces}
            elif p.name in named:
                array, start = storage(named[p.name], self.kernel.ensure_row_contiguous)
            elif base in named and suffix in ("shape", "strides", "ndim"):
                array = about(named[base], suffix, self.kernel.ensure_row_contiguous)
            else:
                i = self.kernel.output_names.index(p.name)
                array = arrays[i] = empty(*outputs[i], init_value, part is not None)
                if part:
                    parts = {"parts": [slice(part[0] * array.itemsize, sum(part) * array.itemsize)]}
            kind = _OUTPUT if not p.const else _CONSTANT if p.space == "constant" else _INPUT
            buffers.append({"array": array, "start": start, "kind": kind, **parts})
        return buffers, arrays


def run_msl(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple],
    header: str,
    body: str,
    grid,
    threadgroup,
    template: dict | None = None,
    **options: object,
) -> tuple[dict[str, mx.array], Report]:
    """Runs a kernel once: `inputs` name -> array, `outputs` name -> (shape, dtype); returns its outputs and report."""
    kernel = metal_kernel(name, list(inputs), list(outputs), body, header, **options)
    made = kernel(
        inputs=list(inputs.values()),
        grid=grid,
        threadgroup=threadgroup,
        template=list((template or {}).items()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
    return dict(zip(outputs, made, strict=True)), kernel.report


def _threadgroup(grid: Sequence[int], threadgroup: Sequence[int]) -> list[int]:
    """mlx cuts a threadgroup to the grid."""
    if len(grid) != 3 or len(threadgroup) != 3 or min(*grid, *threadgroup) < 1:
        raise MslError(f"error: grid {tuple(grid)} and threadgroup {tuple(threadgroup)} must be three positive sizes")
    cut = [min(a, b) for a, b in zip(threadgroup, grid, strict=True)]
    if cut[0] * cut[1] * cut[2] > _MAX_THREADS:
        raise MslError(f"error: threadgroup of {cut[0] * cut[1] * cut[2]} threads: the most is {_MAX_THREADS}")
    return cut
