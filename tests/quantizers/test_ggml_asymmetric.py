"""Encoders of types with an offset: against ggml's own, on grids that exist, at the edges, in NumPy and mlx."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlxq.errors import FormatError
from mlxq.formats import ggml as ggml_formats
from mlxq.formats import kquants
from mlxq.formats.geometry import block_format
from mlxq.formats.superblocks import K_TYPES, SuperBlocks
from mlxq.quantizers.ggml import asymmetric as ggml_asymmetric
from mlxq.quantizers.ggml import quantize
from mlxq.quantizers.ggml import tiles as tiles

TYPES = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
K_NAMES = ("Q2_K", "Q4_K", "Q5_K")
N, K = 32, 768

SHAPES_OF_WEIGHTS = {
    "normal": lambda rng: rng.standard_normal((N, K)),
    "long tails": lambda rng: rng.standard_t(3, (N, K)),
    "uniform": lambda rng: rng.uniform(-1, 1, (N, K)),
    "positive": lambda rng: rng.uniform(0, 1, (N, K)),
    "off center": lambda rng: rng.standard_normal((N, K)) + 2,
    "sparse": lambda rng: rng.standard_normal((N, K)) * (rng.random((N, K)) < 0.1),
}


def weights(kind="normal", seed=0):
    return (0.05 * SHAPES_OF_WEIGHTS[kind](np.random.default_rng(seed))).astype(np.float32)


def importances(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "none": None,
        "mild": np.exp(0.5 * rng.standard_normal(K)).astype(np.float32),
        "steep": np.exp(2 * rng.standard_normal(K)).astype(np.float32),
        "half zero": (rng.random(K) < 0.5).astype(np.float32),
    }


def decoded(blocks, name):
    flat = blocks.reshape(-1, block_format(name).type_size)
    decode = kquants.dequantize if name in K_TYPES else ggml_formats.dequantize
    return decode(flat, name).reshape(*blocks.shape[:-1], -1)


def squared_error(w, blocks, name, importance=None):
    e = (decoded(blocks, name).astype(np.float64) - w) ** 2
    return float((e if importance is None else e * importance).sum())


@pytest.mark.parametrize("importance", importances())
@pytest.mark.parametrize("kind", SHAPES_OF_WEIGHTS)
@pytest.mark.parametrize("name", TYPES)
def test_error_is_at_most_that_of_ggml(name, kind, importance):
    libgguf = pytest.importorskip("libgguf")
    w, values = weights(kind), importances()[importance]
    theirs = libgguf.quantize_rows(w, block_format(name).ggml_id, values)
    ours = quantize(w, name, values)
    assert ours.shape == (N, theirs.nbytes // N)
    assert squared_error(w, ours, name, values) <= squared_error(w, theirs.reshape(N, -1), name, values)


@pytest.mark.parametrize("name", TYPES)
def test_ggml_decodes_the_blocks_as_we_do(name):
    libgguf = pytest.importorskip("libgguf")
    blocks = quantize(weights(), name)
    theirs = libgguf.dequantize_rows(blocks, block_format(name).ggml_id)
    np.testing.assert_array_equal(np.asarray(theirs).reshape(N, K), decoded(blocks, name))


@pytest.mark.parametrize("name", TYPES)
def test_importance_moves_error_to_columns_that_count_less(name):
    w, importance = weights(), importances()["steep"]
    plain, weighted = quantize(w, name), quantize(w, name, importance)
    assert squared_error(w, weighted, name, importance) < 0.95 * squared_error(w, plain, name, importance)
    assert squared_error(w, plain, name) < squared_error(w, weighted, name)


def full_blocks(name, rng, n=40):
    """Super-blocks that use the whole range of codes in each group, and of scales and mins in each block."""
    geometry = K_TYPES[name]
    groups = (n, geometry.n_sub_blocks, geometry.sub_block)
    codes = rng.integers(0, 2**geometry.bits, groups, dtype=np.uint8)
    codes[..., 3], codes[..., 7] = 0, 2**geometry.bits - 1
    largest = 2**geometry.scale_bits - 1
    scales = rng.integers(largest // 3, largest + 1, groups[:2], dtype=np.uint8)
    mins = rng.integers(0, largest + 1, groups[:2], dtype=np.uint8)
    scales[:, 2] = mins[:, 5] = largest
    d, dmin = (rng.uniform(0.001, 0.01, n).astype(np.float16) for _ in range(2))
    return kquants.pack(SuperBlocks(d, scales, codes.reshape(n, 256), dmin, mins), name)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("name", K_NAMES)
def test_super_blocks_that_use_their_range_come_back_exactly(name, backend):
    w = decoded(full_blocks(name, np.random.default_rng(0)), name)
    np.testing.assert_array_equal(decoded(quantize(w, name, backend=backend), name), w)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize(("name", "top"), [("Q4_1", 15), ("Q5_1", 31)])
def test_groups_that_use_their_range_come_back_exactly(name, top, backend):
    rng = np.random.default_rng(0)
    q = rng.integers(0, top + 1, (50, 32))
    q[:, 4], q[:, 9] = 0, top
    d, m = (rng.uniform(low, 0.02, (50, 1)).astype(np.float16).astype(np.float32) for low in (0.001, -0.1))
    w = d * q.astype(np.float32) + m
    np.testing.assert_array_equal(decoded(quantize(w, name, backend=backend), name), w)


@pytest.mark.parametrize("name", TYPES)
def test_encoding_again_what_was_decoded_changes_little(name):
    """Where a group's lowest or highest code is not used its grid is no longer known: then, and only then, it moves."""
    once = decoded(quantize(weights(), name), name)
    twice = decoded(quantize(once, name), name)
    # A group found on another grid is at worst as far off as weights that lie anywhere (error e); few are.
    e = np.sqrt(np.mean((once - weights()) ** 2))
    assert np.sqrt(np.mean((twice - once) ** 2)) <= 0.25 * e


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -0.7])
@pytest.mark.parametrize("name", TYPES)
def test_constant_weights(name, value, backend):
    w = np.full((2, 512), value, np.float32)
    w_hat = decoded(quantize(w, name, backend=backend), name)
    # One float16 is rounded: half a unit in the last of its 11 bits.
    assert np.abs(w_hat - w).max() <= 2.0**-11 * abs(value)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_error_scales_with_the_weights(name, magnitude):
    w = weights() / 0.05
    at_one = squared_error(w, quantize(w, name), name)
    scaled = (w * np.float32(magnitude)).astype(np.float32)
    # Steps of 1e-4 / 63 / 15 are a few units of the smallest float16: scales are chosen for the step that there is.
    assert squared_error(scaled, quantize(scaled, name), name) <= 1.2 * at_one * magnitude**2


