"""Encoders of types with one scale: no more error than ggml's own, its bytes where its reference rule is followed."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from mlxq.errors import FormatError
from mlxq.formats.geometry import block_format
from mlxq.formats.kquants import unpack
from mlxq.quantizers.ggml import symmetric as ggml_symmetric

REFERENCE = ("Q4_0", "Q5_0", "Q8_0")
K = ("Q3_K", "Q6_K")
TYPES = (*REFERENCE, *K)
#: What is searched: type, and whether with importance.
SEARCHED = [("Q4_0", True), ("Q5_0", True), *((name, given) for name in K for given in (False, True))]


def weights(shape=(24, 1024), seed=0, kind="normal"):
    rng = np.random.default_rng(seed)
    w = {
        "normal": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "sparse": rng.normal(size=shape) * (rng.random(shape) < 0.2),
        "columns": rng.normal(size=shape) * rng.lognormal(0, 1, shape[1]),
    }[kind]
    return (0.02 * w).astype(np.float32)


def importances(K, seed=1, spread=1.0):
    importance = np.random.default_rng(seed).lognormal(0, spread, K)
    return (importance / importance.mean()).astype(np.float32)


def decoded(blocks, name):
    return dequantize(blocks, GGMLQuantizationType[name])


def rmse(w, w_hat, importance=None):
    errors = (w.astype(np.float64) - w_hat) ** 2
    return np.sqrt((errors if importance is None else errors * importance).mean())


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "sparse", "columns"])
@pytest.mark.parametrize(("name", "given"), SEARCHED)
def test_error_is_at_most_that_of_ggml(name, given, kind):
    libgguf = pytest.importorskip("libgguf")
    w = weights(kind=kind)
    importance = importances(w.shape[1]) if given else None
    ours = rmse(w, decoded(ggml_symmetric.quantize(w, name, importance), name), importance)
    ggml = libgguf.quantize_rows(w, GGMLQuantizationType[name], importance)
    assert ours <= rmse(w, decoded(ggml, name), importance)


@pytest.mark.parametrize("name", [name for name, given in SEARCHED if given])
def test_error_is_at_most_that_of_ggml_with_very_uneven_importance(name):
    """Importance over six orders of magnitude: a few columns decide."""
    libgguf = pytest.importorskip("libgguf")
    w = weights((128, 1024), kind="columns")
    importance = importances(w.shape[1], spread=2.5)
    ours = rmse(w, decoded(ggml_symmetric.quantize(w, name, importance), name), importance)
    ggml = libgguf.quantize_rows(w, GGMLQuantizationType[name], importance)
    assert ours <= rmse(w, decoded(ggml, name), importance)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_rule_gives_the_bytes_of_gguf(name):
    # bfloat16 weights: often two of one magnitude and both signs are the largest of a block, and the first one counts.
    w = weights((256, 1024))
    w.view(np.uint32)[...] &= 0xFFFF0000
    w[3] = 0
    w[4] *= np.float32(1e-6)
    w[5] *= np.float32(1e6)
    w[6, :32] = [1, -1] * 16
    w[6, 32:64] = [-1, 1] * 16
    # Halves are rounded away from zero by Q8_0: 127 makes the scale 1.
    w[7, :32] = np.arange(32) - 15.5
    w[7, 31] = 127
    assert np.array_equal(ggml_symmetric.quantize(w, name), gguf_quantize(w, GGMLQuantizationType[name]))


def test_q8_0_does_not_look_at_importance():
    w = weights((2, 256))
    assert np.array_equal(
        ggml_symmetric.quantize(w, "Q8_0", importances(256)), gguf_quantize(w, GGMLQuantizationType.Q8_0)
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", K)
def test_codes_are_the_nearest_of_the_scale(name, given):
    w = weights((16, 512))
    blocks = ggml_symmetric.quantize(w, name, importances(512) if given else None)
    parts = unpack(blocks.reshape(-1, block_format(name).type_size), name)
    low, high = {"Q3_K": (-4, 3), "Q6_K": (-32, 31)}[name]
    s = (parts.d.astype(np.float32)[:, None] * parts.scales)[:, :, None]
    x = w.reshape(*s.shape[:2], 16)
    assert (s != 0).all()
    nearest = np.clip(np.rint(x / s), low, high)
    codes = parts.codes.reshape(x.shape).astype(int) + low
    # x times the rounded inverse and x / s differ by some units of 2^-24 of at most 48: only ties can part.
    assert np.abs(np.abs(x / s - codes) - np.abs(x / s - nearest)).max() < 1e-4


@pytest.mark.parametrize(("name", "given"), SEARCHED)
def test_mlx_finds_what_numpy_finds(name, given):
    pytest.importorskip("mlx.core")
    w = weights((10, 512))
    importance = importances(512) if given else None
    ours = ggml_symmetric.quantize(w, name, importance)
    with_mlx = ggml_symmetric.quantize(w, name, importance, "mlx")
    assert with_mlx.shape == ours.shape
    # Sums are added in another order, so among nearly equal candidates another may win; the error is the same but for
    # that: a candidate is at most 1e-5 of the sum of squares away, and the error at least 1e-4 of it (6 bits).
    errors = [rmse(w, decoded(blocks, name), importance) for blocks in (ours, with_mlx)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert (with_mlx == ours).mean() > 0.9


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_rows_are_encoded_alone(name, given):
    w = weights((1100, 256))
    importance = importances(256) if given else None
    together = ggml_symmetric.quantize(w, name, importance)
    assert together.shape == (1100, 256 // block_format(name).block_size * block_format(name).type_size)
    for row in (0, 1, 1023, 1099):
        assert np.array_equal(ggml_symmetric.quantize(w[row : row + 1], name, importance)[0], together[row])
    assert ggml_symmetric.quantize(w[:0], name, importance).shape == (0, together.shape[1])


@pytest.mark.parametrize("name", TYPES)
def test_threads_do_not_disturb_one_another(name):
    parts = [weights((64, 768), seed) for seed in range(4)]
    importance = importances(768)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: ggml_symmetric.quantize(w, name, importance), parts))
    for w, blocks in zip(parts, together, strict=True):
        assert np.array_equal(blocks, ggml_symmetric.quantize(w, name, importance))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_zeros(name, given):
    w = weights((2, 512))
    w[0] = 0
    w[1, :256] = 0
    w_hat = decoded(ggml_symmetric.quantize(w, name, importances(512) if given else None), name)
    assert (w_hat[0] == 0).all()
    assert (w_hat[1, :256] == 0).all()
    assert (w_hat[1, 256:] != 0).any()


#: Relative error of normal weights: bits of the code say it, to 10 %.
RELATIVE = {"Q4_0": 0.1, "Q5_0": 0.05, "Q8_0": 0.0065, "Q3_K": 0.17, "Q6_K": 0.02}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("factor", [1.0, 1e-2, 1e4])
def test_the_error_follows_the_magnitude(name, given, factor):
    """From weights of 2e-4, where `d` of Q6_K and Q8_0 is subnormal, to 2e2 or more."""
    w = weights((8, 1024)) * np.float32(factor)
    w_hat = decoded(ggml_symmetric.quantize(w, name, importances(1024) if given else None), name)
    limit = RELATIVE[name] * (1.25 if given else 1.1)
    if name == "Q8_0" and factor < 1:
        # d is about 5e-6, and a float16 there is off by up to 3e-8: another 0.6 % of weights at the end of the range.
        limit = 0.01
    assert rmse(w, w_hat) < limit * rmse(w, 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_weights_too_small_for_float16_are_no_more_than_zero(name, given):
    """Where even the smallest `d` is too large a step, the error is at most that of zeros."""
    for magnitude in (1e-4, 1e-7, 1e-9, 1e-30, 1e-42):
        w = weights((4, 512)) * np.float32(magnitude / 0.02)
        w_hat = decoded(ggml_symmetric.quantize(w, name, importances(512) if given else None), name)
        assert rmse(w, w_hat) <= rmse(w, 0)


@pytest.mark.parametrize(
    ("name", "given", "largest"), [("Q6_K", False, 2.5e8), ("Q3_K", True, 6e6), ("Q4_0", True, 4e5)]
)
def test_weights_as_large_as_float16_allows(name, given, largest):
    w = weights((4, 512))
    w *= np.float32(largest) / np.abs(w).max()
    w_hat = decoded(ggml_symmetric.quantize(w, name, importances(512) if given else None), name)
    assert rmse(w, w_hat) < 1.3 * RELATIVE[name] * rmse(w, 0)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("bad", "shown"), [(1e10, r"1e\+10"), (-1e10, r"-1e\+10"), (np.nan, "nan"), (np.inf, "inf")])
def test_weights_beyond_the_type_are_refused(name, given, bad, shown):
    w = weights((3, 512))
    w[2, 300] = bad
    with pytest.raises(FormatError, match=f"{name}: a weight is {shown}"):
        ggml_symmetric.quantize(w, name, importances(512) if given else None)
