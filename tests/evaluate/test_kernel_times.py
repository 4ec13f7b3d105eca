"""Times of kernels: which matrices, what is counted, and what is stored; clocks and tables."""

import time

import mlx.core as mx
import numpy as np
import pytest
from block_models import write as write_blocks
from pretended_gpu import pretend_gpu
from tiny import make_model

import mlxq
from mlxq.architectures.parameters import ParameterMap
from mlxq.checkpoint.source import open_checkpoint
from mlxq.errors import Cancelled, CheckpointError, UsageError
from mlxq.evaluate.kernels import clock as clocks
from mlxq.evaluate.kernels import measure
from mlxq.evaluate.kernels.clock import clock, copy_bandwidth
from mlxq.evaluate.kernels.matrices import Matrix, Product, matrices_of, product, random_weights, yardstick
from mlxq.evaluate.kernels.measure import KernelTime, KernelTimes, Timing, kernel_times
from mlxq.evaluate.kernels.report import render, render_choice
from mlxq.formats import ggml
from mlxq.formats.floats import dtype_of, to_float32
from mlxq.formats.geometry import BLOCK_FORMATS
from mlxq.ops import choices
from mlxq.types import QuantSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """2 layers, hidden 128: q and o 128 x 128, k and v 64 x 128, gate and up 256 x 128, down 128 x 256, head 320."""
    source = make_model(tmp_path_factory.mktemp("model") / "float")
    out = source.parent / "4bit"
    mlxq.convert(source, out, bits=4, group_size=32, verify=False)
    return out


