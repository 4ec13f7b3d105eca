"""The times of kernels as text: a table, and what it was measured on."""

from __future__ import annotations

from mlxq.evaluate.kernels.measure import KernelTime, KernelTimes, Timing
from mlxq.ops.choices import MARGIN


def render(result: KernelTimes) -> str:
    """The machine, a line for each product, and what the columns mean."""
    copy = result.copy_bandwidth / 1e9
    lines = [
        f"{result.source} on {result.device} ({result.chip}), mlx {result.mlx_version}",
        f"Copying memory: {copy:.1f} GB/s, read and written bytes counted",
    ]
    if not result.metal:
        lines.append("Metal is not available here: NumPy and mlx on the CPU were measured, nothing about an Apple GPU")
    ours = result.times[0].ours.backend
    head = ["matrix (N x K)", "number", "rows", ours, "GB/s", "of copy", "mlx", "GB/s", "", f"{ours} / mlx"]
    rows = [head, *(_row(t, result.copy_bandwidth) for t in result.times)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines.append("")
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    lines.append("GB/s are bytes of weights, as stored, over the time of one product: the median of several passes")
    lines += [f"Not measured: {left_out}" for left_out in result.left_out]
    return "\n".join(lines)


def _row(time: KernelTime, copy: float) -> list[str]:
    cells = [str(time.matrix), str(time.matrix.count), str(time.rows), *_cells(time.ours)]
    cells.append(f"{100 * time.ours.bandwidth / copy:.0f} %")
    if time.mlx is None:
        return [*cells, "none", "", "", ""]
    return [*cells, *_cells(time.mlx), time.mlx.weights, f"{time.ratio:.2f}"]


def _cells(timing: Timing) -> list[str]:
    return [_duration(timing.seconds), f"{timing.bandwidth / 1e9:.2f}"]


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def render_choice(result: KernelTimes) -> str:
    """What the measurement means for the products of affine weights."""
    measured = result.measured()
    if not measured:
        why = "there are no affine weights here" if result.metal else "our Metal kernels did not run"
        return f"Nothing to choose: {why}"
    n = sum(len(times) for times in measured.values())
    faster = sum(t["metal"] <= MARGIN * t["mlx"] for times in measured.values() for t in times.values())
    return f"Our kernel is faster than mlx's for {faster} of {n} affine products"
