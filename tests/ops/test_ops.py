"""The operations: NumPy and mlx back ends against float64 and each other, both kinds of arrays, every error."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlxq import ops
from mlxq.errors import BackendError, FormatError
from mlxq.formats.floats import from_float32, to_float32
from mlxq.formats.geometry import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlxq.ops import mlx_backend, numpy_backend, planes
from mlxq.ops.arrays import dtype_name, to_mlx, to_numpy

DTYPES = ("F32", "F16", "BF16")
BACKENDS = ("numpy", "mlx")
#: Unit roundoff of each dtype.
ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}

#: Products of packed weights are computed in float32 on the CPU; Metal rounds decoded weights to the dtype of x.
MLX_COMPUTES_IN = "F32" if mx.default_device() == mx.cpu else None


def normal(shape, seed, dtype="F32", scale=1.0) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(scale)
    return from_float32(a, dtype)


def packed(shape, bits, group_size, dtype="F32", seed=1):
    """Packed weights of about K**-0.5, so that one tolerance fits every K."""
    return ops.quantize(normal(shape, seed, dtype, shape[-1] ** -0.5), bits=bits, group_size=group_size)


def values(a) -> np.ndarray:
    a = to_numpy(a)
    return to_float32(a, dtype_name(a)).astype(np.float64)


def exact(x, w_q, scales, biases, bits, group_size, transpose=True):
    """The product in float64, and what bounds its rounding: sum of |x| * (|scales * q| + |biases|)."""
    one = np.ones_like(to_float32(scales, dtype_name(scales)))
    q = values(ops.dequantize(w_q, one, 0 * one, bits=bits, group_size=group_size))
    s, b = (np.repeat(values(p), group_size, axis=-1) for p in (scales, biases))
    w_hat, magnitude = s * q + b, np.abs(s * q) + np.abs(b)
    if transpose:
        w_hat, magnitude = w_hat.swapaxes(-1, -2), magnitude.swapaxes(-1, -2)
    return values(x) @ w_hat, np.abs(values(x)) @ magnitude


def bound(y, magnitude, inner, dtype, compute):
    """Standard bound for `inner` products summed in any order, plus 8 for the operations on one product.

    The result is rounded once more, to `dtype`; computing is done in `compute`.
    """
    return (inner + 8) * ROUNDOFF[compute] * magnitude + ROUNDOFF[dtype] * np.abs(y) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("transpose", [True, False])
def test_quantized_matmul_pair(dtype, group_size, bits, transpose):
    N, K = 96 if group_size == 32 else 128, 384
    grid = {"bits": bits, "group_size": group_size}
    w = packed((N, K), dtype=dtype, **grid)
    inner = K if transpose else N
    for M in (1, 5, 16, 17):
        x = normal((M, inner), M, dtype)
        y, magnitude = exact(x, *w, **grid, transpose=transpose)
        for backend, compute in (("numpy", "F32"), ("mlx", MLX_COMPUTES_IN or dtype)):
            got = ops.quantized_matmul(x, *w, **grid, transpose=transpose, backend=backend)
            assert dtype_name(got) == dtype
            assert got.shape == y.shape
            assert (np.abs(values(got) - y) <= bound(y, magnitude, inner, dtype, compute)).all(), (backend, M)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize(("N", "K", "M"), [(1, 128, 1), (7, 128, 3), (515, 1152, 2), (515, 2304, 40), (1, 2304, 18)])
def test_numpy_products_of_ragged_blocks(monkeypatch, bits, N, K, M):
    monkeypatch.setattr(planes, "_MANY_ROWS_BLOCK", 320)
    monkeypatch.setattr(planes, "_MANY_ROWS", 40)
    # 515 rows and 1152, 2304 columns are not whole blocks, nor are 320 rows of the blocks that are decoded at a time;
    # M = 18 and 40 scale the weights, fewer rows the sums; M = 40 multiplies the larger blocks.
    w = packed((N, K), bits, 64)
    x = normal((M, K), 3)
    y, magnitude = exact(x, *w, bits, 64)
    got = ops.quantized_matmul(x, *w, bits=bits, group_size=64, backend="numpy")
    assert (np.abs(got - y) <= bound(y, magnitude, K, "F32", "F32")).all()
    x = normal((M, N), 4)
    y, magnitude = exact(x, *w, bits, 64, transpose=False)
    got = ops.quantized_matmul(x, *w, bits=bits, group_size=64, transpose=False, backend="numpy")
    assert (np.abs(got - y) <= bound(y, magnitude, N, "F32", "F32")).all()


@pytest.fixture
def on_cpu():
    """mlx's Metal kernels round some codes and reconstructions differently; what is promised is the CPU's bits."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_quantize_and_dequantize_are_the_same_bits_in_both(dtype, bits):
    w = normal((3, 5, 256), bits, dtype)
    parts = [ops.quantize(w, bits=bits, group_size=64, backend=backend) for backend in BACKENDS]
    for a, b in zip(*parts, strict=True):
        assert np.array_equal(a, b)
    for out in (None, *DTYPES):
        w_hat = [ops.dequantize(*parts[0], bits=bits, group_size=64, dtype=out, backend=b) for b in BACKENDS]
        assert dtype_name(w_hat[0]) == (out or dtype)
        assert np.array_equal(*w_hat)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_argument_decides_the_kind(backend, dtype):
    w, x = normal((64, 128), 1, dtype), normal((2, 3, 128), 2, dtype)
    grid = {"bits": 4, "group_size": 32, "backend": backend}
    for convert, kind in ((to_numpy, np.ndarray), (to_mlx, mx.array)):
        w_q, scales, biases = ops.quantize(convert(w), **grid)
        results = [
            w_q,
            scales,
            ops.dequantize(w_q, scales, biases, **grid),
            ops.quantized_matmul(convert(x), w_q, scales, biases, **grid),
            ops.matmul(convert(x), convert(w), backend=backend),
        ]
        assert all(isinstance(a, kind) for a in results)
        assert [dtype_name(a) for a in results[1:]] == [dtype] * 4
        assert tuple(results[3].shape) == tuple(results[4].shape) == (2, 3, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_may_be_mixed(backend):
    w = packed((64, 128), 4, 32)
    x = normal((3, 128), 2)
    y = ops.quantized_matmul(to_mlx(x), *w, bits=4, group_size=32, backend=backend)
    expected = ops.quantized_matmul(x, *map(to_mlx, w), bits=4, group_size=32, backend=backend)
    assert np.array_equal(values(y), values(expected))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_results_are_promoted_as_mlx_promotes(x_dtype, w_dtype):
    w, x = packed((32, 64), 4, 32, w_dtype), normal((2, 64), 2, x_dtype)
    results = [ops.quantized_matmul(x, *w, bits=4, group_size=32, backend=b) for b in BACKENDS]
    results += [ops.matmul(x, normal((32, 64), 3, w_dtype), backend=b) for b in BACKENDS]
    assert len({dtype_name(a) for a in results}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128,), (1, 128), (40, 128), (2, 3, 128)])
