// One convolution: strips of output rows, tiles of pixels, groups of output channels.
#pragma once

#include "packing.h"
#include "tiles.h"

namespace {

// Weights that are read again for every tile should at least come from the second-level cache.
constexpr int64_t RESIDENT_WEIGHT_FLOATS = 64 * 1024;
constexpr int64_t SCRATCH_FLOATS = 32 * 1024;

struct Convolution {
  const SecateurShape& shape;
  const SecateurWeight& weight;
  const SecateurEpilogue& epilogue;
  const float* x;
  float* out;
  Planes planes;
  Tiles tiles;
  int64_t parts;  // of the output channels, one task each
  bool is_clamp;  // the activation is a clamp, which tiles do as they store
  bool failed;
};

// The pixels of a strip, cut into tiles of equal width; the last one may be narrower.
struct Cut {
  int64_t pixels, vectors, count;

  // Never wider than the strip: a tile that would read past the end of the input moves back over the one before.
  Cut(int64_t pixels, int64_t most_vectors, bool in_place) : pixels(pixels) {
    const int64_t needed = divide_up(pixels, LANES);
    vectors = divide_up(needed, divide_up(needed, most_vectors));
    if (in_place) vectors = larger(1, smaller(vectors, pixels / LANES));
    count = divide_up(pixels, width());
  }

  int64_t width() const { return vectors * LANES; }
  int64_t vectors_of(int64_t tile) const { return smaller(vectors, divide_up(pixels - tile * width(), LANES)); }
  int64_t start_of(int64_t tile, bool in_place) const {
    const int64_t start = tile * width();
    return in_place ? smaller(start, pixels - vectors_of(tile) * LANES) : start;
  }
};

struct Strip {
  const float* planes;
  const float* residual;  // of the image, at the strip's first row; null without one
  float* out;             // the same place in the output
  float* scratch;
  Cut cut;
  int64_t first_group, last_group;
  bool is_in_place;  // tiles may not read or write past the strip's last pixel
  bool is_home;      // sums live in the output itself, not in scratch
};

// Sums of `count` tiles from `first` on, for all groups, chunk by chunk.
inline void add_tiles(const Convolution& c, const Strip& strip, int64_t first, int64_t count) {
  const SecateurWeight& w = c.weight;
  const int64_t group_rows = w.block == 1 ? ROWS : w.block;
  const int64_t pixels = c.shape.out_height * c.shape.out_width;
  const int64_t stride = strip.is_home ? pixels : count * strip.cut.width();
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    for (int64_t group = strip.first_group; group < strip.last_group; ++group) {
      const int64_t entry = chunk * w.groups + group;
      for (int64_t row = 0; row < group_rows; row += c.tiles.rows) {
        const int64_t channel = group * group_rows + row;
        for (int64_t tile = first; tile < first + count; ++tile) {
          const int64_t start = strip.cut.start_of(tile, strip.is_in_place);
          Destination d{};
          d.stride = stride;
          d.rows = smaller(c.tiles.rows, c.shape.out_channels - channel);
          d.to = strip.is_home ? strip.out + channel * pixels + start
                               : strip.scratch + (channel - strip.first_group * group_rows) * stride +
                                     (tile - first) * strip.cut.width();
          if (chunk > 0) d.from = d.to;
          else {
            d.bias = c.epilogue.bias ? c.epilogue.bias + channel : nullptr;
            d.from = strip.is_home && strip.residual ? strip.residual + channel * pixels + start : nullptr;
          }
          const bool is_last = strip.is_home && c.is_clamp && chunk == w.chunks - 1;
          d.low = is_last && c.epilogue.activation != NONE ? 0.0f : -__builtin_inff();
          d.high = is_last && c.epilogue.activation == RELU6 ? 6.0f : __builtin_inff();
          const Operands operands{strip.planes + start,
                                  w.offsets + w.column_start[entry],
                                  w.values + w.value_start[entry] + row,
                                  w.counts ? w.counts + entry * PATTERNS : nullptr,
                                  w.column_start[entry + 1] - w.column_start[entry],
                                  w.block};
          c.tiles.by_vectors[strip.cut.vectors_of(tile) - 1](operands, d);
        }
      }
    }
  }
}

