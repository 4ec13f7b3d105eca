"""`mlxq.json`: what a result was made from, how, with which versions, and what the proof measured."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlxq
from mlxq.plan.planner import Plan
from mlxq.types import TensorPlan

NAME = "mlxq.json"
SCHEMA = 1


def versions() -> dict[str, str]:
    """Versions of everything whose behaviour the result depends on."""
    found = {"mlxq": mlxq.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("mlx", "mlx-lm", "numpy", "gguf"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def manifest_json(
    *,
    source: dict[str, Any],
    options: dict[str, Any],
    plan: Plan,
    files: dict[str, str],
    verification: dict[str, Any] | None,
    notes: list[str],
    errors: Mapping[str, float] | None = None,
    stored_names: Mapping[str, str] | None = None,
) -> bytes:
    """The manifest's bytes. It holds no times and no paths of the machine, so equal inputs give equal bytes.

    `errors` are the relative RMSEs that writing a tensor was measured to cause, by its name. Where there is none,
    a repacked or kept tensor is what it was in the source, unless it is scaled; a quantized one is not measured here.
    `stored_names` are the tensors' names in the file where those are not the parameters' names.
    """
    content = {
        "schema": SCHEMA,
        "source": source,
        "options": options,
        "versions": versions(),
        "weights": plan.n_weights,
        "bytes": plan.nbytes,
        "bpw": round(plan.bpw, 4),
        "verification": verification,
        "notes": notes,
        "dropped": list(plan.dropped),
        "files": files,
        "tensors": [
            {"name": p.info.name}
            | ({"stored": stored_names[p.info.name]} if stored_names else {})
            | _tensor(p, plan.nbytes_by_name[p.info.name], (errors or {}).get(p.info.name))
            for p in plan.tensors
        ],
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def scaled_tensors(result: Path) -> frozenset[str]:
    """Parameters of a directory or GGUF file that are scaled, as its manifest says; none where there is no manifest."""
    path = result / NAME if result.is_dir() else result.with_name(f"{result.stem}.{NAME}")
    try:
        return frozenset(t["name"] for t in json.loads(path.read_text(encoding="utf-8"))["tensors"] if t.get("scaled"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return frozenset()


def _tensor(p: TensorPlan, nbytes: int, error: float | None) -> dict[str, Any]:
    out: dict[str, Any] = {"shape": list(p.info.shape), "from": p.info.dtype, "action": p.action}
    if p.spec:
        out |= {"bits": p.spec.bits, "group_size": p.spec.group_size, "mode": p.spec.mode}
    out |= {"dtype": p.dtype, "bytes": nbytes, "reason": p.reason}
    if p.scaled:
        return out | {"scaled": True}
    if p.action in ("repack", "keep"):
        error = error or 0.0
    # Infinite where all weights were 0 and are not any more; JSON has no word for that.
    return out if error is None else out | {"relative_error": float(f"{error:.6g}") if math.isfinite(error) else None}
