// The gradient of the non-zero weights: for each one, the product of its pixels and its row's gradient, summed.
#pragma once

#include <cstring>

#include "packing.h"

namespace {

constexpr int64_t RUN_FLOATS = 768;

template <int COUNT>
inline __attribute__((always_inline)) float sum_lanes(Vector vector) {
  if constexpr (COUNT == 1) return vector[0];
  else {
    IntVector index;
    SECATEUR_UNROLL
    for (int lane = 0; lane < LANES; ++lane) index[lane] = (lane + COUNT / 2) % LANES;
    return sum_lanes<COUNT / 2>(vector + shuffle(vector, vector, index));
  }
}

// Adds the products of a run of pixels with those of R rows of gradients to `out`. Few rows take several sums each,
// because one sum waits for its last addition.
template <int R>
void add_products(const float* x, const float* const* rows, int64_t pixels, float* out) {
  constexpr int SUMS = R == 1 ? 4 : R == 8 ? 1 : 2;
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
    out[r] += sum_lanes<LANES>(total);
  }
}

using AddProducts = void (*)(const float*, const float* const*, int64_t, float*);
constexpr AddProducts ADD_PRODUCTS[] = {add_products<1>, add_products<2>, add_products<3>, add_products<4>};

// Several small maps follow each other in the planes, since adding up lanes costs more than the products of one of them:
// as many as stay in the first-level cache with the rows of their gradients, and in the second with all channels.
inline Planes gradient_planes(const SecateurShape& s) {
  Planes planes(s);
  if (planes.in_place || planes.strips(s) > 1) return planes;
  const int64_t phases = planes.phases_h * planes.phases_w, channels = larger(s.in_channels * phases, s.out_channels);
  planes.hold(larger(1, smaller(s.batch, smaller(RUN_FLOATS, STRIP_FLOATS / channels) / planes.plane)));
  return planes;
}

struct Gradient {
  const SecateurShape& shape;
  const SecateurWeight& weight;
  SecateurView x, grad_out;
  float* grad_values;
  Planes planes;
  int64_t parts;
  bool failed;
};

// `gradient` holds the rows of the group, `row_floats` apart, laid out as the planes are.
inline void add_block_group(const Gradient& g, int64_t entry, const float* planes, const float* gradient,
                            int64_t row_floats, int64_t pixels) {
  const SecateurWeight& w = g.weight;
  const int64_t together = smaller(w.block, 8);
  const AddProducts add = together == 8 ? add_products<8> : add_products<4>;
  float* out = g.grad_values + w.value_start[entry];
  for (int64_t column = w.column_start[entry]; column < w.column_start[entry + 1]; ++column, out += w.block) {
    for (int64_t row = 0; row < w.block; row += together) {
      const float* rows[8];
      for (int64_t r = 0; r < together; ++r) rows[r] = gradient + (row + r) * row_floats;
      add(planes + w.offsets[column], rows, pixels, out + row);
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
  const Planes& planes = g.planes;
  const int64_t group_rows = w.block == 1 ? ROWS : w.block, strips = planes.strips(s);
  const int64_t first_group = w.groups * part / g.parts, last_group = w.groups * (part + 1) / g.parts;
  const int64_t first_channel = first_group * group_rows, rows = (last_group - first_group) * group_rows;
  const int64_t channels = smaller(rows, s.out_channels - first_channel);
  const int64_t row_floats = divide_up(planes.images * planes.plane, LANES) * LANES;
  float* grads = gradient.reserve(rows * row_floats);
  float* buffer = planes.in_place ? nullptr : packed.reserve(planes.floats(s));
  if (!grads || (!buffer && !planes.in_place)) return false;
  const RowCut cut(s.out_width, 0, 1, planes.pitch);
  for (int64_t unit = 0; unit < s.batch * strips; unit += planes.images) {
    const int64_t first_image = unit / strips, first_row = unit % strips * planes.strip_rows;
    const int64_t images = smaller(planes.images, s.batch - first_image);
    const int64_t strip_rows = smaller(planes.strip_rows, s.out_height - first_row);
    const float* input = g.x.data + first_image * g.x.image;
    const float* from = g.grad_out.data + first_image * g.grad_out.image + first_channel * g.grad_out.channel +
                        first_row * g.grad_out.row;
    for (int64_t image = 0; image < images; ++image) {
      const int64_t at = image * planes.plane, floats = strip_rows * planes.pitch;
      if (buffer) pack(s, planes, g.x, input + image * g.x.image, s.in_channels, first_row, buffer + at);
      for (int64_t i = 0; i < strip_rows; ++i)
        cut.pack(from + image * g.grad_out.image + i * g.grad_out.row, g.grad_out, channels,
                 grads + at + i * planes.pitch, row_floats);
      for (int64_t channel = 0; channel < channels && image + 1 < images; ++channel)
        fill_zero(grads + channel * row_floats + at + floats, planes.plane - floats);
    }
    const int64_t pixels = (images - 1) * planes.plane + (strip_rows - 1) * planes.pitch + s.out_width;
    for (int64_t group = first_group; group < last_group; ++group)
      for (int64_t chunk = 0; chunk < w.chunks; ++chunk)
        (w.block == 1 ? add_pattern_group : add_block_group)(g, chunk * w.groups + group, buffer ? buffer : input,
                                                             grads + (group - first_group) * group_rows * row_floats,
                                                             row_floats, pixels);
  }
  return true;
}

int values_grad(const SecateurShape& shape, const SecateurWeight& weight, const float* x, const float* grad_out,
                float* grad_values, const Threads& threads) {
  Gradient g{shape,       weight,        input_of(shape, x),                    output_of(shape, grad_out),
             grad_values, gradient_planes(shape), smaller(weight.groups, threads.count), false};
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
