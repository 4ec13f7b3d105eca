// A stand-in for Apple's <metal_stdlib>, for compiling Metal text on a CPU with clang's "C++ for OpenCL" front end
// (-x clcpp): the four address spaces of Metal are real there, methods may be qualified with them, and a generic
// `this` lets class types live in any of them. The text must have been through translate.py.
#pragma once
#pragma clang system_header
#include "msl_base.h"
#include "msl_traits.h"
#include "msl_vector.h"
#include "msl_math.h"
#include "msl_simd.h"
#include "msl_matrix.h"
#include "msl_atomic.h"
#include "msl_builtins.h"
