"""Text that Apple's compiler rejects, by the rules of the language, is rejected here; what it takes is taken."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_on_cpu import MslError, metal_kernel

pytestmark = pytest.mark.usefixtures("checker")

_HEADER = """
inline float take_thread(const thread float* p) { return p[0]; }
inline float take_device(const device float* p) { return p[0]; }
inline float take_threadgroup(threadgroup float* p) { return p[0]; }
inline float take_constant(constant int& p) { return p; }
struct S { float a; float get() const thread { return a; } };
struct L { threadgroup float* d; L(threadgroup float* p) thread : d(p) {} };
template <typename T> inline T first(const device T* p) { return p[0]; }
constant float TABLE[4] = {1.0f, 2.0f, 4.0f, 8.0f};
constexpr constant int SHIFTS[2] = {0, 4};
"""

ACCEPTED = {
    "pointers and templates": "y[i] = take_device(x + i) + first(x) + first<float>(x);",
    "constant tables": "y[i] = x[i] * TABLE[i & 3] + float(SHIFTS[i & 1]);",
    "copies of a struct": "S a; a.a = x[i]; S b = a; auto c = b; y[i] = c.get();",
    "vectors and swizzles": "float4 v = float4(x[i]); v.xy = v.zw; half2 h = half2(v.xy); y[i] = float(h.x) + v.w;",
    "half literals and ternaries": "half h = 1.5h; float v = i > 3 ? float(h) : x[i]; y[i] = v;",
    "as_type, bfloat": "bfloat b = bfloat(x[i]); y[i] = float(b) + as_type<float>(as_type<uint>(x[i]));",
}

# Source, and text added to the header.
REJECTED = {
    "device to threadgroup pointer": ("threadgroup float* p = x; y[i] = p[0];", ""),
    "cast from device to threadgroup": ("threadgroup float* p = (threadgroup float*)x; y[i] = p[0];", ""),
    "device pointer for a thread parameter": ("y[i] = take_thread(x);", ""),
    "thread pointer for a device parameter": ("float v = 1; y[i] = take_device(&v);", ""),
    "threadgroup array for a device parameter": (
        "threadgroup float t[64]; t[i & 63] = x[i]; y[i] = take_device(t);",
        "",
    ),
    "device pointer for a threadgroup parameter": ("y[i] = take_threadgroup((device float*)y);", ""),
    "literal for a constant reference": ("y[i] = take_constant(3) + x[i];", ""),
    "thread int for a constant reference": ("int v = i; y[i] = take_constant(v) + x[i];", ""),
    "write through const device": ("x[i] = 1.0f; y[i] = 0;", ""),
    "pointer without an address space": ("const float* p = x + i; y[i] = *p;", ""),
    "cast to a pointer without an address space": ("y[i] = *(const float*)(x + i);", ""),
    "reference without an address space": ("const float& r = x[i]; y[i] = r;", ""),
    "thread method of a device object": ("y[i] = ((const device S*)x)[i].get();", ""),
    "device pointer for a threadgroup constructor": ("L l(y); y[i] = l.d[0];", ""),
    "threadgroup variable outside a kernel": (
        "y[i] = bad(x[i]);",
        "inline float bad(float v) { threadgroup float t[4]; t[0] = v; return t[0]; }\n",
    ),
    "pointer to a pointer of another space": (
        "const device float* p = x; thread const threadgroup float** q = &p; y[i] = **q;",
        "",
    ),
    "double": ("double d = x[i]; y[i] = d;", ""),
    "long double": ("long double v = 1; y[i] = float(v);", ""),
    "float to bfloat": ("bfloat b = x[i]; y[i] = b;", ""),
    "half to bfloat": ("half h = half(x[i]); bfloat b = h; y[i] = b;", ""),
    "float4 to half4": ("half4 h = float4(x[i]); y[i] = h.x;", ""),
    "float4 * int4": ("float4 v = float4(x[i]) * int4(1); y[i] = v.x;", ""),
    "float2 has no z": ("float2 v = float2(x[i]); y[i] = v.z;", ""),
    "min(int, uint)": ("int a = 3; y[i] = min(a, i) + x[i];", ""),
    "max(float, int)": ("y[i] = max(x[i], 0);", ""),
    "as_type of another size": ("y[i] = as_type<ushort>(x[i]);", ""),
    "simd_sum of 64 bits": ("ulong v = i; y[i] = float(simd_sum(v));", ""),
    "std": ("y[i] = std::min(x[i], 1.0f);", ""),
    "memcpy": ("float v; memcpy(&v, x, 4); y[i] = v;", ""),
    "printf": ('printf("x"); y[i] = x[i];', ""),
    "new": ("thread float* p = new float[4]; y[i] = p[0];", ""),
    "recursion": (
        "y[i] = rec(int(i));",
        "inline float rec(int n) { return n == 0 ? 0.0f : rec(n - 1) + 1.0f; }\n",
    ),
    "virtual function": ("V v; y[i] = v.f();", "struct V { virtual float f() { return 1; } };\n"),
    "throw": ("if (i > 1000) throw 1; y[i] = 0;", ""),
    "function pointer": ("float (*f)(const device float*) = &take_device; y[i] = f(x);", ""),
    "global variable": ("y[i] = g;", "float g = 1.0f;\n"),
    "static variable": ("static float s = 0; s += x[i]; y[i] = s;", ""),
    "thread_local": ("thread_local float f = 1; y[i] = f;", ""),
    "array of variable length": ("float t[i]; t[0] = 1; y[i] = t[0];", ""),
    "goto": ("goto end; end: y[i] = 0;", ""),
    "typeid": ("y[i] = typeid(x) == typeid(y);", ""),
    "concept": ("y[i] = x[i];", "template <class T> concept C = true;\n"),
    "lambda": ("auto f = [](float a) { return a * 2; }; y[i] = f(x[i]);", ""),
    "function that Metal lacks": ("y[i] = metal::erf(x[i]);", ""),
    "uninitialized variable": ("float v; if (i > 3) v = 1; y[i] = v;", ""),
}


def _run(source: str, header: str = "") -> None:
    text = "const uint i = thread_position_in_grid.x;\n" + source + "\n"
    metal_kernel("case", ["x"], ["y"], text, _HEADER + header)(
        inputs=[mx.arange(64).astype(mx.float32)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )


@pytest.mark.parametrize("name", ACCEPTED)
def test_metal_text_is_accepted(name: str) -> None:
    _run(ACCEPTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", REJECTED)
def test_other_text_is_rejected(name: str) -> None:
    with pytest.raises(MslError, match=r"error: "):
        _run(*REJECTED[name])
