"""`metal_kernel`, with the call of `mx.fast.metal_kernel`: compiles, runs and checks on the CPU."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import mlx.core as mx
import numpy as np

from metal_on_cpu import source
from metal_on_cpu.compile import Build, compile_kernel
from metal_on_cpu.process import worker
from metal_on_cpu.report import Launched, Report, parse
from metal_on_cpu.tokens import MslError

_MAX_THREADS = 1024
_ORDERS = ("forward", "reverse", "random")
_INPUT, _OUTPUT, _CONSTANT = 0, 1, 2  # the runtime's Kind


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled (see `Build`) and run.

    Attributes:
        order: of lanes, SIMD-groups and threadgroups: forward, reverse, or random by `seed`.
        flush_denormals: denormal floats are zero.
        keep_going: after a read out of bounds the run goes on.
        threadgroup_limit: bytes.
        time_limit: seconds of processor time.
        raises: findings raise MslError; else they are in the report only.
        allow: kinds of findings that do not raise.
        record: called with each launch's kernel name and report.
    """

    mode: str = "check"
    opt: str = "-O2"
    contract: str = "off"
    simd_order: int = 0
    lint: bool = True
    function_constants: dict[int, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    order: str = "forward"
    seed: int = 1
    flush_denormals: bool = False
    keep_going: bool = False
    threadgroup_limit: int = 32768
    time_limit: float = 60.0
    raises: bool = True
    allow: tuple[str, ...] = ()
    record: list | None = None

    @property
    def build(self) -> Build:
        constants = tuple(sorted(self.function_constants.items()))
        shared = {f.name: getattr(self, f.name) for f in fields(Build) if f.name != "function_constants"}
        return Build(**shared, function_constants=constants)

    def config(self, grid: Sequence[int], threadgroup: Sequence[int], initialized: bool) -> dict:
        """Fields of the runtime's MslConfig."""
        return {
            "grid": list(grid),
            "threadgroup": list(threadgroup),
            "check": self.mode != "fast",
            "order": _ORDERS.index(self.order),
            "flush_denormals": self.flush_denormals,
            "keep_going": self.keep_going,
            "threadgroup_limit": self.threadgroup_limit,
            "initialized": initialized,
            "seed": self.seed,
        }


_defaults = Options()


@contextlib.contextmanager
def options(**changes: object) -> Iterator[None]:
    """Other defaults (fields of `Options`) for kernels that are called inside the context."""
    global _defaults
    before = _defaults
    _defaults = replace(before, **changes)
    try:
        yield
    finally:
        _defaults = before


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
        self.kernel = _kernel(name, *names, source, header, ensure_row_contiguous, atomic_outputs)
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
        o = replace(_defaults, **{**self.options, **options})
        inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        template = list(template or [])
        text = source.mlx_source(self.kernel, inputs, template, output_shapes, output_dtypes)
        if verbose:
            print(text)
        params = source.parameters(text)
        started = time.perf_counter()
        entry = source.entry_text(text, template, params)
        marked = source.with_lines(text, self.kernel)
        library = compile_kernel(marked, entry, o.build, source.user_files(self.kernel))
        compiled = time.perf_counter()
        buffers, outputs = self._buffers(params, inputs, output_shapes, output_dtypes, init_value)
        threadgroup = _threadgroup(grid, threadgroup)
        table = library.with_name("blocks.json")
        blocks = json.loads(table.read_text()) if o.mode == "count" else []
        config = o.config(grid, threadgroup, init_value is not None)
        rows = worker.run(library, buffers, config, len(blocks), o.time_limit)
        sizes = [b["array"].nbytes for b in buffers]
        names = [p.name for p in params if p.space]
        limits = (init_value is not None, o.threadgroup_limit, o.time_limit)
        self.report = parse(rows, Launched(library, names, sizes, *limits, blocks))
        self.report.compile_seconds = compiled - started
        self.report.seconds = time.perf_counter() - compiled
        if o.record is not None:
            o.record.append((self.kernel.name, self.report))
        found = [f for f in self.report.findings if f.kind not in o.allow]
        if o.raises and found:
            raise MslError("\n".join(f"{self.kernel.name}: {f}" for f in found))
        return [_mlx_array(outputs[i], output_shapes[i], dtype) for i, dtype in enumerate(output_dtypes)]

    def _buffers(self, params, inputs, shapes, dtypes, init_value) -> tuple[list[dict], dict[int, np.ndarray]]:
        """The kernel's buffers in order, and the outputs' arrays by their index."""
        named = dict(zip(self.kernel.input_names, inputs, strict=True))
        buffers, outputs = [], {}
        for p in params:
            if not p.space:
                continue
            start = 0
            base, _, suffix = p.name.rpartition("_")
            if p.name in named:
                array, start = _storage(named[p.name], self.kernel.ensure_row_contiguous)
            elif base in named and suffix in ("shape", "strides", "ndim"):
                array = _about(named[base], suffix, self.kernel.ensure_row_contiguous)
            else:
                i = self.kernel.output_names.index(p.name)
                array = outputs[i] = _empty(shapes[i], dtypes[i], init_value)
            kind = _OUTPUT if not p.const else _CONSTANT if p.space == "constant" else _INPUT
            buffers.append({"array": array, "start": start, "kind": kind})
        return buffers, outputs


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


_kernel = source.Kernel


def _threadgroup(grid: Sequence[int], threadgroup: Sequence[int]) -> list[int]:
    """mlx cuts a threadgroup to the grid."""
    if len(grid) != 3 or len(threadgroup) != 3 or min(*grid, *threadgroup) < 1:
        raise MslError(f"error: grid {tuple(grid)} and threadgroup {tuple(threadgroup)} must be three positive sizes")
    cut = [min(a, b) for a, b in zip(threadgroup, grid, strict=True)]
    if cut[0] * cut[1] * cut[2] > _MAX_THREADS:
        raise MslError(f"error: threadgroup of {cut[0] * cut[1] * cut[2]} threads: the most is {_MAX_THREADS}")
    return cut


def _numpy_view(x: mx.array) -> np.ndarray:
    """The array without a copy, strides as they are; bfloat16 as the uint16 of its bits."""
    mx.eval(x)
    bits = mx.view(x, mx.uint16) if x.dtype == mx.bfloat16 else x
    mx.eval(bits)
    return np.array(bits, copy=False)


def _storage(x: mx.array, row_contiguous: bool) -> tuple[np.ndarray, int]:
    """The memory that a kernel sees of an input, as a flat array, and the byte where its pointer stands."""
    a = _numpy_view(x)
    if row_contiguous or a.flags.c_contiguous or not a.size:
        return np.ascontiguousarray(a).reshape(-1), 0
    reach = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + a.itemsize
    first = a[tuple(slice(-1, None) if r < 0 else slice(0, 1) for r in reach)]
    flat = np.lib.stride_tricks.as_strided(first.reshape(-1), ((high - low) // a.itemsize,), (a.itemsize,))
    return np.ascontiguousarray(flat), -low


def _about(x: mx.array, what: str, row_contiguous: bool) -> np.ndarray:
    """`x_shape`, `x_strides` (in elements) or `x_ndim`, as mlx passes them."""
    if what == "shape":
        return np.array(x.shape, np.int32)
    if what == "ndim":
        return np.array([x.ndim], np.int32)
    a = _numpy_view(x)
    if row_contiguous and not a.flags.c_contiguous:
        a = np.ascontiguousarray(a)
    return np.array(a.strides, np.int64) // a.itemsize


def _empty(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> np.ndarray:
    one = _numpy_view(mx.full((1,), 0 if init_value is None else init_value, dtype))
    out = np.full(int(np.prod(shape)), one[0], one.dtype)
    if init_value is None:
        out.view(np.uint8)[...] = 0xCD
    return out


def _mlx_array(a: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    out = mx.array(a)
    return (mx.view(out, mx.bfloat16) if dtype == mx.bfloat16 else out).reshape(shape)
