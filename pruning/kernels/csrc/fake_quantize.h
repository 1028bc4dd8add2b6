// Masking and fake quantization of a weight in one pass over it.
#pragma once

#include <cstring>

#include "simd.h"

namespace {

typedef uint8_t ByteVector __attribute__((vector_size(LANES)));

struct FakeQuantize {
  int64_t row_size;
  const float* weight;
  const uint8_t* mask;
  const float* scale;
  float lowest, highest;
  float* out;
  uint8_t* is_inside;
};

inline void quantize_lanes(const FakeQuantize& q, Vector weight, ByteVector mask, float scale, Vector& out,
                           ByteVector& is_inside) {
  const Vector shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
  // One step beyond the range is enough to see that a value left it, and keeps the rounding exact.
  const Vector level = clamp(weight * (1.0f / scale), splat(q.lowest - 1.0f), splat(q.highest + 1.0f));
  const Vector rounded = (level + shifter) - shifter;
  const IntVector kept = __builtin_convertvector(mask, IntVector) != 0;
  const IntVector inside = kept & (rounded >= q.lowest) & (rounded <= q.highest);
  const Vector quantized = clamp(rounded, splat(q.lowest), splat(q.highest)) * scale;
  out = from_bits(to_bits(quantized) & kept);
  is_inside = __builtin_convertvector(inside & 1, ByteVector);
}

inline void quantize_row(const FakeQuantize& q, int64_t row) {
  const int64_t start = row * q.row_size;
  for (int64_t i = 0; i < q.row_size; i += LANES) {
    const int64_t at = start + i, count = smaller(LANES, q.row_size - i);
    ByteVector mask{}, is_inside;
    Vector weight{}, out;
    memcpy(&mask, q.mask + at, count);
    memcpy(&weight, q.weight + at, count * sizeof(float));
    quantize_lanes(q, weight, mask, q.scale[row], out, is_inside);
    memcpy(q.out + at, &out, count * sizeof(float));
    memcpy(q.is_inside + at, &is_inside, count);
  }
}

int mask_fake_quantize(int64_t rows, int64_t row_size, const float* weight, const uint8_t* mask, const float* scale,
                       float lowest, float highest, float* out, uint8_t* is_inside, const Threads& threads) {
  FakeQuantize q{row_size, weight, mask, scale, lowest, highest, out, is_inside};
  const auto range = [](int64_t begin, int64_t end, void* context) {
    for (int64_t row = begin; row < end; ++row) quantize_row(*static_cast<FakeQuantize*>(context), row);
  };
  return threads.parallel_for(rows, range, &q);
}

}  // namespace
