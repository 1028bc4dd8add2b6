// Where the activations lie while a layer runs, and how they get there.
//
// A strip of output rows reads its input from planes in which row, column and kernel position only add up: the output
// pixel (i, j) lies at `i * pitch + j`, and a kernel position is one constant offset from it, so that a run of vectors
// over consecutive pixels needs no look at where a row ends. Padding is zeros in the planes; right padding is the left
// padding of the next row. A stride of s has s planes a channel, one for each remainder. What is computed for the
// columns between `out_width` and `pitch` is not stored.
#pragma once

#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace {

// Packed input of one strip stays in the second-level cache beside the weights.
constexpr int64_t STRIP_FLOATS = 80 * 1024;

// The view of a whole tensor; one whose channels lie beside each other has as many columns between its pixels.
inline SecateurView view_of(const SecateurShape& s, const float* data, int64_t channels, int64_t height,
                            int64_t width) {
  const int64_t image = channels * height * width;
  if (s.channels_last) return {const_cast<float*>(data), image, 1, width * channels, channels, 0, 0, false, nullptr};
  return {const_cast<float*>(data), image, height * width, width, 1, 0, 0, false, nullptr};
}

inline SecateurView input_of(const SecateurShape& s, const float* x) {
  return view_of(s, x, s.in_channels, s.height, s.width);
}

inline SecateurView output_of(const SecateurShape& s, const float* out) {
  return view_of(s, out, s.out_channels, s.out_height, s.out_width);
}

struct Planes {
  bool in_place;  // the input is read where it lies
  int64_t phases_h, phases_w, pitch, strip_rows, plane, channel_stride;
  int64_t images = 1;  // that follow each other in every phase of a channel, `plane` apart

  explicit Planes(const SecateurShape& s) : Planes(s, input_of(s, nullptr), output_of(s, nullptr)) {}

  // For one strip of any length, if it `has_strips` no more; such a reader also reads beyond the last pixel.
  Planes(const SecateurShape& s, const SecateurView& x, const SecateurView& out, bool has_strips = true) {
    const bool is_dense = s.kernel_h == 1 && s.kernel_w == 1 && s.height * s.width >= LANES;
    const bool has_room = x.has_slack || (has_strips && is_dense);
    in_place = s.stride_h == 1 && s.stride_w == 1 && s.padding_h <= x.border_h && s.padding_w <= x.border_w &&
               x.row >= s.out_width && x.column == 1 && has_room;
    strip_rows = s.out_height;
    if (in_place) {
      phases_h = phases_w = 1;
      pitch = x.row;
      plane = channel_stride = x.channel;
      return;
    }
    const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h, reach_w = (s.kernel_w - 1) * s.dilation_w;
    phases_h = smaller(s.stride_h, reach_h + 1);
    phases_w = smaller(s.stride_w, reach_w + 1);
    pitch = s.stride_w == 1 ? larger(s.out_width, s.width + s.padding_w) : s.out_width + reach_w / s.stride_w;
    // Rows as far apart as those of the output let sums be stored without a look at where a row ends.
    if (out.has_slack) pitch = larger(pitch, out.row);
    const int64_t row = s.in_channels * phases_h * phases_w * pitch;
    const int64_t strips = has_strips ? smaller(s.out_height, divide_up(s.out_height * row, STRIP_FLOATS)) : 1;
    cut(s, divide_up(s.out_height, larger(strips, 1)));
  }

  // Makes strips of so many output rows, if the input is not read in place.
  void cut(const SecateurShape& s, int64_t rows) {
    strip_rows = rows;
    const int64_t tail = s.stride_w == 1 ? s.padding_w : 0;
    plane = (strip_rows + (s.kernel_h - 1) * s.dilation_h / s.stride_h) * pitch + tail;
    hold(1);
  }

  // Makes room for so many images, if the input is not read in place.
  void hold(int64_t count) {
    images = count;
    channel_stride = divide_up(phases_h * phases_w * count * plane, LANES) * LANES;
    // Channels a multiple of 4 KiB apart would all fall into the same few sets of the first-level cache.
    if (channel_stride % 1024 == 0) channel_stride += LANES;
  }

  // Where the offsets count from, if the input is read in place.
  const float* origin(const SecateurShape& s, const SecateurView& x, int64_t image) const {
    return x.data + image * x.image - s.padding_h * x.row - s.padding_w;
  }

  int64_t offset(const SecateurShape& s, int64_t column) const {
    const int64_t kw = column % s.kernel_w * s.dilation_w;
    const int64_t kh = column / s.kernel_w % s.kernel_h * s.dilation_h;
    const int64_t channel = column / (s.kernel_w * s.kernel_h);
    const int64_t phase = kh % s.stride_h * phases_w + kw % s.stride_w;
    return channel * channel_stride + phase * images * plane + kh / s.stride_h * pitch + kw / s.stride_w;
  }

  int64_t strips(const SecateurShape& s) const { return divide_up(s.out_height, strip_rows); }
  // The last vector of a tile reads on beyond the last pixel.
  int64_t floats(const SecateurShape& s) const { return s.in_channels * channel_stride + 8 * LANES + s.padding_w; }
};

