// SPDX-License-Identifier: MIT
/// @file math.hpp
/// The exponential that softmax needs, and the hyperbolic tangent of a soft-cap.
#pragma once

#include "headwise/core/config.hpp"
#include "headwise/simd/isa.hpp"

namespace headwise::inline v0::simd {

/// exp(x) for x <= 0 (up to about 80 it holds as well), within 2 ulp; exactly 0 below -87.33, where
/// the result would no longer be a normal float, -infinity included.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial in r. About 13 operations.
/// @see Cephes, expf: the coefficients and the two-part ln 2.
template <class Isa>
HEADWISE_ALWAYS_INLINE typename Ops<Isa>::V exp(typename Ops<Isa>::V x) {
  using O = Ops<Isa>;
  using V = typename O::V;
  constexpr float kSmallestNormal = -87.33654F;  // ln 2^-126
  // In this order a NaN stays a NaN on x86: max gives its second operand.
  const V clamped = O::max(O::broadcast(kSmallestNormal), x);
  const V n = O::round(O::mul(clamped, O::broadcast(1.44269504F)));  // 1 / ln 2
  V r = O::fma(n, O::broadcast(-0.693359375F), clamped);
  r = O::fma(n, O::broadcast(2.12194440e-4F), r);
  V p = O::broadcast(1.9875691500e-4F);
  p = O::fma(p, r, O::broadcast(1.3981999507e-3F));
  p = O::fma(p, r, O::broadcast(8.3334519073e-3F));
  p = O::fma(p, r, O::broadcast(4.1665795894e-2F));
  p = O::fma(p, r, O::broadcast(1.6666665459e-1F));
  p = O::fma(p, r, O::broadcast(5.0000001201e-1F));
  p = O::fma(p, r, O::broadcast(1.0F));
  p = O::fma(p, r, O::broadcast(1.0F));
  return O::zero_below(O::scale_by_exp2(p, n), x, kSmallestNormal);
}

/// tanh(x), within 4 ulp: relative to the result, which is as small as x near 0. 1 and -1 at the
/// infinities.
///
/// x times a factor of |x|: a polynomial below 0.625, above it (1 - e) / ((1 + e) |x|) with
/// e = exp(-2 |x|).
/// @see Cephes, tanhf: the coefficients.
template <class Isa>
HEADWISE_ALWAYS_INLINE typename Ops<Isa>::V tanh(typename Ops<Isa>::V x) {
  using O = Ops<Isa>;
  using V = typename O::V;
  constexpr float kSmall = 0.625F;
  constexpr float kJustSmaller = 0.62499994F;
  const V one = O::broadcast(1.0F);
  const V low = O::broadcast(-10.0F);  // tanh is 1 from 9.02 on; in this order a NaN stays a NaN
  const V minus = O::max(low, O::sub(O::zero(), O::max(low, x)));
  const V clamped = O::sub(O::zero(), minus);
  const V size = O::max(clamped, minus);

  const V e = exp<Isa>(O::mul(size, O::broadcast(-2.0F)));
  const V large = O::div(O::sub(one, e), O::mul(O::add(one, e), size));
  const V z = O::mul(size, size);
  V p = O::broadcast(-5.70498872745e-3F);
  p = O::fma(p, z, O::broadcast(2.06390887954e-2F));
  p = O::fma(p, z, O::broadcast(-5.37397155531e-2F));
  p = O::fma(p, z, O::broadcast(1.33314422036e-1F));
  p = O::fma(p, z, O::broadcast(-3.33332819422e-1F));
  p = O::fma(p, z, one);
  const V factor = O::add(O::zero_below(large, size, kSmall),
                          O::zero_below(p, O::sub(O::zero(), size), -kJustSmaller));
  return O::mul(clamped, factor);
}

}  // namespace headwise::inline v0::simd