def test_matmul(monkeypatch, backend, dtype, shape):
    monkeypatch.setattr(numpy_backend, "_WIDE_CHUNK", 1 << 17)  # half floats are widened in three parts
    x, w = normal(shape, 1, dtype), normal((3000, 128), 2, dtype, 128**-0.5)
    y, magnitude = values(x) @ values(w).T, np.abs(values(x)) @ np.abs(values(w)).T
    got = ops.matmul(x, w, backend=backend)
    assert got.shape == y.shape
    compute = dtype if backend == "mlx" else "F32"
    assert (np.abs(values(got) - y) <= bound(y, magnitude, 128, dtype, compute)).all()


def test_arrays_that_are_not_contiguous():
    x, w = normal((128, 10), 1), packed((64, 256), 4, 32)
    cut = [a[::2, : a.shape[1] // 2] for a in w]
    whole = [np.ascontiguousarray(a) for a in cut]
    for convert in (to_numpy, to_mlx):
        a = ops.quantized_matmul(convert(x).T, *map(convert, cut), bits=4, group_size=32, backend="numpy")
        b = ops.quantized_matmul(convert(x.T.copy()), *map(convert, whole), bits=4, group_size=32, backend="numpy")
        assert np.allclose(values(a), values(b), atol=1e-5)
    half = to_mlx(normal((6, 8), 1, "BF16"))
    assert np.array_equal(values(half.T), values(half).T)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("batch", "index_shape", "M"), [((3, 1), (3, 2), 1), ((6,), (6,), 4), ((2, 1, 1), (2, 3, 2), 2), ((4,), (1,), 3)]
)
def test_gathered_products_go_to_their_experts(backend, dtype, batch, index_shape, M):
    experts, N, K = 5, 64, 128
    w = normal((experts, N, K), 1, dtype, K**-0.5)
    w_q, scales, biases = ops.quantize(w, bits=4, group_size=32)
    x = normal((*batch, M, K), 2, dtype)
    indices = np.random.default_rng(3).integers(0, experts, index_shape, dtype=np.uint32)
    y = ops.gather_quantized_matmul(x, w_q, scales, biases, indices, bits=4, group_size=32, backend=backend)
    z = ops.gather_matmul(x, w, indices, backend=backend)
    full = np.broadcast_shapes(batch, index_shape)
    assert y.shape == z.shape == (*full, M, N)
    x_full, i_full = np.broadcast_to(x, (*full, M, K)), np.broadcast_to(indices, full)
    compute = "F32" if backend != "mlx" else MLX_COMPUTES_IN or dtype
    for at in np.ndindex(full):
        e = i_full[at]
        product, magnitude = exact(x_full[at], w_q[e], scales[e], biases[e], 4, 32)
        assert (np.abs(values(y[at]) - product) <= bound(product, magnitude, K, dtype, compute)).all()
        product, magnitude = values(x_full[at]) @ values(w[e]).T, np.abs(values(x_full[at])) @ np.abs(values(w[e])).T
        assert (np.abs(values(z[at]) - product) <= bound(product, magnitude, K, dtype, compute)).all()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4])
