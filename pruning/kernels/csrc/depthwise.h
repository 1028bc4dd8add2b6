// Depthwise convolutions: one channel at a time, its kernel positions against runs of pixels. Always dense.
#pragma once

#include "packing.h"

namespace {

struct Depthwise {
  const SecateurStep& step;
  Planes planes;

  explicit Depthwise(const SecateurStep& step) : step(step), planes(single(step.shape), step.x, step.out, false) {}

  static SecateurShape single(SecateurShape shape) {
    shape.in_channels = shape.out_channels = 1;
    return shape;
  }
};

template <int NV>
inline void add_positions(const float* x, const int32_t* offsets, const float* weights, int64_t positions, float bias,
                          Vector (&sums)[NV]) {
  SECATEUR_UNROLL
  for (int v = 0; v < NV; ++v) sums[v] = splat(bias);
  for (int64_t position = 0; position < positions; ++position) {
    const float* from = x + offsets[position];
    const Vector weight = splat(weights[position]);
    SECATEUR_UNROLL
    for (int v = 0; v < NV; ++v) sums[v] += load(from + v * LANES) * weight;
  }
}

// A whole map, rows `pitch` apart on both sides.
template <int NV>
inline void store_positions(const float* x, const SecateurStep& s, int64_t channel, int64_t at, const int32_t* lanes,
                            float* to) {
  const int64_t positions = s.shape.kernel_h * s.shape.kernel_w;
  Vector sums[NV];
  add_positions<NV>(x + at, s.weight.offsets, s.weight.values + channel * positions, positions,
                    s.epilogue.bias ? s.epilogue.bias[channel] : 0.0f, sums);
  const bool is_clamp = s.epilogue.activation <= RELU6;
  const Vector low = splat(is_clamp && s.epilogue.activation != NONE ? 0.0f : -__builtin_inff());
  const Vector high = splat(s.epilogue.activation == RELU6 ? 6.0f : __builtin_inff());
  SECATEUR_UNROLL
  for (int v = 0; v < NV; ++v) {
    Vector total = clamp(sums[v], low, high);
    if (lanes) total = from_bits(to_bits(total) & load_lanes(lanes + at + v * LANES));
    store(to + at + v * LANES, total);
  }
}

inline bool run_depthwise(const Depthwise& d, int64_t image, int64_t channel) {
  static thread_local Workspace packed, sums;
  const SecateurStep& step = d.step;
  const SecateurShape& s = step.shape;
  const float* x = nullptr;
  const SecateurView in_view = step.x;
  if (d.planes.in_place) x = d.planes.origin(s, in_view, image) + channel * in_view.channel;
  else {
    float* buffer = packed.reserve(d.planes.channel_stride + 8 * LANES + s.padding_w);
    if (!buffer) return false;
    pack(s, d.planes, in_view, in_view.data + image * in_view.image + channel * in_view.channel, 1, 0, buffer);
    x = buffer;
  }
  float* out = step.out.data + image * step.out.image + channel * step.out.channel;
  const int64_t pixels = (s.out_height - 1) * d.planes.pitch + s.out_width;
  const bool is_home = d.planes.pitch == step.out.row && step.out.has_slack;
  float* to = is_home ? out : sums.reserve(pixels + LANES);
  if (!to) return false;
  const int32_t* lanes = is_home ? step.out.lanes : nullptr;
  int64_t at = 0;
  for (; at + 3 * LANES < pixels; at += 4 * LANES) store_positions<4>(x, step, channel, at, lanes, to);
  for (; at < pixels; at += LANES) store_positions<1>(x, step, channel, at, lanes, to);
  if (!is_home || step.epilogue.activation > RELU6) {
    const Rows rows{to, nullptr, out, s.out_height, d.planes.pitch, 0, step.out.row, s.out_width};
    finish_rows(rows, step.epilogue.activation);
  }
  fill_border(step.out, s.out_height, s.out_width, out, 1, true, true, !is_home);
  return true;
}

}  // namespace