// Aligned memory of one thread; it grows and is kept for the next layer.
struct Workspace {
  float* data = nullptr;
  int64_t size = 0;

  ~Workspace() { free(data); }

  float* reserve(int64_t floats) {
    if (floats <= size) return data;
    free(data);
    size = divide_up(floats, 1024) * 1024;
    data = static_cast<float*>(aligned_alloc(64, size * sizeof(float)));
    if (data) memset(data, 0, size * sizeof(float));
    else size = 0;
    return data;
  }
};

inline void fill_zero(float* to, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, Vector{});
  if (i < count) store_some(to + i, Vector{}, count - i);
}

// Which values of an input row go into a row of a plane, and where: every `stride`-th one, between zeros.
struct RowCut {
  int64_t begin, end, first, stride, count;

  // Divisions are slow: one cut serves all the rows of a phase.
  RowCut(int64_t width, int64_t start, int64_t stride, int64_t count) : stride(stride), count(count) {
    begin = smaller(count, start < 0 ? divide_up(-start, stride) : 0);
    end = larger(begin, smaller(count, start < width ? divide_up(width - start, stride) : 0));
    first = start + begin * stride;
  }

  // The same row of several channels, which `view` says where to find.
  void pack(const float* from, const SecateurView& view, int64_t channels, float* to, int64_t channel_stride) const {
    if (view.channel == 1) pack_pixels(from, view.column, channels, to, channel_stride);
    for (int64_t channel = 0; channel < channels; ++channel, to += channel_stride) {
      fill_zero(to, begin);
      if (view.channel != 1) pack_channel(from + channel * view.channel, to);
      fill_zero(to + end, count - end);
    }
  }

  void pack_channel(const float* from, float* to) const {
    if (stride == 1) copy_row(from + first, to + begin, end - begin);
    else if (stride == 2) {
      int64_t i = begin;
      // Fewer than are left, so that nothing beyond the last value is read.
      for (; i + LANES < end; i += LANES) store(to + i, every_second(from + first + 2 * (i - begin)));
      for (; i < end; ++i) to[i] = from[first + 2 * (i - begin)];
    } else
      for (int64_t i = begin; i < end; ++i) to[i] = from[first + stride * (i - begin)];
  }

  void pack_pixels(const float* from, int64_t column, int64_t channels, float* to, int64_t channel_stride) const {
    from += first * column;
    for (int64_t channel = 0; channel < channels; channel += LANES)
      for (int64_t i = begin; i < end; i += LANES)
        transpose(from + (i - begin) * stride * column + channel, stride * column, smaller(LANES, end - i),
                  smaller(LANES, channels - channel), to + channel * channel_stride + i, channel_stride);
  }
};

// The planes of `channels` channels from `x` on, for the strip that starts at output row `first_row`.
inline void pack(const SecateurShape& s, const Planes& planes, const SecateurView& view, const float* x,
                 int64_t channels, int64_t first_row, float* packed) {
  const int64_t rows = planes.strip_rows + (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  const int64_t tail = planes.plane - rows * planes.pitch;
  const int64_t together = view.channel == 1 ? LANES : 1;
  for (int64_t phase_w = 0; phase_w < planes.phases_w; ++phase_w) {
    const RowCut cut(s.width, phase_w - s.padding_w, s.stride_w, planes.pitch);
    for (int64_t channel = 0; channel < channels; channel += together) {
      const int64_t count = smaller(together, channels - channel);
      for (int64_t phase_h = 0; phase_h < planes.phases_h; ++phase_h) {
        float* to = packed + channel * planes.channel_stride + (phase_h * planes.phases_w + phase_w) * planes.images * planes.plane;
        for (int64_t i = 0; i < rows; ++i, to += planes.pitch) {
          const int64_t row = (first_row + i) * s.stride_h + phase_h - s.padding_h;
          const bool is_inside = row >= 0 && row < s.height;
          if (is_inside) cut.pack(x + channel * view.channel + row * view.row, view, count, to, planes.channel_stride);
          for (int64_t c = 0; !is_inside && c < count; ++c) fill_zero(to + c * planes.channel_stride, planes.pitch);
        }
        for (int64_t c = 0; c < count; ++c) fill_zero(to + c * planes.channel_stride, tail);
      }
    }
  }
}

// The zeros around the maps of `channels` channels, the first of which has its pixel (0, 0) at `map`. What lies between
// rows is left out where a kernel has written zeros there already.
inline void fill_border(const SecateurView& view, int64_t height, int64_t width, float* map, int64_t channels,
                        bool has_first, bool has_last, bool between) {
  if (view.border_h == 0 && view.border_w == 0) return;
  const int64_t ends = view.border_h * view.row + view.border_w;
  for (int64_t channel = 0; channel < channels; ++channel, map += view.channel) {
    if (has_first) fill_zero(map - ends, ends);
    if (between)
      for (int64_t row = 0; row < height - has_last; ++row) fill_zero(map + row * view.row + width, view.border_w);
    if (has_last) fill_zero(map + (height - 1) * view.row + width, ends);
  }
}

}  // namespace
