"""Models that the runtime's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretended_gpu import pretend_gpu
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
    """What runs on a GPU without Metal kernels (dtypes as stored, mlx's own layers, one token ahead), on the CPU."""
    pretend_gpu(monkeypatch, metal=False)