@pytest.fixture(autouse=True)
def on_the_cpu():
    """As off a Mac, on a Mac too."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def brief(monkeypatch):
    """Little memory and little time."""
    monkeypatch.setattr(measure, "_WORKING_SET", {"gpu": 1 << 16, "cpu": 1 << 16})
    monkeypatch.setattr(clocks, "_PASS_SECONDS", 1e-4)
    monkeypatch.setattr(clocks, "_COPIED", {"gpu": 1 << 20, "cpu": 1 << 20})


def found(path):
    with open_checkpoint(path) as checkpoint:
        return matrices_of(ParameterMap(checkpoint))


def test_each_kind_of_matrix_of_a_directory_once(model):
    matrices, left_out = found(model)
    assert not left_out
    # On the CPU the runtime computes in float32.
    assert {m.dtype for m in matrices} == {"F32"}
    shapes = {(m.N, m.K): m.count for m in matrices}
    # The embedding has a head beside it, so nothing is multiplied by it.
    assert shapes == {(128, 128): 4, (64, 128): 4, (256, 128): 4, (128, 256): 2, (320, 128): 1}
    assert [m.nbytes for m in matrices] == sorted((m.nbytes for m in matrices), reverse=True)


def test_a_gpu_computes_in_the_dtype_of_the_scales(model, monkeypatch):
    pretend_gpu(monkeypatch, metal=False)
    assert {m.dtype for m in found(model)[0]} == {"BF16"}


def test_blocks_and_stacks_of_experts(tmp_path):
    matrices, _ = found(write_blocks(tmp_path / "m.gguf", "Q6_K", "qwen3moe", tied=True))
    assert {m.type_name for m in matrices} == {"Q6_K"}
    stacks = {(m.experts, m.N, m.K): m.count for m in matrices if m.experts}
    assert stacks == {(4, 512, 256): 4, (4, 256, 512): 2}
    # The embedding of a tied model is its head.
    assert {(m.N, m.K): m.count for m in matrices if m.N == 261} == {(261, 256): 1}


def test_types_that_nothing_multiplies_by_are_listed(tmp_path, monkeypatch):
    path = write_blocks(tmp_path / "m.gguf", "IQ2_S")
    monkeypatch.setenv("MLXQ_BACKEND", "mlx")
    matrices, left_out = found(path)
    assert not matrices
    assert "model.layers.0.self_attn.q_proj.weight: nothing multiplies by IQ2_S here" in "\n".join(left_out)
    with pytest.raises(UsageError, match="no matrix of this model is quantized"):
        kernel_times(path)


@pytest.mark.parametrize(
    ("matrix", "nbytes"),
    [
        (Matrix(QuantSpec(4, 64), None, "F16", 10, 128), 10 * (64 + 2 * 2 * 2)),
        (Matrix(QuantSpec(3, 32), None, "F32", 2, 64), 2 * (24 + 2 * 2 * 4)),
        (Matrix(None, "Q4_K", "F16", 3, 512, experts=4), 3 * 2 * 144),
    ],
)
def test_bytes_of_a_matrix_are_those_of_its_arrays(matrix, nbytes):
    held = random_weights(matrix, 1, for_numpy=True)
    assert matrix.nbytes == nbytes == sum(a.nbytes for a in held.copies[0]) // max(matrix.experts, 1)


def test_copies_fill_the_working_set_in_memory_of_their_own():
    matrix = Matrix(QuantSpec(4, 64), None, "F16", 16, 128)
    held = random_weights(matrix, 10 * matrix.nbytes - 1, for_numpy=True)
    assert len(held.copies) == 10
    assert len({a.ctypes.data for copy in held.copies for a in copy}) == 30
    assert len(random_weights(matrix, 1, for_numpy=False).copies) == 2


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Q4_K", 4), ("Q6_K", 6), ("Q8_0", 8), ("Q5_0", 5), ("Q3_K", 3), ("Q2_K", 2), ("IQ1_S", 2), ("IQ4_XS", 4)],
)
def test_the_yardstick_of_blocks_has_as_many_bits(name, bits):
    grid = yardstick(Matrix(None, name, "F16", 8, 512))
    assert (grid.spec, grid.N, grid.K, grid.dtype) == (QuantSpec(bits, 32), 8, 512, "F16")
    assert bits <= max(8 * BLOCK_FORMATS[name].type_size / BLOCK_FORMATS[name].block_size, 2)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_is_timed_is_the_product(backend, experts, rows):
    for matrix in (Matrix(QuantSpec(4, 32), None, "F32", 6, 64, experts), Matrix(None, "Q8_0", "F32", 6, 64, experts)):
        held = random_weights(matrix, 1, for_numpy=backend == "numpy")
        run = product(held, rows, backend)
        assert run.lazy == (backend == "mlx")
        y = np.array(run.run(1))
        assert y.shape == ((rows, 1, 6) if experts else (rows, 6))
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        w = decoded(matrix, held.copies[1])
        if experts:
            # Which expert each row has is random: each row of y is the product with one of them.
            every = np.abs(np.einsum("rk,enk->ren", x, w) - y).max(axis=-1)
            assert every.min(axis=1).max() <= 1e-4
            assert run.nbytes == matrix.nbytes * len(set(every.argmin(axis=1)))
        else:
            assert np.allclose(y, x @ w.T, rtol=0, atol=1e-4)
            assert run.nbytes == matrix.nbytes


def decoded(matrix, copy):
    if matrix.spec is None:
        return ggml.dequantize(np.array(copy[0]), matrix.type_name)
    w = mlxq.dequantize(*copy, bits=matrix.spec.bits, group_size=matrix.spec.group_size)
    return to_float32(np.array(w), dtype_of(np.array(w)))


class Slow:
    """A product that takes a while, and remembers which copies it was asked for."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.copies: list[int] = []

    def __call__(self, copy: int) -> np.ndarray:
        self.copies.append(copy)
        time.sleep(self.seconds)
        return np.zeros(1)


def test_copies_are_taken_in_turn_and_the_median_pass_counts():
    run = Slow(0.005)
    seconds, passes = clock(Product(run, 3, False, 1))
    # Sleeping takes what it says and up to a millisecond or so more, on a busy machine now and then much more.
    assert 0.005 <= seconds < 0.05
    assert 1 <= passes <= 7
    assert run.copies == [i % 3 for i in range(len(run.copies))]
    assert len(run.copies) >= 2 + passes


def test_what_takes_long_is_not_repeated(monkeypatch):
    monkeypatch.setattr(clocks, "_SECONDS", 0.01)
    run = Slow(0.02)
    assert clock(Product(run, 2, False, 1)).passes == 1
    assert run.copies == [0]


def test_lazy_products_are_evaluated_within_the_time(monkeypatch):
    evaluated = []
    original = mx.eval
    monkeypatch.setattr(clocks.mx, "eval", lambda ys: evaluated.append(len(ys)) or time.sleep(0.002) or original(ys))
    seconds, passes = clock(Product(lambda i: mx.ones(4) * i, 2, True, 1))
    assert len(evaluated) == 2 + passes
    assert seconds * evaluated[-1] >= 0.002


