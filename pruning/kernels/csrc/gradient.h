// The gradient of the non-zero weights: for each one, the product of its pixels and its row's gradient, summed.
#pragma once

#include <cstring>

#include "packing.h"

namespace {

inline float sum_lanes(Vector vector) {
  float lanes[LANES];
  memcpy(lanes, &vector, sizeof lanes);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Adds the products of one run of pixels with R rows of gradients to `out`. Few rows take several sums each, because
// one sum waits for its last addition.
template <int R>
void add_products(const float* x, const float* const* rows, int64_t pixels, float* out) {
  constexpr int SUMS = R == 1 ? 4 : R == 4 ? 1 : 2;
  Vector sums[R][SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS * LANES <= pixels; i += SUMS * LANES) {
    SECATEUR_UNROLL
    for (int s = 0; s < SUMS; ++s) {
      Vector values = load(x + i + s * LANES);
      SECATEUR_KEEP(values);
      SECATEUR_UNROLL
      for (int r = 0; r < R; ++r) sums[r][s] += values * load(rows[r] + i + s * LANES);
    }
  }
  for (; i < pixels; i += LANES) {
    const bool is_whole = i + LANES <= pixels;
    const Vector values = is_whole ? load(x + i) : load_some(x + i, pixels - i);
    SECATEUR_UNROLL
    for (int r = 0; r < R; ++r)
      sums[r][0] += values * (is_whole ? load(rows[r] + i) : load_some(rows[r] + i, pixels - i));
  }
  for (int r = 0; r < R; ++r) {
    Vector total = sums[r][0];
    for (int s = 1; s < SUMS; ++s) total += sums[r][s];
    out[r] += sum_lanes(total);
  }
}

using AddProducts = void (*)(const float*, const float* const*, int64_t, float*);
constexpr AddProducts ADD_PRODUCTS[] = {add_products<1>, add_products<2>, add_products<3>, add_products<4>};

struct Gradient {
  const SecateurShape& shape;
  const SecateurWeight& weight;
  const float* x;
  const float* grad_out;
  float* grad_values;
  Planes planes;
  int64_t parts;
  bool failed;
};

// `gradient` holds the rows of the group, `row_floats` apart, laid out as the planes are.
inline void add_block_group(const Gradient& g, int64_t entry, const float* planes, const float* gradient,
                            int64_t row_floats, int64_t pixels) {
  const SecateurWeight& w = g.weight;
  float* out = g.grad_values + w.value_start[entry];
  for (int64_t column = w.column_start[entry]; column < w.column_start[entry + 1]; ++column, out += w.block) {
    for (int64_t row = 0; row < w.block; row += 4) {
      const float* rows[4];
      for (int64_t r = 0; r < 4; ++r) rows[r] = gradient + (row + r) * row_floats;
      add_products<4>(planes + w.offsets[column], rows, pixels, out + row);
    }
  }
}

inline void add_pattern_group(const Gradient& g, int64_t entry, const float* planes, const float* gradient,
                              int64_t row_floats, int64_t pixels) {
  const SecateurWeight& w = g.weight;
  float* out = g.grad_values + w.value_start[entry];
  const int32_t* offset = w.offsets + w.column_start[entry];
  for (int pattern = 1; pattern < PATTERNS; ++pattern) {
    const float* rows[ROWS];
    int count = 0;
    for (int row = 0; row < ROWS; ++row)
      if (pattern >> row & 1) rows[count++] = gradient + row * row_floats;
    for (int32_t left = w.counts[entry * PATTERNS + pattern]; left > 0; --left, ++offset, out += count)
      ADD_PRODUCTS[count - 1](planes + *offset, rows, pixels, out);
  }
}

// The part's groups, over all images; no two parts share a value.
inline bool run_gradient_part(const Gradient& g, int64_t part) {
  static thread_local Workspace packed, gradient;
  const SecateurShape& s = g.shape;
  const SecateurWeight& w = g.weight;
  const int64_t group_rows = w.block == 1 ? ROWS : w.block;
  const int64_t first_group = w.groups * part / g.parts, last_group = w.groups * (part + 1) / g.parts;
  const int64_t row_floats = divide_up(g.planes.strip_rows * g.planes.pitch, LANES) * LANES;
  float* rows = gradient.reserve(group_rows * row_floats);
  float* buffer = g.planes.in_place ? nullptr : packed.reserve(g.planes.floats(s));
  if (!rows || (!buffer && !g.planes.in_place)) return false;
  const RowCut cut(s.out_width, 0, 1, g.planes.pitch);
  const int64_t strips = g.planes.strips(s);
  for (int64_t unit = 0; unit < s.batch * strips; ++unit) {
    const int64_t image = unit / strips, first_row = unit % strips * g.planes.strip_rows;
    const float* input = g.x + image * s.in_channels * s.height * s.width;
    if (buffer) pack(s, g.planes, input_of(s, input), input, s.in_channels, first_row, buffer);
    const int64_t strip_rows = smaller(g.planes.strip_rows, s.out_height - first_row);
    const int64_t pixels = (strip_rows - 1) * g.planes.pitch + s.out_width;
    for (int64_t group = first_group; group < last_group; ++group) {
      for (int64_t row = 0; row < smaller(group_rows, s.out_channels - group * group_rows); ++row) {
        const int64_t channel = image * s.out_channels + group * group_rows + row;
        const float* from = g.grad_out + (channel * s.out_height + first_row) * s.out_width;
        for (int64_t i = 0; i < strip_rows; ++i)
          cut.pack(from + i * s.out_width, rows + row * row_floats + i * g.planes.pitch);
      }
      for (int64_t chunk = 0; chunk < w.chunks; ++chunk)
        (w.block == 1 ? add_pattern_group : add_block_group)(g, chunk * w.groups + group, buffer ? buffer : input,
                                                             rows, row_floats, pixels);
    }
  }
  return true;
}

int values_grad(const SecateurShape& shape, const SecateurWeight& weight, const float* x, const float* grad_out,
                float* grad_values, const Threads& threads) {
  Gradient g{shape, weight, x, grad_out, grad_values, Planes(shape), smaller(weight.groups, threads.count), false};
  memset(grad_values, 0, weight.value_start[weight.groups * weight.chunks] * sizeof(float));
  const auto range = [](int64_t begin, int64_t end, void* context) {
    Gradient& g = *static_cast<Gradient*>(context);
    for (int64_t part = begin; part < end; ++part)
      if (!run_gradient_part(g, part)) __atomic_store_n(&g.failed, true, __ATOMIC_RELAXED);
  };
  const int status = threads.parallel_for(g.parts, range, &g);
  return status != 0 || g.failed;
}

}  // namespace
