/* The ceilings of this CPU: multiply-accumulates on registers only, and a sum over memory.
 *
 * Each function does `rounds` rounds of CHAINS independent vector operations (enough to hide the latency of any
 * known core) and returns something that depends on all of them, so that nothing can be left out.
 */
#include <stdint.h>
#define CHAINS 16
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512VNNI__)
#define INT8_NAME "AVX512-VNNI vpdpbusd, 512 bits"
#define INT8_MACS 64
typedef __m512i i8v;
#define I8_ZERO() _mm512_setzero_si512()
#define I8_SET(x) _mm512_set1_epi8(x)
#define I8_DOT(c, a, b) _mm512_dpbusd_epi32(c, a, b)
#define I8_SUM(c) _mm512_reduce_add_epi32(c)
#elif defined(__AVXVNNI__)
#define INT8_NAME "AVX-VNNI vpdpbusd, 256 bits"
#define INT8_MACS 32
typedef __m256i i8v;
#define I8_ZERO() _mm256_setzero_si256()
#define I8_SET(x) _mm256_set1_epi8(x)
#define I8_DOT(c, a, b) _mm256_dpbusd_avx_epi32(c, a, b)
#define I8_SUM(c) (_mm256_extract_epi32(c, 0) + _mm256_extract_epi32(c, 5))
#elif defined(__ARM_FEATURE_DOTPROD)
#define INT8_NAME "Arm sdot, 128 bits"
#define INT8_MACS 16
typedef int32x4_t i8v;
#define I8_ZERO() vdupq_n_s32(0)
#define I8_SET(x) vreinterpretq_s32_s8(vdupq_n_s8(x))
#define I8_DOT(c, a, b) vdotq_s32(c, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
#define I8_SUM(c) vaddvq_s32(c)
#endif

#if defined(__AVX512F__)
#define FP32_NAME "AVX512 FMA, 512 bits"
#define FP32_MACS 16
typedef __m512 f32v;
#define F32_SET(x) _mm512_set1_ps(x)
#define F32_FMA(c, a, b) _mm512_fmadd_ps(a, b, c)
#define F32_SUM(c) _mm512_reduce_add_ps(c)
#elif defined(__FMA__)
#define FP32_NAME "FMA, 256 bits"
#define FP32_MACS 8
typedef __m256 f32v;
#define F32_SET(x) _mm256_set1_ps(x)
#define F32_FMA(c, a, b) _mm256_fmadd_ps(a, b, c)
#define F32_SUM(c) (_mm256_cvtss_f32(c))
#elif defined(__ARM_NEON)
#define FP32_NAME "Arm FMLA, 128 bits"
#define FP32_MACS 4
typedef float32x4_t f32v;
#define F32_SET(x) vdupq_n_f32(x)
#define F32_FMA(c, a, b) vfmaq_f32(c, a, b)
#define F32_SUM(c) vaddvq_f32(c)
#endif

/* Keeps an accumulator in its register and hides it from the optimizer: else GCC copies or folds it. */
#if defined(__x86_64__)
#define HIDE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__ARM_NEON)
#define HIDE(x) __asm__ volatile("" : "+w"(x))
#endif

#ifdef INT8_NAME
const char *int8_name(void) { return INT8_NAME; }
int64_t int8_macs(void) { return INT8_MACS * CHAINS; }
int64_t int8_peak(int64_t rounds) {
  i8v a = I8_SET(1), b = I8_SET(1);
#define START(i) i8v c##i = I8_ZERO();
#define STEP(i) c##i = I8_DOT(c##i, a, b); HIDE(c##i);
#define ADD(i) sum += I8_SUM(c##i);
  EACH(START)
  for (int64_t r = 0; r < rounds; r++) { EACH(STEP) }
  int64_t sum = 0;
  EACH(ADD)
  return (int64_t)sum;
#undef START
#undef STEP
#undef ADD
}
#else
const char *int8_name(void) { return ""; }
int64_t int8_macs(void) { return 0; }
int64_t int8_peak(int64_t rounds) { return rounds; }
#endif

#ifdef FP32_NAME
const char *fp32_name(void) { return FP32_NAME; }
int64_t fp32_macs(void) { return FP32_MACS * CHAINS; }
int64_t fp32_peak(int64_t rounds) {
  f32v a = F32_SET(1e-9f), b = F32_SET(1.0f);
#define START(i) f32v c##i = F32_SET(0.0f);
#define STEP(i) c##i = F32_FMA(c##i, a, b); HIDE(c##i);
#define ADD(i) sum += F32_SUM(c##i);
  EACH(START)
  for (int64_t r = 0; r < rounds; r++) { EACH(STEP) }
  float sum = 0;
  EACH(ADD)
  return (int64_t)sum;
#undef START
#undef STEP
#undef ADD
}
#else
const char *fp32_name(void) { return ""; }
int64_t fp32_macs(void) { return 0; }
int64_t fp32_peak(int64_t rounds) { return rounds; }
#endif

/* Reads every element once; several sums, so that none waits for the one before. */
int64_t read_sum(const int64_t *data, int64_t count) {
  int64_t sums[8] = {0};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; j++) sums[j] += data[i + j];
  }
  int64_t sum = 0;
  for (int j = 0; j < 8; j++) sum += sums[j];
  for (; i < count; i++) sum += data[i];
  return sum;
}