@pytest.mark.usefixtures("brief")
def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch):
    assert 1e6 < copy_bandwidth() < 1e13
    monkeypatch.setattr(clocks, "on_gpu", lambda: True)
    assert 1e6 < copy_bandwidth() < 1e13


@pytest.mark.usefixtures("brief")
def test_off_a_mac_numpy_and_mlx_are_measured_and_nothing_is_said_of_metal(model):
    events = []
    result = kernel_times(model, rows=(4, 1, 4), progress=events.append)
    assert not result.metal
    assert len(result.times) == 5 * 2
    assert [t.rows for t in result.times[:2]] == [1, 4]
    for t in result.times:
        assert (t.ours.backend, t.mlx.backend) == ("numpy", "mlx")
        assert t.ours.seconds > 0
        assert t.ours.bandwidth == pytest.approx(t.ours.nbytes / t.ours.seconds)
        assert t.ratio == pytest.approx(t.ours.seconds / t.mlx.seconds)
    assert result.measured() == {}
    assert {e.stage for e in events} == {"measure"}
    assert [e.done for e in events] == [0, 1, 2, 3, 4]
    text = render(result)
    assert "Metal is not available here" in text
    assert "4-bit group 32 F32 128 x 256" in text
    assert render_choice(result) == "Nothing to choose: our Metal kernels did not run"
    content = result.to_dict()
    assert content["metal"] is False
    assert content["copy_gb_per_s"] > 0
    first = content["products"][0]
    assert (first["format"], first["bits"], first["group_size"], first["dtype"]) == ("affine", 4, 32, "F32")
    assert first["ours"]["weight_bytes"] == first["N"] * (first["K"] // 2 + first["K"] // 32 * 8)


@pytest.mark.usefixtures("brief")
def test_blocks_are_measured_beside_their_yardstick(tmp_path):
    result = kernel_times(write_blocks(tmp_path / "m.gguf", "Q6_K"), rows=[1])
    assert {t.matrix.type_name for t in result.times} == {"Q6_K"}
    assert {(t.ours.weights, t.mlx.weights) for t in result.times} == {("", "6-bit group 32")}
    assert "6-bit group 32" in render(result)


@pytest.mark.parametrize("rows", [[], [0], [1, -8], [1 << 20]])
def test_rows_are_checked_before_a_model_is_opened(rows):
    with pytest.raises(UsageError, match="rows of x to measure must be from 1 to 65536, got"):
        kernel_times("nothing-here", rows=rows)


def test_what_cannot_be_measured_is_one_line(tmp_path, model):
    with pytest.raises(UsageError, match="no matrix of this model is quantized"):
        kernel_times(make_model(tmp_path / "float"))
    with pytest.raises(CheckpointError):
        kernel_times(tmp_path / "nothing-here")
    token = mlxq.CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        kernel_times(model, rows=[1], cancel=token)


def times_of(*pairs: tuple[float, float], backend: str = "metal") -> KernelTimes:
    matrix = Matrix(QuantSpec(4, 64), None, "F16", 512, 256)
    times = tuple(
        KernelTime(matrix, rows, Timing(backend, "", ours, 7, 100), Timing("mlx", "", theirs, 7, 100))
        for rows, (ours, theirs) in zip((1, 8), pairs, strict=False)
    )
    return KernelTimes("m", "Apple M9", "applegpu_x", "0", True, 4e11, times, ("a: why",))


def test_what_is_stored_is_what_the_choice_goes_by():
    result = times_of((1e-5, 2e-5), (3e-5, 2e-5))
    product = choices.Product(4, 64, "F16", 512, 256)
    assert result.measured() == {
        product: {1: {"metal": 1e-5, "mlx": 2e-5}, 8: {"metal": 3e-5, "mlx": 2e-5}},
    }
    assert render_choice(result) == "Our kernel is faster than mlx's for 1 of 2 affine products"
    assert times_of((1e-5, 2e-5), backend="numpy").measured() == {}


def test_the_table_shows_times_in_readable_units():
    text = render(times_of((2e-5, 1e-5), (1.5, 3e-3)))
    assert "Copying memory: 400.0 GB/s" in text
    assert all(words in text for words in ("20 us", "10 us", "1.5 s", "3 ms", "2.00", "500.00", "Not measured: a: why"))