@pytest.mark.parametrize("name", TYPES)
def test_weights_below_the_smallest_step_become_zero(name):
    w = weights() * np.float32(1e-30)
    assert not decoded(quantize(w, name), name).any()


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("magnitude", [1e9, 3e38])
@pytest.mark.parametrize("name", TYPES)
def test_weights_beyond_the_type_are_refused(name, magnitude, backend):
    w = np.ones((2, 512), np.float32)
    w[1, 300] = -magnitude
    with pytest.raises(FormatError, match=f"{name}: .*float16"):
        quantize(w, name, backend=backend)


@pytest.mark.parametrize("name", TYPES)
def test_rows_do_not_depend_on_their_neighbours(name, monkeypatch):
    """Tiles end anywhere between rows: the same bytes, whatever their size."""
    w, importance = weights(), importances()["mild"]
    whole = quantize(w, name, importance)
    monkeypatch.setattr(tiles, "NUMPY_TILE", 5 * K)
    np.testing.assert_array_equal(quantize(w, name, importance), whole)
    monkeypatch.setattr(tiles, "NUMPY_TILE", 1)
    np.testing.assert_array_equal(quantize(w[7:9], name, importance), whole[7:9])


@pytest.mark.parametrize("importance", ["none", "steep"])
@pytest.mark.parametrize("name", TYPES)
def test_mlx_finds_what_numpy_finds(name, importance, monkeypatch):
    monkeypatch.setattr(tiles, "MLX_TILE", 5 * K)
    w, values = weights("long tails"), importances()[importance]
    ours, theirs = quantize(w, name, values, backend="numpy"), quantize(w, name, values, backend="mlx")
    # Sums in another order differ in the last bits, so a choice between nearly equal candidates may fall otherwise.
    a, b = squared_error(w, ours, name, values), squared_error(w, theirs, name, values)
    assert abs(a - b) <= 0.002 * a
    size = block_format(name).type_size
    same = (ours.reshape(-1, size) == theirs.reshape(-1, size)).all(axis=1)
    assert same.mean() >= 0.8


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_threads_do_not_share_buffers(backend):
    parts = [weights(kind) for kind in SHAPES_OF_WEIGHTS] * 2
    one_by_one = [quantize(w, "Q4_K", backend=backend) for w in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: quantize(w, "Q4_K", backend=backend), parts))
    for a, b in zip(one_by_one, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_rows_are_no_blocks():
    for name in TYPES:
        assert quantize(np.empty((0, 512), np.float32), name).shape[0] == 0


def test_other_types_are_refused():
    with pytest.raises(FormatError, match="'Q6_K' has no encoder here"):
        ggml_asymmetric.quantize(weights(), "Q6_K")


def test_a_gpu_rounds_in_one_kernel_as_the_cpu_does_in_four():
    mx = pytest.importorskip("mlx.core")
    x = mx.array(weights("long tails")[:, :256].reshape(32, 8, 32))
    inverse = mx.full((8, 32), 60.0)
    for offset in (0, 0.25, mx.full((8, 32), 7.3)):
        rounded = tiles._rounded(x, inverse, offset, 0, 15)
        try:
            compiled = np.asarray(tiles._compiled_rounded()(x, inverse, offset, 0, 15))
        except RuntimeError as error:
            pytest.skip(f"mlx compiles with a C++ compiler on a CPU: {error}")
        np.testing.assert_array_equal(compiled, np.asarray(rounded))
