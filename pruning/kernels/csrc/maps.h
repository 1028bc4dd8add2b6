// What runs on one map (one channel of one image) at a time: pooling, sums, copies.
#pragma once

#include "packing.h"

namespace {

inline float* map_of(const SecateurView& view, int64_t image, int64_t channel) {
  return view.data + image * view.image + channel * view.channel;
}

// Where a window begins and ends along one dimension, cut to the input.
struct Window {
  int64_t begin, end, places;

  static Window sliding(int64_t index, int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    const int64_t begin = index * stride - padding, end = smaller(begin + kernel, size + padding);
    return {larger(begin, 0), smaller(end, size), end - begin};
  }

  static Window adaptive(int64_t index, int64_t size, int64_t count) {
    const int64_t begin = index * size / count, end = divide_up((index + 1) * size, count);
    return {begin, end, end - begin};
  }
};

// Largest values of `rows` rows, column by column; `size` columns behind `padding` ones that never win.
inline void largest_of_rows(const SecateurStep& step, const float* x, const Window& rows, float* largest) {
  const int64_t width = step.shape.width;
  for (int64_t column = 0; column < width; column += LANES) {
    const int64_t count = width - column;
    Vector total = splat(-__builtin_inff());
    for (int64_t row = rows.begin; row < rows.end; row += step.shape.dilation_h) {
      const float* from = x + row * step.x.row + column;
      const Vector value = count < LANES ? load_some(from, count) : load(from);
      total = (total != total) | (total > value) ? total : value;
    }
    store(largest + column, total);
  }
}

// Windows along one row; STRIDE is 0 if it is neither 1 nor 2.
template <int STRIDE>
inline void largest_in_row(const SecateurStep& step, const float* from, float* to) {
  const SecateurShape& s = step.shape;
  for (int64_t j = 0; j < s.out_width; j += LANES) {
    Vector total = splat(-__builtin_inff());
    for (int64_t k = 0; k < s.kernel_w; ++k) {
      const float* at = from + j * s.stride_w + k * s.dilation_w;
      Vector value{};
      if constexpr (STRIDE == 1) value = load(at);
      else if constexpr (STRIDE == 2) value = every_second(at);
      else
        for (int64_t lane = 0; lane < smaller(LANES, s.out_width - j); ++lane) value[lane] = at[lane * s.stride_w];
      total = (total != total) | (total > value) ? total : value;  // NaN stays, as in PyTorch
    }
    if (s.out_width - j < LANES) store_some(to + j, total, s.out_width - j);
    else store(to + j, total);
  }
}

inline bool max_pool_map(const SecateurStep& step, const float* x, float* out) {
  static thread_local Workspace workspace;
  const SecateurShape& s = step.shape;
  const int64_t left = divide_up(s.padding_w, LANES) * LANES, reach = s.out_width * s.stride_w + s.kernel_w * s.dilation_w;
  const int64_t floats = left + divide_up(larger(s.width, reach), LANES) * LANES + 4 * LANES;
  float* row = workspace.reserve(floats);
  if (!row) return false;
  const Vector lowest = splat(-__builtin_inff());
  for (int64_t i = 0; i < floats; i += LANES) store(row + i, lowest);
  for (int64_t i = 0; i < s.out_height; ++i) {
    const int64_t start = i * s.stride_h - s.padding_h;
    const int64_t skipped = start < 0 ? divide_up(-start, s.dilation_h) * s.dilation_h : 0;
    const int64_t end = smaller(start + (s.kernel_h - 1) * s.dilation_h + 1, s.height);
    largest_of_rows(step, x, {start + skipped, end, 0}, row + left);
    // Behind the last column of a vector cut short lie zeros.
    for (int64_t j = s.width; j < divide_up(s.width, LANES) * LANES; ++j) row[left + j] = -__builtin_inff();
    const float* from = row + left - s.padding_w;
    float* to = out + i * step.out.row;
    if (s.stride_w == 1) largest_in_row<1>(step, from, to);
    else if (s.stride_w == 2) largest_in_row<2>(step, from, to);
    else largest_in_row<0>(step, from, to);
  }
  return true;
}

inline float sum_of_run(const float* x, int64_t count) {
  Vector total{};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) total += load(x + i);
  if (i < count) total += load_some(x + i, count - i);
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) sum += total[lane];
  return sum;
}

