"""`mlxq.json`: what a result was made from, how, with which versions, and what the proof measured."""

from __future__ import annotations

import json
import platform
from importlib import metadata
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
) -> bytes:
    """The manifest's bytes. It holds no times and no paths of the machine, so equal inputs give equal bytes."""
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
        "tensors": [_tensor(p, plan.nbytes_by_name[p.info.name]) for p in plan.tensors],
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _tensor(p: TensorPlan, nbytes: int) -> dict[str, Any]:
    out: dict[str, Any] = {"name": p.info.name, "shape": list(p.info.shape), "from": p.info.dtype, "action": p.action}
    if p.spec:
        out |= {"bits": p.spec.bits, "group_size": p.spec.group_size, "mode": p.spec.mode}
    return out | {"dtype": p.dtype, "bytes": nbytes, "reason": p.reason}
