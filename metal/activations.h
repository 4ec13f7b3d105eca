// Functions between the gate and the up projection of a model's feed-forward layer, as mlx.nn computes them.
#pragma once
#include "common.h"

/// `nn.silu`.
struct Silu {
  static MLXQ_FUNC float of(float g) {
    return g / (1.0f + precise::exp(-g));
  }
};

/// `nn.gelu_approx`: the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).
struct GeluApprox {
  static MLXQ_FUNC float of(float g) {
    constexpr float sqrt_2_over_pi = 0.7978845608f;
    return 0.5f * g * (1.0f + precise::tanh(sqrt_2_over_pi * fma(0.044715f * g * g, g, g)));
  }
};

/// `nn.gelu`, with the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26): Metal has none.
struct Gelu {
  static MLXQ_FUNC float of(float g) {
    const float z = fabs(g) * 0.7071067812f;
    const float t = 1.0f / fma(0.3275911f, z, 1.0f);
    const float p = fma(fma(fma(fma(1.061405429f, t, -1.453152027f), t, 1.421413741f), t, -0.284496736f), t,
                        0.254829592f);
    // Half of 1 - erf(|g| / sqrt(2)): the part of |g| that is lost where g is positive, kept where it is negative.
    const float tail = 0.5f * p * t * precise::exp(-z * z);
    return g >= 0.0f ? fma(-g, tail, g) : g * tail;
  }
};
