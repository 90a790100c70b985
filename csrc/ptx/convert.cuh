// Conversions and special functions: one PTX instruction per function.
// Section names are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#include "ptx/types.cuh"

namespace fa3 {

// ex2.approx: 2^x; -inf gives 0. Relative error <= 2^-22.
FA3_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx: relative error <= 2^-23; 0 gives inf.
FA3_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx: absolute error <= 2^-22 for arguments near 1, relative elsewhere.
FA3_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max.NaN: NaN if either is (fmaxf returns the other one).
FA3_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// tanh.approx: relative error <= 2^-11, below the rounding of bf16 scores.
FA3_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cvt.rn.{bf16x2,f16x2}.f32: two floats to one register, `lo` in the low half.
template <class Elem>
FA3_DEVICE uint32_t pack2(float lo, float hi);
template <>
FA3_DEVICE uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
template <>
FA3_DEVICE uint32_t pack2<fp16>(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}

// cvt.rn.satfinite.e4m3x2.f32: two floats to 16 bits, `lo` in the low byte; clamps to +-448.
FA3_DEVICE uint16_t pack2_e4m3(float lo, float hi) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(hi), "f"(lo));
  return d;
}
// Four floats to one register, `a` in the lowest byte.
FA3_DEVICE uint32_t pack4_e4m3(float a, float b, float c, float d) {
  return uint32_t(pack2_e4m3(a, b)) | (uint32_t(pack2_e4m3(c, d)) << 16);
}

// cvt.rn.f16x2.e4m3x2: exact.
FA3_DEVICE uint32_t unpack2_e4m3(uint16_t x) {
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(x));
  return d;
}

// The two halves of a packed register as floats (shifts for bf16, cvt.f32.f16 for fp16).
template <class Elem>
FA3_DEVICE float2 unpack2(uint32_t x);
template <>
FA3_DEVICE float2 unpack2<bf16>(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <>
FA3_DEVICE float2 unpack2<fp16>(uint32_t x) {
  __half2 h;
  reinterpret_cast<uint32_t&>(h) = x;
  return __half22float2(h);
}

// 1.0 twice, as one packed register.
template <class Elem>
FA3_DEVICE constexpr uint32_t packed_ones();
template <>
FA3_DEVICE constexpr uint32_t packed_ones<bf16>() {
  return 0x3F803F80u;
}
template <>
FA3_DEVICE constexpr uint32_t packed_ones<fp16>() {
  return 0x3C003C00u;
}

// prmt.b32: bytes of {hi, lo} picked by the nibbles of `selector`.
FA3_DEVICE uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(lo), "r"(hi), "r"(selector));
  return d;
}

}  // namespace fa3
