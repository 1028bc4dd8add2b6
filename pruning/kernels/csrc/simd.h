// Vectors of the widest kind the instruction set has, and the activation functions on them.
#pragma once

#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "layer.h"

#if defined(__AVX512F__)
#define SECATEUR_LANES 16
#elif defined(__AVX__)
#define SECATEUR_LANES 8
#else
#define SECATEUR_LANES 4
#endif

// Registers: 32 on AVX-512 and ARM, 16 elsewhere. They bound how many sums a tile can hold.
#if defined(__AVX512F__) || defined(__aarch64__)
#define SECATEUR_REGISTERS 32
#else
#define SECATEUR_REGISTERS 16
#endif

// Without this the compiler reads a vector again from memory for each use, and loads are what these kernels run out of.
#if defined(__AVX512F__)
#define SECATEUR_KEEP(vector) asm("" : "+v"(vector))
#elif defined(__x86_64__)
#define SECATEUR_KEEP(vector) asm("" : "+x"(vector))
#elif defined(__aarch64__)
#define SECATEUR_KEEP(vector) asm("" : "+w"(vector))
#else
#define SECATEUR_KEEP(vector)
#endif

#define SECATEUR_UNROLL _Pragma("GCC unroll 32")

// An anonymous namespace, here and in the other headers: every instruction set compiles this text, and the linker must
// not merge what it finds twice into the one that an older processor cannot run. For the same reason nothing in these
// files instantiates templates of the standard library.
namespace {

constexpr int LANES = SECATEUR_LANES;
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t UnalignedIntVector __attribute__((vector_size(LANES * 4), aligned(4)));

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline IntVector load_lanes(const int32_t* from) { return *reinterpret_cast<const UnalignedIntVector*>(from); }
inline void store(float* to, Vector vector) { *reinterpret_cast<UnalignedVector*>(to) = vector; }
// Subtracting zero, which the compiler may leave out; adding it would turn -0 into 0, so it may not.
inline Vector splat(float value) { return value - Vector{}; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Comparisons are written so that NaN passes through, as it does in PyTorch.
inline Vector clamp(Vector v, Vector low, Vector high) {
  v = low > v ? low : v;
  return high < v ? high : v;
}

inline Vector from_bits(IntVector bits) { return reinterpret_cast<Vector>(bits); }
inline IntVector to_bits(Vector v) { return reinterpret_cast<IntVector>(v); }

// exp in float32: argument reduction by log(2) in two parts (Cody and Waite), then the polynomial of Cephes' expf.
inline Vector exponential(Vector v) {
  const Vector x = clamp(v, splat(-87.0f), splat(88.0f));
  const Vector shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504f + shifter;
  const Vector n = shifted - shifter;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVector exponent = (to_bits(shifted) - to_bits(shifter)) << 23;
  return from_bits(to_bits(p) + exponent);
}

// erf in float32 by two minimax polynomials, one around zero and one for the logarithm of the tail.
inline Vector error_function(Vector v) {
  const IntVector sign = to_bits(v) & INT32_MIN;
  const Vector a = from_bits(to_bits(v) & INT32_MAX);
  const Vector square = v * v;
  Vector tail = (a * -1.72853470e-5f + 3.83197126e-4f) * square + (a * -3.88396438e-3f + 2.42546219e-2f);
  tail = tail * a - 1.06777877e-1f;
  tail = tail * a - 6.34846687e-1f;
  tail = tail * a - 1.28717512e-1f;
  tail = tail * a - a;
  const Vector far = from_bits(to_bits(1.0f - exponential(tail)) | sign);
  Vector near = square * -5.96761703e-4f + 4.99119423e-3f;
  near = near * square - 2.67681349e-2f;
  near = near * square + 1.12819925e-1f;
  near = near * square - 3.76125336e-1f;
  near = near * square + 1.28379166e-1f;
  near = near * v + v;
  return a > 0.927734375f ? far : near;
}

inline __attribute__((always_inline)) Vector activate(Vector v, int64_t activation) {
  switch (activation) {
    case RELU: return 0.0f > v ? splat(0.0f) : v;
    case RELU6: return clamp(v, splat(0.0f), splat(6.0f));
    case SILU: return v / (1.0f + exponential(-v));
    case GELU: return v * 0.5f * (1.0f + error_function(v * 0.70710678f));
    case HARDSWISH: return v * clamp(v + 3.0f, splat(0.0f), splat(6.0f)) / 6.0f;
    case SIGMOID: return 1.0f / (1.0f + exponential(-v));
    case HARDSIGMOID: return clamp(v + 3.0f, splat(0.0f), splat(6.0f)) / 6.0f;
    default: return v;
  }
}

// The first `count` lanes, `count` below `LANES`; memory beyond them is neither read nor written.
inline Vector load_some(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#elif defined(__AVX__)
  alignas(64) static const int32_t SET_THEN_CLEAR[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const IntVector mask = load_lanes(SET_THEN_CLEAR + LANES - count);
  return _mm256_maskload_ps(from, reinterpret_cast<__m256i>(mask));
#else
  Vector vector{};
  for (int64_t i = 0; i < count; ++i) vector[i] = from[i];
  return vector;
#endif
}

inline void store_some(float* to, Vector vector, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), vector);
#elif defined(__AVX__)
  // By halves: a masked store takes some processors as long as a dozen others.
  __m128 half = _mm256_castps256_ps128(vector);
  if (count & 4) {
    _mm_storeu_ps(to, half);
    half = _mm256_extractf128_ps(vector, 1);
    to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), half);
    half = _mm_movehl_ps(half, half);
    to += 2;
  }
  if (count & 1) _mm_store_ss(to, half);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = vector[i];