def test_splitting_one_row_over_streams_changes_no_bit(monkeypatch, bits, dtype):
    w_q, scales, biases = map(to_mlx, packed((131, 256), bits, 64, dtype))
    x = to_mlx(normal((1, 1, 256), 2, dtype))
    whole = values(ops.quantized_matmul(x, w_q, scales, biases, bits=bits, group_size=64, backend="mlx"))
    monkeypatch.setattr(mlx_backend, "_STREAM_WEIGHTS", 1 << 10)
    monkeypatch.setattr(mlx_backend, "_cpus", lambda: 3)
    split = mlx_backend._split_over_streams
    parts = []
    monkeypatch.setattr(mlx_backend, "_split_over_streams", lambda *a: parts.append(a[2]) or split(*a))

    def again() -> np.ndarray:
        y = values(ops.quantized_matmul(x, w_q, scales, biases, bits=bits, group_size=64, backend="mlx"))
        mx.synchronize()
        return y

    def on_its_thread() -> np.ndarray:
        y = again()
        mx.clear_streams()
        return y

    with ThreadPoolExecutor(1) as thread:
        assert np.array_equal(thread.submit(on_its_thread).result(), whole)
    assert np.array_equal(again(), whole)
    assert parts == [3, 3]


def test_gathered_products_without_transpose_equal_mlx():
    w = packed((3, 64, 128), 4, 32)
    x, indices = normal((4, 2, 64), 5), np.array([2, 0, 2, 1], np.int32)
    y, z = (
        ops.gather_quantized_matmul(x, *w, indices, transpose=False, bits=4, group_size=32, backend=b) for b in BACKENDS
    )
    assert y.shape == z.shape == (4, 2, 128)
    # 64 products of about 128**-0.5: the bound above is 72 * 2**-24 * sum |x w|, below 1e-4 for these.
    assert np.abs(y - z).max() < 1e-4


