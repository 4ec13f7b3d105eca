"""The fixture `metal`: the package's own calls reach the checker, its options hold, and findings fail a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from metal_on_cpu import MslError


def _double(source: str = "uint i = thread_position_in_grid.x; y[i] = x[i] * 2;\n"):
    return mx.fast.metal_kernel(name="double", input_names=["x"], output_names=["y"], source=source)


def _call(kernel, x: mx.array) -> mx.array:
    one_each = {"grid": (x.size, 1, 1), "threadgroup": (64, 1, 1)}
    return kernel(inputs=[x], **one_each, output_shapes=[x.shape], output_dtypes=[x.dtype])[0]


def test_kernels_run_and_are_recorded(metal) -> None:
    x = mx.arange(256).astype(mx.float16)
    assert mx.array_equal(_call(_double(), x), x * 2)
    assert mx.metal.is_available()
    if not metal.real:
        assert [name for name, _ in metal.launches] == ["double"]
        assert metal.report.buffers["x"].load_bytes == 512


def test_options_hold_inside_their_context(metal) -> None:
    if metal.real:
        pytest.skip("the real Metal has no options")
    kernel = _double()
    with metal.options(mode="count"):
        _call(kernel, mx.ones(64))
    assert metal.report.instructions["float"] == 64
    _call(kernel, mx.ones(64))
    assert not metal.report.instructions


def test_finding_raises_with_its_line(metal) -> None:
    if metal.real:
        pytest.skip("the real Metal checks nothing")
    with pytest.raises(MslError, match=r"double: read out of bounds at double\.source:2:11: 4 B at byte 256 of x"):
        _call(_double("uint i = thread_position_in_grid.x;\n   y[i] = x[i + 1];\n"), mx.ones(64))
    assert len(metal.errors) == 1
    metal.errors.clear()


def run_with_the_fixture(tmp_path: Path, text: str) -> str:
    """What pytest says of a file of tests, one of which fails."""
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    return done.stdout


def test_finding_that_the_code_under_test_swallowed_fails_the_test(tmp_path: Path, metal) -> None:
    if metal.real:
        pytest.skip("the real Metal checks nothing")
    said = run_with_the_fixture(
        tmp_path,
        "import mlx.core as mx\n"
        "def test_swallows(metal):\n"
        "    kernel = mx.fast.metal_kernel(name='k', input_names=['x'], output_names=['y'], source='y[0] = x[9];')\n"
        "    shape = dict(output_shapes=[(1,)], output_dtypes=[mx.float32])\n"
        "    try:\n"
        "        kernel(inputs=[mx.ones(8)], grid=(1, 1, 1), threadgroup=(1, 1, 1), **shape)\n"
        "    except Exception:\n"
        "        pass\n",
    )
    assert "the checker found: k: read out of bounds at k.source:1" in said


def test_a_wrong_kernel_on_a_mac_fails_the_test_unless_it_is_expected(tmp_path: Path) -> None:
    said = run_with_the_fixture(
        tmp_path,
        "import warnings\n"
        "import mlx.core as mx, pytest\n"
        "mx.metal.is_available = lambda: True\n"
        "def use():\n"
        "    warnings.warn('the Metal kernel for k is not used on this GPU')\n"
        "def test_wrong(metal):\n"
        "    use()\n"
        "def test_expected(metal):\n"
        "    assert metal.real\n"
        "    with pytest.warns(UserWarning, match='is not used'):\n"
        "        use()\n",
    )
    assert "FAILED test_it.py::test_wrong - UserWarning: the Metal kernel for k" in said
    assert "1 failed, 1 passed" in said
