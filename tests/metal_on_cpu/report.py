"""What a launch showed: findings with their lines, bytes by buffer, memory and other instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from metal_on_cpu import toolchain
from metal_on_cpu.counting import CLASSES

#: Kinds of findings, in the order of the runtime's `Code`.
KINDS = (
    "",
    "read out of bounds",
    "write out of bounds",
    "write to read-only memory",
    "two unordered writes",
    "unordered read and write",
    "read of uninitialized threadgroup memory",
    "lanes of one SIMD-group at different synchronizing calls",
    "threads of one threadgroup at different barriers",
    "SIMD function read an inactive or nonexistent lane",
    "threadgroup memory over the limit",
    "barrier after some threads returned",
    "output bytes never written",
    "misaligned access",
    "crash",
    "access to another thread's stack",
    "uninitialized output read",
    "undefined behaviour",
    "two unordered writes of one value",
    "SIMD function after some of the SIMD-group's lanes returned",
    "time limit",
)
_UNWRITTEN = KINDS.index("output bytes never written")
_DEAD_LANE, _THREADGROUP_LIMIT, _UNDEFINED, _TIME_LIMIT = 9, 10, 17, 20
_OF_TWO_THREADS = (4, 5, 7, 8, 11, 18)
_OF_ONE_THREAD = (1, 2, 3, 6, 13, 16)
_THREADGROUP, _PROGRAM = -3, -2


@dataclass
class Finding:
    """One defect: its kind (of `KINDS`), the line of the kernel's text, what happened, and how often."""

    kind: str
    where: str
    detail: str
    count: int

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.kind} at {self.where}{detail} (x{self.count})"


@dataclass
class Buffer:
    """Traffic of one buffer, or of threadgroup memory. Loads and stores are of single lanes; sizes in bytes.

    `unique_read` and `unique_written` count each byte once; `threadgroup_lines` and `simdgroup_lines` count the
    128-byte lines that each threadgroup, or each SIMD-group, loads from in all of its loads.
    """

    size: int
    loads: int
    load_bytes: int
    stores: int
    store_bytes: int
    unique_read: int
    unique_written: int
    threadgroup_lines: int
    simdgroup_lines: int


@dataclass
class Site:
    """A memory instruction of the text: executions by a SIMD-group, lanes, and the lines that they touch together."""

    where: str
    buffer: str
    op: str
    size: int
    execs: int = 0
    lanes: int = 0
    bytes: int = 0
    unique: int = 0
    lines32: int = 0
    lines64: int = 0
    lines128: int = 0

    @property
    def used(self) -> float:
        """Share of the touched 128-byte lines that the SIMD-group uses in one execution."""
        return self.unique / (128 * self.lines128)


@dataclass
class Report:
    """What one launch showed. Traffic is there in the modes `check` and `count`, `instructions` in `count`."""

    findings: list[Finding] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    threadgroup_bytes: int = 0
    threadgroups: int = 0
    switches: int = 0
    accesses: int = 0
    aborted: bool = False
    seconds: float = 0.0
    compile_seconds: float = 0.0
    _rows: list[tuple] = field(default_factory=list, repr=False)
    _library: Path | None = None

    @cached_property
    def sites(self) -> list[Site]:
        """Memory instructions by line of the text; copies that the compiler made (unrolling) are one."""
        symbols = symbolize(self._library, frozenset(row[0] for row in self._rows)) if self._rows else {}
        out: dict[tuple, Site] = {}
        for pc, buffer, op, size, *counts in self._rows:
            key = (symbols.get(pc, "?"), buffer, op, size)
            site = out.setdefault(key, Site(*key))
            for name, n in zip(
                ("execs", "lanes", "bytes", "unique", "lines32", "lines64", "lines128"), counts, strict=True
            ):
                setattr(site, name, getattr(site, name) + n)
        return list(out.values())

    @property
    def arithmetic(self) -> int:
        """Executed arithmetic of all lanes: int, float, conversions and math functions."""
        return sum(self.instructions[k] for k in ("int", "float", "convert", "math"))

    @property
    def loads(self) -> int:
        """Executed loads of all lanes, from buffers, threadgroup memory and (in mode `count`) the program's tables."""
        return sum(b.loads for b in self.buffers.values()) + self.instructions.get("lookup", 0)

    def line_use(self, buffer: str) -> float:
        """Share of the 128-byte lines that SIMD-groups touch by one load of a buffer which that load uses."""
        loads = [s for s in self.sites if s.buffer == buffer and s.op == "load"]
        lines = sum(s.lines128 for s in loads)
        return sum(s.unique for s in loads) / (128 * lines) if lines else 1.0

    def __str__(self) -> str:
        out = [
            f"{self.threadgroups} threadgroups, {self.threadgroup_bytes} B threadgroup memory, {self.switches} lane "
            f"switches, {self.accesses} checked accesses, {self.seconds * 1e3:.1f} ms"
        ]
        for name, b in self.buffers.items():
            out.append(
                f"  {name}: {b.size} B; loads {b.loads} ({b.load_bytes} B, {b.unique_read} B distinct, "
                f"{b.threadgroup_lines * 128} B in 128-B lines a threadgroup); stores {b.stores} ({b.store_bytes} B)"
            )
        for s in sorted(self.sites, key=lambda s: -s.lines128):
            out.append(
                f"  {s.op} {s.buffer} {s.size} B at {s.where}: {s.execs} SIMD instructions, {s.lanes / s.execs:.1f} "
                f"lanes, lines each: 32 B {s.lines32 / s.execs:.2f}, 64 B {s.lines64 / s.execs:.2f}, "
                f"128 B {s.lines128 / s.execs:.2f}, {s.used:.0%} used"
            )
        if self.instructions:
            out.append("  executed: " + ", ".join(f"{k} {n}" for k, n in self.instructions.items() if n))
        return "\n".join(out + [f"  ! {f}" for f in self.findings])


