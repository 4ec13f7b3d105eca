"""The checker's calls are mlx's: arguments, strides, constants, sizes, templates; and its numbers are a CPU's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import MslError, Options, metal_kernel, options, run_msl

pytestmark = pytest.mark.usefixtures("checker")

_I = "uint i = thread_position_in_grid.x;\n"


def _one(source: str, x: mx.array, n: int | None = None, **call: object) -> mx.array:
    n = x.size if n is None else n
    kernel = metal_kernel("one", ["x"], ["y"], _I + source + "\n", ensure_row_contiguous=call.pop("contiguous", True))
    call = {"grid": (n, 1, 1), "threadgroup": (min(n, 64), 1, 1), "output_dtypes": [x.dtype], **call}
    return kernel(inputs=[x], output_shapes=[(n,)], **call)[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint32", "uint8", "int64", "uint16"])
def test_values_of_every_dtype_pass_unchanged(dtype: str) -> None:
    x = mx.array(np.arange(100)).astype(getattr(mx, dtype))
    assert mx.array_equal(_one("y[i] = x[i];", x), x)


def test_non_contiguous_inputs_are_made_contiguous() -> None:
    x = mx.arange(24).reshape(4, 6).astype(mx.float32)
    assert mx.array_equal(_one("y[i] = x[i];", x.T), x.T.reshape(-1))
    assert mx.array_equal(_one("y[i] = x[i];", x[:, ::-2]), x[:, ::-2].reshape(-1))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[1:, ::2],
        lambda x: x[::-1],
        lambda x: x[:, ::-2],
        lambda x: mx.broadcast_to(x[:, :1], (6, 8)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strided_inputs_come_with_their_strides(view, dtype: str) -> None:
    x = view(mx.arange(48).reshape(6, 8).astype(getattr(mx, dtype)))
    y = _one(
        "y[i] = x[int64_t(i / x_shape[1]) * x_strides[0] + int64_t(i % x_shape[1]) * x_strides[1]];",
        x,
        contiguous=False,
    )
    assert mx.array_equal(y, x.reshape(-1))


def test_reading_beyond_a_strided_view_is_found() -> None:
    x = mx.arange(48).reshape(6, 8).astype(mx.float32)[:, 1::2]
    with pytest.raises(MslError, match="read out of bounds"):
        _one("y[i] = x[i * 2 + 1];", x, contiguous=False)


def test_small_inputs_are_constant_and_scalars_are_references() -> None:
    y = _one("y[i] = i < 3 ? x[i] : 0;", mx.array([1.0, 2.0, 3.0]), n=8)
    assert mx.array_equal(y, mx.array([1.0, 2, 3, 0, 0, 0, 0, 0]))
    y = _one("y[i] = x;", mx.array(7.0), n=8)
    assert mx.array_equal(y, mx.full((8,), 7.0))
    with pytest.raises(MslError, match="error: "):
        _one("const device float* p = x; y[i] = p[0];", mx.array([1.0]), n=8)


def test_python_values_are_inputs() -> None:
    kernel = metal_kernel("scaled", ["x", "a", "n"], ["y"], _I + "y[i] = x[i] * a + n;\n")
    (y,) = kernel(
        inputs=[mx.ones(8), 2.5, 3],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
    )
    assert mx.array_equal(y, mx.full((8,), 5.5))


def test_template_arguments_and_several_outputs() -> None:
    outputs, report = run_msl(
        "pair",
        {"x": mx.arange(64).astype(mx.float16)},
        {"y": ((64,), mx.bfloat16), "z": ((8, 8), mx.int32)},
        "template <typename T, int N, bool ADD> inline T next(T v) { return ADD ? v + T(N) : v; }\n",
        _I + "y[i] = T(float(next<float, N, ADD>(x[i]))); z[i] = N * int(i);\n",
        (64, 1, 1),
        (32, 1, 1),
        {"T": mx.bfloat16, "N": 3, "ADD": True},
    )
    assert mx.array_equal(outputs["y"], (mx.arange(64) + 3).astype(mx.bfloat16))
    assert mx.array_equal(outputs["z"], (mx.arange(64) * 3).reshape(8, 8))
    assert report.threadgroups == 2


def test_initial_value_and_atomic_outputs() -> None:
    kernel = metal_kernel(
        "sum", ["x"], ["y"], _I + "atomic_fetch_add_explicit(&y[0], x[i], memory_order_relaxed);\n", atomic_outputs=True
    )
    (y,) = kernel(
        inputs=[mx.arange(100).astype(mx.int32)],
        grid=(100, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
        init_value=5,
    )
    assert y.item() == 4955


def test_last_threadgroup_is_cut_to_the_grid() -> None:
    _, report = run_msl(
        "cut",
        {"x": mx.arange(100).astype(mx.int32)},
        {"y": ((100,), mx.int32)},
        "",
        _I + "y[i] = int(threads_per_threadgroup.x);\n",
        (100, 1, 1),
        (64, 1, 1),
    )
    assert report.threadgroups == 2


def test_attributes_of_a_three_dimensional_grid() -> None:
    source = (
        "uint3 p = thread_position_in_grid, n = threads_per_grid; y[(p.z * n.y + p.y) * n.x + p.x] = "
        "thread_index_in_threadgroup + 100 * (threadgroup_position_in_grid.x + 10 * threadgroup_position_in_grid.z);\n"
    )
    kernel = metal_kernel("three", ["x"], ["y"], source)
    (y,) = kernel(
        inputs=[mx.zeros(8)],
        grid=(4, 3, 4),
        threadgroup=(2, 3, 2),
        output_shapes=[(4, 3, 4)],
        output_dtypes=[mx.uint32],
    )
    z, j, k = np.meshgrid(np.arange(4), np.arange(3), np.arange(4), indexing="ij")
    expected = k % 2 + 2 * j + 6 * (z % 2) + 100 * (k // 2 + 10 * (z // 2))
    assert np.array_equal(np.array(y), expected)


def test_impossible_launches_are_refused() -> None:
    x = mx.ones(4096)
    with pytest.raises(MslError, match="threadgroup of 2048 threads: the most is 1024"):
        _one("y[i] = x[i];", x, threadgroup=(2048, 1, 1))
    with pytest.raises(MslError, match="must be three positive sizes"):
        _one("y[i] = x[i];", x, grid=(0, 1, 1))


def test_errors_give_the_line_of_header_and_source() -> None:
    kernel = metal_kernel(
        "lines", ["x"], ["y"], _I + "\ny[i] = half4(float4(1)).q;\n", "\ninline int f() { return z; }\n"
    )
    with pytest.raises(MslError) as error:
        kernel(
            inputs=[mx.ones(8)], grid=(8, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(8,)], output_dtypes=[mx.float32]
        )
    assert "lines.header:2:" in str(error.value)
    assert "lines.source:3:" in str(error.value)


def test_unknown_options_and_modes_are_refused() -> None:
    with pytest.raises(TypeError), options(no_such_option=1):
        pass
    with pytest.raises(ValueError, match="the modes are fast, count, check"):
        _ = Options(mode="careful").build


def test_half_arithmetic_rounds_after_each_operation() -> None:
    x = mx.array(np.linspace(0.1, 3.0, 64).astype(np.float16))
    y = _one("half v = x[i] * half(1.1h); y[i] = v + half(0.3h);", x)
    expected = (np.array(x) * np.float16(1.1)).astype(np.float16) + np.float16(0.3)
    assert np.array_equal(np.array(y), expected)


def test_matrix_product_of_a_simdgroup() -> None:
    source = (
        "simdgroup_matrix<float, 8, 8> a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); "
        "simdgroup_load(a, x, 8); simdgroup_load(b, x + 64, 8); simdgroup_multiply_accumulate(c, a, b, c); "
        "simdgroup_store(c, y, 8);\n"
    )
    x = mx.array(np.random.default_rng(0).integers(-9, 9, (2, 8, 8)).astype(np.float32))
    kernel = metal_kernel("product", ["x"], ["y"], source)
    (y,) = kernel(
        inputs=[x], grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(8, 8)], output_dtypes=[mx.float32]
    )
    assert np.array_equal(np.array(y), np.array(x[0]) @ np.array(x[1]))


def test_denormals_are_flushed_on_demand() -> None:
    x = mx.full((64,), 1e-38)
    kernel = metal_kernel("tenth", ["x"], ["y"], _I + "y[i] = x[i] * 0.1f;\n")
    call = {"inputs": [x], "grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
    call |= {"output_shapes": [(64,)], "output_dtypes": [mx.float32]}
    assert np.array(kernel(**call)[0]).all()
    assert not np.array(kernel(**call, flush_denormals=True)[0]).any()


def test_dry_calls_compile_and_run_nothing() -> None:
    record: list = []
    with options(dry=True, record=record):
        assert mx.array_equal(_one("y[i] = x[i + 1];", mx.ones(64)), mx.zeros(64))
        with pytest.raises(MslError, match="no member named 'q'"):
            _one("y[i] = float4(x[i]).q;", mx.ones(64))
        with pytest.raises(MslError, match="Metal has no double"):
            _one("y[i] = float(double(x[i]));", mx.ones(64))
    assert not record
