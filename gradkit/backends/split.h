/* What a split selects of a block, packed and spread again. A bit for each element says what is selected. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define BY_BITS 1

FN __mmask16 sixteen(const uint64_t *bits, long i) { return (__mmask16)(bits[i / 64] >> i % 64); }
FN __mmask16 there(long left) { return (__mmask16)(left < 16 ? (1u << left) - 1u : 0xffffu); }
#else
#define BY_BITS 0
#endif

FN long count(const uint64_t *bits, long n) {
  long m = 0;
  for (long w = 0; w < n; w += 64) m += __builtin_popcountll(bits[w / 64]);
  return m;
}

FN void list(const uint64_t *bits, long n, uint16_t *places) {
  long m = 0;
  for (long w = 0; w < n; w += 64)
    for (uint64_t left = bits[w / 64]; left; left &= left - 1) places[m++] = (uint16_t)(w + __builtin_ctzll(left));
}

/* 32-bit elements from p into to, which has room for 16 more */
FN void pack_f32(const float *p, const uint64_t *bits, const uint16_t *places, long m, long n, float *to) {
#if BY_BITS
  for (long i = 0; i < n; i += 16) {
    const __mmask16 chosen = sixteen(bits, i);
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(chosen, _mm512_maskz_loadu_ps(there(n - i), p + i)));
    to += __builtin_popcount(chosen);
  }
#else
  for (long j = 0; j < m; j++) to[j] = p[places[j]];
#endif
}
#define PACK(suffix, type)                                                                                       \
  FN void pack_##suffix(const type *p, const uint64_t *bits, const uint16_t *places, long m, long n, type *to) { \
    for (long j = 0; j < m; j++) to[j] = p[places[j]];                                                           \
  }
PACK(f64, double)
PACK(bf16, bf16)
PACK(fp16, fp16)

/* m values into `to`, where `chosen` becomes 1; both have room for 16 more, and so has v */
FN void spread(const T *v, const uint64_t *bits, const uint16_t *places, long m, long n, T *to, uint8_t *chosen) {
#if BY_BITS
  if (sizeof(T) == 4) {
    for (long i = 0; i < n; i += 16) {
      const __mmask16 k = sixteen(bits, i);
      _mm512_storeu_ps((float *)to + i, _mm512_maskz_expand_ps(k, _mm512_loadu_ps((const float *)v)));
      _mm_storeu_si128((__m128i *)(chosen + i), _mm_maskz_set1_epi8(k, 1));
      v += __builtin_popcount(k);
    }
    return;
  }
#endif
  for (long i = 0; i < n; i++) chosen[i] = 0;
  for (long j = 0; j < m; j++) {
    to[places[j]] = v[j];
    chosen[places[j]] = 1;
  }
}
