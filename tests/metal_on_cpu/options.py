"""How kernels are compiled and run: defaults, a context that changes them, arguments of a kernel or a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from metal_on_cpu.compile import Build

_ORDERS = ("forward", "reverse", "random")


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled (see `Build`) and run.

    Attributes:
        order: of lanes, SIMD-groups and threadgroups: forward, reverse, or random by `seed`.
        flush_denormals: denormal floats are zero.
        keep_going: after a read out of bounds the run goes on.
        threadgroup_limit: bytes.
        time_limit: seconds of processor time.
        threadgroups: first and number of those that run, counted along x, then y and z; all where it is None. Mode
            `fast`, order `forward`.
        part: first and number of the elements of each output that are returned, flat; the others take no memory.
        raises: findings raise MslError; else they are in the report only.
        allow: kinds of findings that do not raise.
        dry: the text is compiled (mode `check`: without code) and linted, nothing runs, outputs are zeros.
        record: a list to which each launch adds its kernel's name and report.
        errors: a list to which each MslError that is raised is added.
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
    threadgroups: tuple[int, int] | None = None
    part: tuple[int, int] | None = None
    raises: bool = True
    allow: tuple[str, ...] = ()
    dry: bool = False
    record: list | None = None
    errors: list | None = None

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
            "first_threadgroup": self.threadgroups[0] if self.threadgroups else 0,
            "n_threadgroups": self.threadgroups[1] if self.threadgroups else 0,
        }


_current = Options()


def current() -> Options:
    """The options that hold now for kernels without their own."""
    return _current


@contextlib.contextmanager
def options(**changes: object) -> Iterator[None]:
    """Other defaults (fields of `Options`) for kernels that are called inside the context."""
    global _current
    before = _current
    _current = replace(before, **changes)
    try:
        yield
    finally:
        _current = before
