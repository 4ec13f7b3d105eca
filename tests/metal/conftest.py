"""The fixture `metal`: kernels run on the real Metal where there is one, else in the checker on the CPU."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import metal_on_cpu
import mlx.core as mx
import pytest


class Metal:
    """What runs the kernels of a test.

    Attributes:
        real: Apple's Metal runs them, nothing is checked and no report is made.
        launches: kernel name and report of each launch so far.
        errors: what the checker raised so far. A test with errors fails, whoever caught them; one that seeks them
            empties the list.
    """

    def __init__(self, real: bool) -> None:
        self.real = real
        self.launches: list[tuple[str, metal_on_cpu.Report]] = []
        self.errors: list[metal_on_cpu.MslError] = []

    @property
    def report(self) -> metal_on_cpu.Report:
        """Of the last launch."""
        return self.launches[-1][1]

    def options(self, **changes: object) -> contextlib.AbstractContextManager[None]:
        """Other options of the checker (`metal_on_cpu.Options`) inside the context; the real Metal has none."""
        return contextlib.nullcontext() if self.real else metal_on_cpu.options(**changes)


@pytest.fixture
def checker() -> None:
    """Skips, and in CI fails, where the checker cannot run."""
    reason = metal_on_cpu.unavailable()
    if reason and os.environ.get("CI") and not mx.metal.is_available():
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def metal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    """`mx.fast.metal_kernel` works: off a Mac it is the checker's, and its findings fail the test.

    On a Mac a kernel that fails its first check (`ops.kernel_check`) fails the test.

    Off a Mac the checker's runs each kernel as its call is made: such a call cannot be inside `mx.compile`.
    """
    if mx.metal.is_available():
        with warnings.catch_warnings():
            # Not used where it is wrong: a test whose kernel was left to NumPy or mlx would test those.
            warnings.filterwarnings("error", "the Metal kernel for .* is not used")
            yield Metal(real=True)
        return
    request.getfixturevalue("checker")
    runs = Metal(real=False)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_on_cpu.metal_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with metal_on_cpu.options(record=runs.launches, errors=runs.errors):
        yield runs
    if runs.errors:
        pytest.fail(f"the checker found: {runs.errors[0]}")