// What is left to do for the tiles just summed: out of scratch, without the columns that are no pixels, and activated.
inline void finish_tiles(const Convolution& c, const Strip& strip, int64_t first, int64_t count) {
  if (strip.is_home && c.is_clamp) return;
  const int64_t group_rows = c.weight.block == 1 ? ROWS : c.weight.block;
  const int64_t pixels = c.shape.out_height * c.shape.out_width;
  const int64_t first_channel = strip.first_group * group_rows;
  const int64_t last_channel = smaller(c.shape.out_channels, strip.last_group * group_rows);
  const bool is_dense = c.planes.pitch == c.shape.out_width;
  const int64_t pitch = is_dense ? strip.cut.pixels : c.planes.pitch;
  const int64_t row_width = is_dense ? strip.cut.pixels : c.shape.out_width;
  for (int64_t tile = first; tile < first + count; ++tile) {
    const int64_t start = strip.cut.start_of(tile, strip.is_in_place);
    const int64_t end = smaller(strip.cut.pixels, start + strip.cut.vectors_of(tile) * LANES);
    for (int64_t row = start / pitch; row * pitch < end; ++row) {
      const int64_t from = larger(start, row * pitch), to = smaller(end, row * pitch + row_width);
      if (from >= to) continue;
      const int64_t pixel = row * row_width + from - row * pitch;
      float* target = strip.out + first_channel * pixels + pixel;
      Rows rows{target, nullptr, target, last_channel - first_channel, pixels, pixels, to - from};
      if (!strip.is_home) {
        rows.from = strip.scratch + (tile - first) * strip.cut.width() + from - start;
        rows.from_stride = count * strip.cut.width();
        rows.residual = strip.residual ? strip.residual + first_channel * pixels + pixel : nullptr;
      }
      finish_rows(rows, c.epilogue.activation);
    }
  }
}

// One image, strip and part of the output channels.
inline bool run_task(const Convolution& c, int64_t image, int64_t strip_index, int64_t part) {
  static thread_local Workspace planes, scratch;
  const SecateurShape& s = c.shape;
  const int64_t first_row = strip_index * c.planes.strip_rows;
  const int64_t rows = smaller(c.planes.strip_rows, s.out_height - first_row);
  const int64_t pixels = (rows - 1) * c.planes.pitch + s.out_width;
  const float* input = c.x + image * s.in_channels * s.height * s.width;
  const float* packed = input;
  if (!c.planes.in_place) {
    float* buffer = planes.reserve(c.planes.floats(s));
    if (!buffer) return false;
    pack(s, c.planes, input, first_row, buffer);
    packed = buffer;
  }
  const bool is_even = pixels % LANES == 0;
  const bool is_home = c.planes.pitch == s.out_width && pixels >= LANES &&
                       (is_even || (c.weight.chunks == 1 && c.is_clamp));
  const bool is_in_place = c.planes.in_place || is_home;
  const int64_t first_group = c.weight.groups * part / c.parts, last_group = c.weight.groups * (part + 1) / c.parts;
  const int64_t offset = image * s.out_channels * s.out_height * s.out_width + first_row * s.out_width;
  Strip strip{packed, c.epilogue.residual ? c.epilogue.residual + offset : nullptr, c.out + offset, nullptr,
              Cut(pixels, c.tiles.most_vectors, is_in_place), first_group, last_group, is_in_place, is_home};

  const int64_t channels = (last_group - first_group) * (c.weight.block == 1 ? ROWS : c.weight.block);
  const int64_t values = c.weight.value_start[c.weight.groups * c.weight.chunks] / c.parts;
  int64_t together = 1;
  if (values > RESIDENT_WEIGHT_FLOATS)
    together = larger(1, smaller(strip.cut.count, SCRATCH_FLOATS / larger(1, channels * strip.cut.width())));
  if (!is_home) {
    strip.scratch = scratch.reserve(channels * together * strip.cut.width());
    if (!strip.scratch) return false;
  }
  for (int64_t first = 0; first < strip.cut.count; first += together) {
    const int64_t count = smaller(together, strip.cut.count - first);
    add_tiles(c, strip, first, count);
    finish_tiles(c, strip, first, count);
  }
  return true;
}

int conv2d(const SecateurShape& shape, const SecateurWeight& weight, const SecateurEpilogue& epilogue, const float* x,
           float* out, const Threads& threads) {
  Convolution c{shape, weight, epilogue, x, out, Planes(shape), Tiles(weight.block), 1, epilogue.activation <= RELU6,
                false};
  const int64_t units = shape.batch * c.planes.strips(shape);
  // Too few strips to share evenly are cut by output channels too, which costs packing them more than once.
  if (units % threads.count != 0 && units < 4 * threads.count) c.parts = smaller(weight.groups, threads.count);
  const auto range = [](int64_t begin, int64_t end, void* context) {
    Convolution& c = *static_cast<Convolution*>(context);
    const int64_t strips = c.planes.strips(c.shape);
    for (int64_t task = begin; task < end; ++task)
      if (!run_task(c, task / c.parts / strips, task / c.parts % strips, task % c.parts))
        __atomic_store_n(&c.failed, true, __ATOMIC_RELAXED);
  };
  const int status = threads.parallel_for(units * c.parts, range, &c);
  return status != 0 || c.failed;
}

}  // namespace
