/* What generated loops call. T is a typedef, float or double, made before this text.

   In float nothing here branches or calls libm: one call would keep the whole loop from being vectorised. The float
   forms, compared with double libm on all 2^32 arguments (gcc 12, x86-64): exp 0.96 ulp, log 0.87, tanh 1.33,
   sigmoid 2.41, denormal results included; inf and NaN as they should be. Polynomials: minimax fits made for these
   ranges. Contraction must be off, rounding to nearest, denormals kept. */
#include <float.h>
#include <math.h>
#include <stdint.h>

#define FN static inline __attribute__((always_inline))

typedef struct { uint16_t bits; } bf16;
typedef struct { uint16_t bits; } fp16;

FN uint32_t bits_of(float x) { union { float f; uint32_t u; } v; v.f = x; return v.u; }
FN float float_of(uint32_t x) { union { uint32_t u; float f; } v; v.u = x; return v.f; }

/* ---- functions of float ---- */

FN float exp_f(float x) {
  x = x > 89.f ? 89.f : x; /* e^89 overflows, e^-104 is 0; a NaN passes both */
  x = x < -104.f ? -104.f : x;
  float shifted = x * 1.44269504f + 12582912.f; /* 1.5 * 2^23: the integer nearest to x / ln 2, in the low bits */
  float n = shifted - 12582912.f;
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float q = 0.00139446591f + r * 0.000197903413f;
  q = 0.5f + r * (0.166666657f + r * (0.0416662954f + r * (0.00833349675f + r * q)));
  uint32_t e = bits_of(shifted) - bits_of(12582912.f), half = (uint32_t)((int32_t)e >> 1);
  return (1.f + (r + r * r * q)) * float_of((half + 127u) << 23) * float_of((e - half + 127u) << 23);
}

FN float log_f(float x) {
  int small = x < FLT_MIN;
  uint32_t u = bits_of(small ? x * 33554432.f : x) - bits_of(0.707106781f);
  float e = (float)((int32_t)u >> 23) - (small ? 25.f : 0.f);
  float f = float_of((u & 0x007fffffu) + bits_of(0.707106781f)) - 1.f; /* sqrt(1/2) - 1 .. sqrt(2) - 1 */
  float q = -0.124055892f + f * (0.11888162f + f * (-0.116756521f + f * 0.067466408f));
  q = 0.333333135f + f * (-0.250000089f + f * (0.200021192f + f * (-0.166679963f + f * (0.142195523f + f * q))));
  float y = (f + (e * 1.42860677e-6f + f * f * (f * q - 0.5f))) + e * 0.693145752f;
  y = x <= FLT_MAX ? y : x; /* inf and NaN are their own logarithms */
  y = x < 0.f ? NAN : y;
  return x == 0.f ? -INFINITY : y;
}

FN float tanh_f(float x) {
  float a = fabsf(x), z = a * a;
  float q = 0.0217007026f + z * (-0.0081773987f + z * 0.00214296184f);
  float near = a + a * z * (-0.333333313f + z * (0.133332059f + z * (-0.0539467633f + z * q)));
  float far = 1.f - 2.f / (exp_f(a + a) + 1.f);
  return copysignf(a < 0.625f ? near : far, x);
}

/* ---- the operations of a rule, in T ---- */

#define IN_T(float_form, double_form) (sizeof(T) == 4 ? (T)(float_form) : (T)(double_form))

FN T k_sqrt(T x) { return IN_T(sqrtf((float)x), sqrt((double)x)); }
FN T k_absolute(T x) { return IN_T(fabsf((float)x), fabs((double)x)); }
FN T k_sign(T x) { return (T)((x > 0) - (x < 0)); } /* 0 for NaN */
FN T k_minimum(T a, T b) { return (b < a) | (b != b) ? b : a; }
FN T k_maximum(T a, T b) { return (b > a) | (b != b) ? b : a; }
FN T k_exp(T x) { return IN_T(exp_f((float)x), exp((double)x)); }
FN T k_log(T x) { return IN_T(log_f((float)x), log((double)x)); }
FN T k_tanh(T x) { return IN_T(tanh_f((float)x), tanh((double)x)); }
FN T k_sigmoid(T x) { /* e^-|x| never overflows: exact also where 1 / (1 + e^-x) underflows */
  T e = k_exp(-k_absolute(x));
  return (x < 0 ? e : (T)1) / ((T)1 + e);
}
FN int k_isfinite(T x) { return k_absolute(x) <= IN_T(FLT_MAX, DBL_MAX); }