def test_gather_refuses_an_expert_that_does_not_exist():
    w = packed((3, 64, 128), 4, 32)
    with pytest.raises(FormatError, match=r"0\.\.2, got 0\.\.3"):
        ops.gather_quantized_matmul(
            normal((2, 1, 128), 1), *w, np.array([0, 3]), bits=4, group_size=32, backend="numpy"
        )


def test_numpy_use_does_not_import_mlx():
    code = """
import sys
import numpy as np
from mlxq import ops
from mlxq.errors import BackendError
sys.modules["mlx"] = sys.modules["mlx.core"] = None  # as if it were not installed
w = ops.quantize(np.ones((4, 64), np.float32), bits=4, group_size=32)
x = np.ones((2, 64), np.float32)
assert np.allclose(ops.quantized_matmul(x, *w, bits=4, group_size=32), 64)
assert np.allclose(ops.dequantize(*w, bits=4, group_size=32), 1)
try:
    ops.matmul(x, x, backend="mlx")
except BackendError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the package mlx" in done.stdout


W = packed((64, 128), 4, 32)
X = normal((2, 128), 1)
GRID = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.quantize(X, bits=7, group_size=32), ["quantize:", "2, 3, 4, 5, 6, 8", "7", "(2, 128)"]),
        (lambda: ops.quantize(X, bits=4, group_size=24), ["16, 32, 64, 128", "24"]),
        (lambda: ops.quantize(X[:, :100], **GRID), ["100", "32", "(2, 100)"]),
        (lambda: ops.quantize(X[0], **GRID), ["2 dimensions", "1"]),
        (lambda: ops.quantize(X.astype(np.int32), **GRID), ["int32", "float32, float16 or bfloat16"]),
        (lambda: ops.quantize(X, **GRID, mode="nvfp4"), ["affine", "nvfp4"]),
        (lambda: ops.quantize([[1.0]], **GRID), ["NumPy or mlx array", "list"]),
        (lambda: ops.dequantize(*W, bits=4, group_size=64), ["128 codes", "256", "(64, 16)", "(64, 4)"]),
        (lambda: ops.dequantize(*W, bits=8, group_size=32), ["64 codes", "128", "bits=8"]),
        (lambda: ops.dequantize(W[0].view(np.int32), *W[1:], **GRID), ["uint32", "int32"]),
        (lambda: ops.dequantize(W[0], W[1][:10], W[2][:10], **GRID), ["agree", "(64, 16)", "(10, 4)"]),
        (lambda: ops.dequantize(W[0], W[1], W[2].astype(np.float16), **GRID), ["F32", "F16"]),
        (lambda: ops.dequantize(*W, **GRID, dtype="float16"), ["F32, F16, BF16", "float16"]),
        (lambda: ops.quantized_matmul(X[:, :96], *W, **GRID), ["96 columns", "128", "transpose=True", "(64, 16)"]),
        (lambda: ops.quantized_matmul(X, *W, **GRID, transpose=False), ["128 columns", "64", "transpose=False"]),
        (lambda: ops.quantized_matmul(X, *(a[None] for a in W), **GRID), ["[N, K * bits // 32]", "3 axes"]),
        (lambda: ops.quantized_matmul(X.astype(np.int64), *W, **GRID), ["x must be", "int64"]),
        (lambda: ops.matmul(X, X[:, :96]), ["matmul:", "128 columns", "96"]),
        (lambda: ops.matmul(X, X[None]), ["[N, K]", "3 axes"]),
        (lambda: ops.gather_quantized_matmul(X, *W, np.array([0]), **GRID), ["[experts, N", "2 axes"]),
        (lambda: ops.gather_matmul(X, X[None], np.array([0.5])), ["integers", "float64"]),
        (
            lambda: ops.gather_matmul(X[None].repeat(3, 0), X[None], np.array([0, 0])),
            ["broadcast", "(3, 2, 128)", "(2,)"],
        ),
    ],
)
def test_errors_name_the_operation_the_rule_and_both_sides(call, words):
    with pytest.raises(FormatError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend():
    with pytest.raises(BackendError, match="unknown back end 'cuda'; the back ends are numpy, mlx"):
        ops.matmul(X, X, backend="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
def test_no_rows_give_no_rows(rows, backend):
    w_q, scales, biases = packed((8, 64), 4, 32)
    grid = {"bits": 4, "group_size": 32, "backend": backend}
    x = np.zeros((*rows, 64), np.float32)
    assert ops.quantized_matmul(x, w_q, scales, biases, **grid).shape == (*rows, 8)
    assert ops.quantized_matmul(x[..., :8], w_q, scales, biases, transpose=False, **grid).shape == (*rows, 64)
    assert ops.matmul(x, normal((8, 64), 1), backend=backend).shape == (*rows, 8)
    if len(rows) > 1:
        empty = ops.quantize(x, **grid)
        assert empty[0].shape == (*rows, 8)
        assert ops.dequantize(*empty, **grid).shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 64), (2, 0, 64)])
def test_no_rows_for_experts_give_no_rows(shape, backend):
    stack = packed((4, 8, 64), 4, 32)
    indices = np.zeros(shape[0], np.uint32)
    x = np.zeros(shape, np.float32)
    for y in (
        ops.gather_quantized_matmul(x, *stack, indices, bits=4, group_size=32, backend=backend),
        ops.gather_matmul(x, normal((4, 8, 64), 1), indices, backend=backend),
    ):
        assert y.shape == (*shape[:2], 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_numpy_weights_must_be_finite_whatever_computes(backend, dtype, bad):
    w = normal((4, 64), 1)
    w[3, 63] = bad
    with pytest.raises(FormatError, match="a weight is NaN or infinite"):
        ops.quantize(from_float32(w, dtype), bits=4, group_size=32, backend=backend)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": [4]}, "bits must be one of"),
        ({"bits": 4.0}, "bits must be one of"),
        ({"group_size": {}}, "group_size must be one of"),
        ({"group_size": 64.0}, "group_size must be one of"),
        ({"mode": ["affine"]}, "mode must be 'affine'"),
    ],
)
def test_arguments_of_no_use_are_refused_even_after_their_equals_passed(wrong, message):
    w = normal((4, 64), 1)
    ops.quantize(w, bits=4, group_size=64)
    with pytest.raises(FormatError, match=message):
        ops.quantize(w, **({"bits": 4, "group_size": 64} | wrong))
    with pytest.raises(FormatError, match="dtype must be one of"):
        ops.dequantize(*ops.quantize(w, bits=4, group_size=64), bits=4, group_size=64, dtype=["F32"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("M", [1, 40])
def test_infinite_operands_go_through_without_a_word(M):
    w_q, scales, biases = packed((8, 64), 4, 32)
    scales[3, 1] = np.inf
    biases[4, 0] = np.nan
    x = normal((M, 64), 2)
    x[0, 5] = np.inf
    grid = {"bits": 4, "group_size": 32, "backend": "numpy"}
    found = ops.quantized_matmul(x, w_q, scales, biases, **grid)
    # The rows that nothing infinite meets.
    assert np.isfinite(found[1:, [0, 1, 2, 5, 6, 7]]).all()
    assert not np.isfinite(found[:, [3, 4]]).any()
    assert not np.isfinite(ops.quantized_matmul(x[:, :8], w_q, scales, biases, transpose=False, **grid)).all()
    w = ops.dequantize(w_q, scales, biases, **grid)
    assert not np.isfinite(ops.matmul(x, w, backend="numpy")[:, 3:5]).any()
