"""What the commands print: plans, results and progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.architectures.memory import human_bytes, memory_to_run
from mlxq.types import FLOAT_BYTES, Progress

if TYPE_CHECKING:
    from mlxq.conversion import ConversionResult
    from mlxq.plan.planner import Plan

_LABELS = {
    "download": "Downloading",
    "quantize": "Quantizing",
    "write": "Writing",
    "verify": "Proving",
    "compare": "Comparing",
    "load": "Loading",
    "prompt": "Reading the prompt",
    "generate": "Generating",
    "measure": "Measuring",
    "calibrate": "Calibrating",
    "tune": "Tuning",
}


#: Weights that stay float for one reason are listed up to this many.
_LISTED = 8


class ProgressBars:
    """A progress callback that draws bars on a terminal's standard error, and one line a stage elsewhere.

    Nothing is shown for what takes less than a second.
    """

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._began = time.monotonic()
        self._told: set[str] = set()
        self._finished = False

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Clear the bars and draw no more, because output begins."""
        self._finished = True
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, event: Progress) -> None:
        if self._finished:
            return
        if not self._tasks and time.monotonic() - self._began < 1 and event.stage not in ("verify", "compare"):
            return
        if not (sys.stderr and sys.stderr.isatty()):
            self._tell(event)
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(_LABELS[event.stage], total=event.total, item="")
        self._bars.update(self._tasks[event.stage], completed=event.done, total=event.total, item=event.item)

    def _tell(self, event: Progress) -> None:
        if event.stage not in self._told and sys.stderr:
            self._told.add(event.stage)
            print(f"{_LABELS[event.stage]} ...", file=sys.stderr, flush=True)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[item]}"),
        console=Console(stderr=True),
        transient=True,
    )


def print_plan(result: ConversionResult, context: int) -> None:
    """The whole plan, one line a tensor by the name that --tensor-type knows it by, and the totals."""
    plan = result.plan
    rows = [("tensor", "shape", "from", "to", "bytes", "why")]
    for p in plan.tensors:
        to = f"{p.action} {p.spec} {p.dtype}" if p.spec else f"{p.action} {p.dtype}"
        nbytes = f"{plan.nbytes_by_name[p.info.name]:,}"
        rows.append(
            (
                result.stored_names.get(p.info.name, p.info.name),
                " x ".join(map(str, p.info.shape)),
                p.info.dtype,
                to,
                nbytes,
                p.reason,
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    for name, shape, source, to, nbytes, why in rows:
        columns = f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {source:<{widths[2]}}  {to:<{widths[3]}}"
        print(f"{columns}  {nbytes:>{widths[4]}}  {why}")
    print()
    print_summary(plan)
    print(f"Memory to run {context:,} tokens of context: {memory_to_run(plan.nbytes, result.config, context)}")


def print_summary(plan: Plan) -> None:
    """Totals by format, and every weight that stays float with its bytes and the reason."""
    groups: dict[str, list[int]] = {}
    for p in plan.tensors:
        key = f"{p.spec}, {p.dtype} scales" if p.spec else f"{p.dtype} float" if p.dtype in FLOAT_BYTES else p.dtype
        totals = groups.setdefault(key, [0, 0, 0])
        totals[0] += 1
        totals[1] += p.info.size
        totals[2] += plan.nbytes_by_name[p.info.name]
    for key, (count, size, nbytes) in sorted(groups.items(), key=lambda g: -g[1][2]):
        print(f"  {key:<32} {count:>5} tensors  {size / 1e6:>9.1f}M weights  {human_bytes(nbytes):>9}")
    _print_kept(plan)
    for note in plan.notes:
        print(f"Note: {note}")
    if plan.dropped:
        print(f"Not used by this architecture, left out: {', '.join(plan.dropped)}")
    bpw = f"{plan.bpw:.3f} bits per weight, scales and biases counted"
    print(f"Total {human_bytes(plan.nbytes)}, {plan.n_weights / 1e6:.1f}M weights, {bpw}")


def _print_kept(plan: Plan) -> None:
    """Each weight that stays float; those that share a reason in one line where they are many."""
    reasons: dict[str, list[str]] = {}
    for p in plan.kept_weights:
        reasons.setdefault(p.reason, []).append(p.info.name)
    if not reasons:
        return

    def size(names: list[str]) -> str:
        return human_bytes(sum(plan.nbytes_by_name[n] for n in names))

    print(f"Kept float though a layer's weight, {size([n for names in reasons.values() for n in names])}:")
    for reason, names in reasons.items():
        if len(names) > _LISTED:
            print(f"  {len(names)} tensors, {names[0]} to {names[-1]}  {size(names)}  ({reason})")
            continue
        for name in names:
            print(f"  {name}  {size([name])}  ({reason})")


def print_result(result: ConversionResult, outputs: Sequence[str]) -> None:
    """What the proof measured, and where the results are, as the person named them."""
    from mlxq.evaluate.report import render

    for note in result.notes:
        print(f"Note: {note}")
    if result.verification is None:
        print("Not verified (--no-verify)")
    else:
        print(render(result.verification))
    if result.gguf_plan is not None:
        print(f"Both hold the same numbers: {len(result.plan.tensors)} tensors compared, none differs")
    for output in outputs:
        print(f"Wrote {output}{_described(Path(output).expanduser(), result)}")


def _described(path: Path, result: ConversionResult) -> str:
    """Size of a file that was made; of one beside a directory the bits per weight too."""
    if not path.is_file():
        return ""
    size = human_bytes(path.stat().st_size)
    return f" ({size}, {result.gguf_plan.bpw:.3f} bits per weight)" if result.gguf_plan else f" ({size})"
