"""Models that the runtime's tests share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import ZOO, save_random, stock_logits
from tiny import make_model


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {name: save_random(root / name, config, bits) for name, (config, bits) in ZOO.items()}


@pytest.fixture(scope="session")
def zoo_stock(zoo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return stock_logits(zoo, tmp_path_factory.mktemp("stock") / "logits.npz")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bfloat16 checkpoint with a byte-level tokenizer and a chat template."""
    return make_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Any:
    """The same, loaded."""
    from mlxq import load

    return load(tiny_llama)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU (dtypes as stored, mlx's own layers and attention, one token ahead), computed on the CPU."""
    import mlxq.runtime.generate
    import mlxq.runtime.load
    import mlxq.runtime.memory  # noqa: F401

    monkeypatch.delenv("MLXQ_BACKEND", raising=False)
    answers = {
        "on_accelerator": lambda: True,
        "on_cpu": lambda: False,
        "device_of": lambda kind: "gpu" if kind == "mlx" else "host, mlx loaded",
    }
    modules = [m for name, m in sys.modules.items() if name.startswith("mlxq.")]
    for name, answer in answers.items():
        users = [m for m in modules if callable(vars(m).get(name))]
        assert users, f"nothing has {name} any more"
        for module in users:
            monkeypatch.setattr(module, name, answer)