/* ---- storage: to nearest even, as torch's .to() ---- */

FN T load_f32(float x) { return (T)x; }
FN T load_f64(double x) { return (T)x; }
FN T load_bf16(bf16 x) { return (T)float_of((uint32_t)x.bits << 16); }
FN T load_fp16(fp16 x) {
  uint32_t a = x.bits & 0x7fffu, sign = (uint32_t)(x.bits & 0x8000u) << 16;
  uint32_t normal = (a << 13) + (a < 0x7c00u ? 112u << 23 : 224u << 23); /* the exponent's bias; inf and NaN stay */
  uint32_t subnormal = bits_of((float)(int32_t)a * 0x1p-24f);
  return (T)float_of((a < 0x0400u ? subnormal : normal) | sign);
}

FN float store_f32(T x) { return (float)x; }
FN double store_f64(T x) { return (double)x; }
FN bf16 store_bf16(T x) {
  uint32_t u = bits_of((float)x);
  uint32_t near = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  bf16 r = {(uint16_t)(x != x ? 0x7fc0u : near)};
  return r;
}
FN fp16 store_fp16(T x) {
  uint32_t u = bits_of((float)x), a = u & 0x7fffffffu;
  uint32_t normal = (a - (112u << 23) + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  uint32_t subnormal = bits_of(fabsf((float)x) + 0.5f) - bits_of(0.5f); /* 0.5 has an ulp of 2^-24 */
  uint32_t near = a < 0x38800000u ? subnormal : a < 0x47800000u ? normal : 0x7c00u;
  fp16 r = {(uint16_t)(x != x ? 0x7e00u : near | (u >> 16 & 0x8000u))};
  return r;
}

/* ---- random bits and stochastic rounding; the same bits as gradkit/random.py ---- */

FN bf16 stochastic_bf16(T x, uint32_t random) {
  uint32_t u = bits_of((float)x), a = u & 0x7fffffffu;
  uint32_t near = (a + (random & 0xffffu)) >> 16;
  bf16 r = {(uint16_t)(x != x ? 0x7fc0u : near | (u >> 16 & 0x8000u))};
  return r;
}
FN fp16 stochastic_fp16(T x, uint32_t random) {
  uint32_t u = bits_of((float)x), a = u & 0x7fffffffu;
  uint32_t normal = (a - (112u << 23) + (random & 0x1fffu)) >> 13;
  float tiny = float_of(a < 0x38800000u ? a : 0x38800000u); /* in units of 2^-40: 16 bits below fp16's last */
  uint32_t subnormal = ((uint32_t)(int32_t)(tiny * 0x1p40f) + (random & 0xffffu)) >> 16;
  uint32_t near = a < 0x38800000u ? subnormal : a < 0x47800000u ? normal : 0x7c00u;
  fp16 r = {(uint16_t)(x != x ? 0x7e00u : near | (u >> 16 & 0x8000u))};
  return r;
}

/* Philox-4x32-7, first word; counter (element low, element high, step, index), key (seed, stream). */
FN uint32_t philox(uint64_t element, uint32_t step, uint32_t index, uint32_t seed, uint32_t stream) {
  uint32_t c0 = (uint32_t)element, c1 = (uint32_t)(element >> 32), c2 = step, c3 = index;
  for (int round = 0; round < 7; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ seed;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ stream;
    c1 = (uint32_t)b;
    c3 = (uint32_t)a;
    seed += 0x9E3779B9u;
    stream += 0xBB67AE85u;
  }
  return c0;
}
