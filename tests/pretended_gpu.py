"""The code that runs on a GPU, computed on the CPU."""

from __future__ import annotations

import sys

import pytest


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, metal: bool) -> None:
    """Let mlxq believe that mlx's default device is a GPU: dtypes as stored, mlx's own layers, one token ahead.

    `metal` says whether the Metal kernels can be launched there; then something must run them (the fixture `metal`).
    """
    import mlxq.runtime.generate
    import mlxq.runtime.load
    import mlxq.runtime.memory  # noqa: F401

    monkeypatch.delenv("MLXQ_BACKEND", raising=False)
    answers = {
        "on_accelerator": lambda: True,
        "on_cpu": lambda: False,
        "device_of": lambda kind: "gpu" if kind == "mlx" else "host, mlx loaded",
        "metal_available": lambda: metal,
    }
    modules = [m for name, m in sys.modules.items() if name.startswith("mlxq.")]
    for name, answer in answers.items():
        users = [m for m in modules if callable(vars(m).get(name))]
        assert users, f"nothing has {name} any more"
        for module in users:
            monkeypatch.setattr(module, name, answer)
