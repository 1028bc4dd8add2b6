// A linear layer on few rows of input, where the pixels of the convolution would leave most lanes empty: here the lanes
// are the output features of a block. (Many rows go through the convolution, as the pixels of a 1x1 layer.)
#pragma once

#include <cstring>

#include "simd.h"

namespace {

// `weight.offsets` are the column indices themselves.
struct Linear {
  int64_t batch, out_features;
  int64_t x_stride, residual_stride, out_stride;  // from one row to the next
  const SecateurWeight& weight;
  const SecateurEpilogue& epilogue;
  const float* x;
  const float* residual;
  float* out;
};

// Four columns at a time have sums of their own: one sum alone would wait for its last addition.
template <int B>
void add_block_columns(const SecateurWeight& w, int64_t entry, const float* x, float* out) {
  typedef float Block __attribute__((vector_size(B * 4)));
  const int32_t* columns = w.offsets + w.column_start[entry];
  const float* values = w.values + w.value_start[entry];
  const int64_t count = w.column_start[entry + 1] - w.column_start[entry];
  Block sums[4] = {}, weight;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    SECATEUR_UNROLL
    for (int s = 0; s < 4; ++s) {
      memcpy(&weight, values + (i + s) * B, sizeof weight);
      sums[s] += weight * x[columns[i + s]];
    }
  }
  for (; i < count; ++i) {
    memcpy(&weight, values + i * B, sizeof weight);
    sums[0] += weight * x[columns[i]];
  }
  Block total;
  memcpy(&total, out, sizeof total);
  total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  memcpy(out, &total, sizeof total);
}

template <int PATTERN>
void add_pattern_columns(const int32_t* columns, const float* values, const int32_t* counts, const float* x,
                         float* out) {
  if constexpr (PATTERN < PATTERNS) {
    constexpr int WEIGHTS = __builtin_popcount(PATTERN);
    float sums[4][WEIGHTS] = {};
    const int64_t count = counts[PATTERN];
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      SECATEUR_UNROLL
      for (int s = 0; s < 4; ++s)
        for (int weight = 0; weight < WEIGHTS; ++weight)
          sums[s][weight] += values[(i + s) * WEIGHTS + weight] * x[columns[i + s]];
    }
    for (; i < count; ++i)
      for (int weight = 0; weight < WEIGHTS; ++weight) sums[0][weight] += values[i * WEIGHTS + weight] * x[columns[i]];
    int weight = 0;
    for (int row = 0; row < ROWS; ++row) {
      if (!(PATTERN >> row & 1)) continue;
      out[row] += (sums[0][weight] + sums[1][weight]) + (sums[2][weight] + sums[3][weight]);
      ++weight;
    }
    add_pattern_columns<PATTERN + 1>(columns + count, values + count * WEIGHTS, counts, x, out);
  }
}

inline void run_linear_group(const Linear& linear, int64_t group) {
  const SecateurWeight& w = linear.weight;
  const int64_t group_rows = w.block == 1 ? ROWS : w.block;
  const int64_t feature = group * group_rows, rows = smaller(group_rows, linear.out_features - feature);
  for (int64_t image = 0; image < linear.batch; ++image) {
    const float* x = linear.x + image * linear.x_stride;
    float sums[16] = {};
    if (linear.epilogue.bias)
      for (int64_t row = 0; row < rows; ++row) sums[row] = linear.epilogue.bias[feature + row];
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      const int64_t entry = chunk * w.groups + group;
      switch (w.block) {
        case 4: add_block_columns<4>(w, entry, x, sums); break;
        case 8: add_block_columns<8>(w, entry, x, sums); break;
        case 16: add_block_columns<16>(w, entry, x, sums); break;
        default:
          add_pattern_columns<1>(w.offsets + w.column_start[entry], w.values + w.value_start[entry],
                                 w.counts + entry * PATTERNS, x, sums);
      }
    }
    const float* residual = linear.residual ? linear.residual + image * linear.residual_stride + feature : nullptr;
    float* out = linear.out + image * linear.out_stride + feature;
    finish_rows({sums, residual, out, 1, rows, rows, rows, rows}, linear.epilogue.activation);
  }
}

int linear_rows(int64_t batch, int64_t in_features, int64_t out_features, const SecateurWeight& weight,
                const SecateurEpilogue& epilogue, const float* x, float* out, const Threads& threads) {
  Linear linear{batch, out_features, in_features, out_features, out_features, weight, epilogue, x, epilogue.residual, out};
  const auto range = [](int64_t begin, int64_t end, void* context) {
    for (int64_t group = begin; group < end; ++group) run_linear_group(*static_cast<Linear*>(context), group);
  };
  return threads.parallel_for(weight.groups, range, &linear);
}

}  // namespace