inline void average_pool_map(const SecateurStep& step, const float* x, float* out) {
  const SecateurShape& s = step.shape;
  const bool is_adaptive = step.kind == ADAPTIVE_POOL;
  for (int64_t i = 0; i < s.out_height; ++i) {
    const Window rows = is_adaptive ? Window::adaptive(i, s.height, s.out_height)
                                    : Window::sliding(i, s.height, s.kernel_h, s.stride_h, s.padding_h);
    for (int64_t j = 0; j < s.out_width; ++j) {
      const Window columns = is_adaptive ? Window::adaptive(j, s.width, s.out_width)
                                         : Window::sliding(j, s.width, s.kernel_w, s.stride_w, s.padding_w);
      float sum = 0.0f;
      for (int64_t row = rows.begin; row < rows.end; ++row)
        sum += sum_of_run(x + row * step.x.row + columns.begin, columns.end - columns.begin);
      const int64_t count = step.kind == PADDED_AVERAGE_POOL
                                ? rows.places * columns.places
                                : (rows.end - rows.begin) * (columns.end - columns.begin);
      out[i * step.out.row + j] = sum / static_cast<float>(count);
    }
  }
}

inline void scale_map(const SecateurStep& step, const float* x, float factor, float* out) {
  const SecateurShape& s = step.shape;
  for (int64_t i = 0; i < s.out_height; ++i) {
    const float* from = x + i * step.x.row;
    float* to = out + i * step.out.row;
    for (int64_t j = 0; j < s.out_width; ++j) to[j] = from[j] * factor;
  }
}

inline void copy_map(const SecateurStep& step, int64_t image, int64_t channel, float* out) {
  const SecateurShape& s = step.shape;
  const int64_t source = channel - step.first_channel;
  const bool is_filled = source >= 0 && source < s.in_channels;
  const float* x = is_filled ? map_of(step.x, image, source) : nullptr;
  for (int64_t i = 0; i < s.out_height; ++i) {
    float* to = out + i * step.out.row;
    const int64_t row = i - s.padding_h;
    if (!is_filled || row < 0 || row >= s.height) {
      fill_zero(to, s.out_width);
      continue;
    }
    const float* from = x + row * step.x.row;
    const int64_t count = smaller(s.width, s.out_width - s.padding_w);
    fill_zero(to, s.padding_w);
    if (step.x.column == 1) copy_row(from, to + s.padding_w, count);
    else
      for (int64_t j = 0; j < count; ++j) to[s.padding_w + j] = from[j * step.x.column];
    fill_zero(to + s.padding_w + count, s.out_width - s.padding_w - count);
  }
}

// False if memory ran out.
inline bool run_map(const SecateurStep& step, int64_t image, int64_t channel) {
  const SecateurShape& s = step.shape;
  float* out = map_of(step.out, image, channel);
  switch (step.kind) {
    case MAX_POOL:
      if (!max_pool_map(step, map_of(step.x, image, channel), out)) return false;
      break;
    case ADD: {
      const float* residual = step.residual.data ? map_of(step.residual, image, channel) : nullptr;
      const float* x = map_of(step.x, image, channel);
      for (int64_t i = 0; i < s.out_height; ++i)
        finish_rows({x + i * step.x.row, residual ? residual + i * step.residual.row : nullptr, out + i * step.out.row,
                     1, 0, 0, 0, s.out_width},
                    step.epilogue.activation);
      break;
    }
    case SCALE:
      scale_map(step, map_of(step.x, image, channel), *map_of(step.residual, image, channel), out);
      break;
    case COPY: copy_map(step, image, channel, out); break;
    default: average_pool_map(step, map_of(step.x, image, channel), out);
  }
  fill_border(step.out, s.out_height, s.out_width, out, 1, true, true, true);
  return true;
}

}  // namespace