#endif
}

// Lanes of `a`, and from `LANES` on of `b`.
inline Vector shuffle(Vector a, Vector b, IntVector index) {
#if defined(__clang__)
  Vector result;
  for (int lane = 0; lane < LANES; ++lane) result[lane] = index[lane] < LANES ? a[index[lane]] : b[index[lane] - LANES];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// `from[0]`, `from[2]` and so on; reads one value beyond the last of them.
inline Vector every_second(const float* from) {
  IntVector index;
  SECATEUR_UNROLL
  for (int lane = 0; lane < LANES; ++lane) index[lane] = 2 * lane;
  return shuffle(load(from), load(from + LANES), index);
}

// Exchanges blocks of SIZE by SIZE values across the diagonal, and then those within them.
template <int SIZE>
inline __attribute__((always_inline)) void exchange(Vector (&rows)[LANES]) {
  if constexpr (SIZE > 0) {
    IntVector upper, lower;
    SECATEUR_UNROLL
    for (int lane = 0; lane < LANES; ++lane) {
      upper[lane] = lane & SIZE ? LANES + lane - SIZE : lane;
      lower[lane] = lane & SIZE ? LANES + lane : lane + SIZE;
    }
    SECATEUR_UNROLL
    for (int row = 0; row < LANES; ++row) {
      if (row & SIZE) continue;
      const Vector a = rows[row], b = rows[row + SIZE];
      rows[row] = shuffle(a, b, upper);
      rows[row + SIZE] = shuffle(a, b, lower);
    }
    exchange<SIZE / 2>(rows);
  }
}

// `to[j * to_stride + i] = from[i * from_stride + j]` for up to LANES rows of up to LANES values.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  Vector block[LANES];
  SECATEUR_UNROLL
  for (int i = 0; i < LANES; ++i) {
    if (i < rows) block[i] = columns == LANES ? load(from + i * from_stride) : load_some(from + i * from_stride, columns);
    else block[i] = Vector{};
  }
  exchange<LANES / 2>(block);
  SECATEUR_UNROLL
  for (int j = 0; j < LANES; ++j) {
    if (j >= columns) break;
    if (rows == LANES) store(to + j * to_stride, block[j]);
    else store_some(to + j * to_stride, block[j], rows);
  }
}

inline void copy_row(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load_some(from + i, count - i), count - i);
}

// `to[i] = activate(from[i] + residual[i])` for `count` values; `residual` may be null and `to` may be `from`.
template <int64_t ACTIVATION>
inline __attribute__((always_inline)) void finish_row(const float* from, const float* residual, float* to,
                                                      int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    Vector v = load(from + i);
    if (residual) v += load(residual + i);
    store(to + i, activate(v, ACTIVATION));
  }
  if (i == count) return;
  Vector v = load_some(from + i, count - i);
  if (residual) v += load_some(residual + i, count - i);
  store_some(to + i, activate(v, ACTIVATION), count - i);
}

// The same run of values in each of `rows` rows, so that the choice of the activation is made once for all of them.
struct Rows {
  const float* from;
  const float* residual;
  float* to;
  int64_t rows, from_stride, residual_stride, stride, count;
};

template <int64_t ACTIVATION>
void finish_rows_as(const Rows& r) {
  for (int64_t row = 0; row < r.rows; ++row)
    finish_row<ACTIVATION>(r.from + row * r.from_stride, r.residual ? r.residual + row * r.residual_stride : nullptr,
                           r.to + row * r.stride, r.count);
}

inline void finish_rows(const Rows& rows, int64_t activation) {
  constexpr void (*BY_ACTIVATION[])(const Rows&) = {finish_rows_as<NONE>, finish_rows_as<RELU>, finish_rows_as<RELU6>,
                                                    finish_rows_as<SILU>, finish_rows_as<GELU>,
                                                    finish_rows_as<HARDSWISH>, finish_rows_as<SIGMOID>,
                                                    finish_rows_as<HARDSIGMOID>};
  BY_ACTIVATION[activation](rows);
}

}  // namespace