@dataclass(frozen=True)
class Launched:
    """What is needed to read a launch's rows: its library, buffer names and sizes, limits, and blocks' instructions."""

    library: Path
    names: list[str]
    sizes: list[int]
    initialized: bool
    threadgroup_limit: int
    time_limit: float
    blocks: list[dict[str, int]]


def parse(text: str, launched: Launched) -> Report:
    """The report in the rows that the runtime wrote."""
    r = Report(_library=launched.library, instructions=dict.fromkeys(CLASSES, 0) if launched.blocks else {})
    rows = [line.split("\t") for line in text.splitlines()]
    found = [row for row in rows if row[0] == "finding"]
    symbols = symbolize(launched.library, frozenset(int(x) for row in found for x in row[2:4] if int(x)))
    for kind, *row in rows:
        if kind == "finding":
            finding = _finding([int(x) for x in row[:10]], row[10], launched, symbols)
            if not (launched.initialized and finding.kind == KINDS[_UNWRITTEN]):
                r.findings.append(finding)
            continue
        v = [int(x) for x in row]
        if kind == "run":
            r.aborted, r.threadgroups, r.switches, r.accesses, r.threadgroup_bytes = bool(v[0]), *v[1:]
        elif kind == "region":
            r.buffers[_name(v[0], launched)] = Buffer(*v[2:])
        elif kind == "site":
            r._rows.append((v[0], launched.names[v[1]], "store" if v[2] else "load", *v[3:]))
        elif kind == "block":
            for name, n in launched.blocks[v[0]].items():
                r.instructions[name] += n * v[1]
    return r


def _name(region: int, launched: Launched) -> str:
    named = {_THREADGROUP: "threadgroup", _PROGRAM: "program constants"}
    return named.get(region) or (launched.names[region] if region >= 0 else "")


def _finding(v: list[int], text: str, launched: Launched, symbols: dict[int, str]) -> Finding:
    code, pc, pc2, region, offset, count, threadgroup, thread, thread2, size = v
    detail = text
    if _name(region, launched):
        total = f" ({launched.sizes[region]} B)" if region >= 0 else ""
        detail += f"{size} B at byte" if size else "the first is byte"
        detail += f" {offset} of {_name(region, launched)}{total}"
    if code in _OF_TWO_THREADS:
        at = f" at {symbols.get(pc2, '?')}" if pc2 else ""
        detail += f"; thread {thread} of threadgroup {threadgroup} and thread {thread2}{at}"
    elif code in _OF_ONE_THREAD:
        detail += f", by thread {thread} of threadgroup {threadgroup}"
    elif code == _THREADGROUP_LIMIT:
        detail += f"{offset} B, the limit is {launched.threadgroup_limit}"
    elif code == _DEAD_LANE:
        detail += f"lane {offset}"
    elif code == _TIME_LIMIT:
        detail += f"not finished after {launched.time_limit:g} s of processor time"
    where = symbols.get(pc, "?") if pc else "the end of the run" if code == _UNWRITTEN else "?"
    if code == _UNDEFINED:
        where, _, detail = text.partition(": ")
    return Finding(KINDS[code], where, detail.lstrip("; "), count)


@lru_cache(maxsize=256)
def symbolize(library: Path, pcs: frozenset[int]) -> dict[int, str]:
    """File, line and column of return addresses in a library; the shim's own frames are passed over."""
    order = sorted(pcs)
    if not order:
        return {}
    command = [toolchain.SYMBOLIZER, f"--obj={library}", "--inlines", "--output-style=LLVM"]
    done = subprocess.run(
        command, input="\n".join(hex(pc - 1) for pc in order), capture_output=True, text=True, check=True
    )
    out = {}
    for pc, block in zip(order, done.stdout.strip().split("\n\n"), strict=False):
        frames = block.split("\n")[1::2]
        own = [f for f in frames if not re.search(r"/msl_\w+\.(h|inc):", f)]
        where = (own or frames)[0] if frames else "?"
        out[pc] = where.rsplit("/", 1)[-1]
    return out
