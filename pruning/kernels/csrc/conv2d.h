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
  const float* bias;
  int64_t activation;
  SecateurView x, residual, out;
  Planes planes;
  Tiles tiles;
  // One strip is cut into tasks by output channels and, if its sums need no scratch, by tiles.
  int64_t channel_parts, tile_parts;

  Convolution(const SecateurShape& shape, const SecateurWeight& weight, const SecateurEpilogue& epilogue,
              const SecateurView& x, const SecateurView& residual, const SecateurView& out, int64_t threads)
      : shape(shape), weight(weight), bias(epilogue.bias), activation(epilogue.activation), x(x), residual(residual),
        out(out), planes(shape, x, out),
        tiles(weight.block, divide_up((planes.strip_rows - 1) * planes.pitch + shape.out_width, LANES)), channel_parts(1), tile_parts(1) {
    const int64_t strips = shape.batch * planes.strips(shape);
    if (strips % threads == 0 || strips >= 4 * threads) return;
    // Whichever is smaller, weights or activations, is read by every thread.
    const int64_t cuts = divide_up(map_pixels(), LANES * tiles.most_vectors);
    const bool has_small_weights = values() < shape.in_channels * shape.height * shape.width;
    if (planes.in_place && out.has_slack && is_home(shape.out_height) && has_small_weights && cuts >= 2 * threads)
      tile_parts = smaller(cuts, 4 * threads);
    else
      // Each part packs the input for itself, if it is packed at all.
      channel_parts = smaller(weight.groups, planes.in_place ? 4 * threads : threads);
  }

  bool is_clamp() const { return activation <= RELU6; }  // which tiles do as they store
  int64_t group_rows() const { return weight.block == 1 ? ROWS : weight.block; }
  int64_t values() const { return weight.value_start[weight.groups * weight.chunks]; }
  int64_t map_pixels() const { return (shape.out_height - 1) * planes.pitch + shape.out_width; }
  int64_t tasks() const { return shape.batch * planes.strips(shape) * channel_parts * tile_parts; }

  // Tiles may not read beyond the last pixel, as what lies there is someone else's.
  bool is_input_bounded() const { return planes.in_place && !x.has_slack; }

  // Sums of a strip of `rows` can live in the output itself if its rows are as far apart as those of the planes, and if
  // what tiles write beyond the strip's last pixel is nobody's. Where the last tile has to move back over the one
  // before it, what both compute has to be the same, whichever is first.
  bool is_home(int64_t rows) const {
    if (planes.pitch != out.row || out.column != 1) return false;
    if (residual.data && (residual.row != out.row || residual.has_slack < out.has_slack)) return false;
    if (out.has_slack && !is_input_bounded()) return planes.strips(shape) == 1;
    const int64_t pixels = rows * out.row;
    return pixels >= LANES && (pixels % LANES == 0 || (weight.chunks == 1 && is_clamp()));
  }
};

// The pixels of a strip, cut into tiles of equal width; the last one may be narrower.
struct Cut {
  int64_t pixels, vectors, count;

  // Never wider than the strip: a tile that would read past the end of the input moves back over the one before.
  Cut(int64_t pixels, int64_t most_vectors, bool is_bounded) : pixels(pixels) {
    const int64_t needed = divide_up(pixels, LANES);
    vectors = divide_up(needed, divide_up(needed, most_vectors));
    if (is_bounded) vectors = larger(1, smaller(vectors, pixels / LANES));
    count = divide_up(pixels, width());
  }

  int64_t width() const { return vectors * LANES; }
  int64_t vectors_of(int64_t tile) const { return smaller(vectors, divide_up(pixels - tile * width(), LANES)); }
  int64_t start_of(int64_t tile, bool is_bounded) const {
    const int64_t start = tile * width();
    return is_bounded ? smaller(start, pixels - vectors_of(tile) * LANES) : start;
  }
};

struct Strip {
  const float* planes;
  const float* residual;  // of the image, at the strip's first row; null without one
  float* out;             // the same place in the output
  float* scratch;
  Cut cut;
  int64_t first_group, last_group;
  bool is_bounded;  // tiles may not read or write past the strip's last pixel
  bool is_home;     // sums live in the output itself, not in scratch
};

// Sums of `count` tiles from `first` on, for all groups, chunk by chunk.
inline void add_tiles(const Convolution& c, const Strip& strip, int64_t first, int64_t count) {
  const SecateurWeight& w = c.weight;
  const int64_t group_rows = c.group_rows();
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    const bool is_last = strip.is_home && chunk == w.chunks - 1;
    for (int64_t group = strip.first_group; group < strip.last_group; ++group) {
      const int64_t entry = chunk * w.groups + group;
      for (int64_t row = 0; row < group_rows; row += c.tiles.rows) {
        const int64_t channel = group * group_rows + row;
        if (channel >= c.shape.out_channels) break;
        for (int64_t tile = first; tile < first + count; ++tile) {
          const int64_t start = strip.cut.start_of(tile, strip.is_bounded);
          Destination d{};
          d.rows = smaller(c.tiles.rows, c.shape.out_channels - channel);
          d.stride = strip.is_home ? c.out.channel : count * strip.cut.width();
          d.to = strip.is_home ? strip.out + channel * c.out.channel + start
                               : strip.scratch + (channel - strip.first_group * group_rows) * d.stride +
                                     (tile - first) * strip.cut.width();
          if (chunk > 0) {
            d.from = d.to;
            d.from_stride = d.stride;
          } else {
            d.bias = c.bias ? c.bias + channel : nullptr;
            d.from = strip.is_home && strip.residual ? strip.residual + channel * c.residual.channel + start : nullptr;
            d.from_stride = c.residual.channel;
          }
          const bool is_clamped = is_last && c.is_clamp();
          d.low = is_clamped && c.activation != NONE ? 0.0f : -__builtin_inff();
          d.high = is_clamped && c.activation == RELU6 ? 6.0f : __builtin_inff();
          d.lanes = is_last && c.out.lanes ? c.out.lanes + start : nullptr;
          const Operands operands{strip.planes + start,
                                  w.offsets + w.column_start[entry],
                                  w.values + w.value_start[entry] + row,
                                  w.counts ? w.counts + entry * PATTERNS : nullptr,
                                  w.column_start[entry + 1] - w.column_start[entry],
                                  w.block,
                                  w.value_start[entry + 1] - w.value_start[entry]};
          c.tiles.by_vectors[strip.cut.vectors_of(tile) - 1](operands, d);
        }
      }
    }
  }
}

// The same for an output whose channels lie side by side; the rows are activated where they are.
inline void finish_pixels(Rows rows, int64_t activation, int64_t column, float* out) {
  float* sums = const_cast<float*>(rows.from);
  rows.to = sums;
  rows.stride = rows.from_stride;
  if (activation != NONE) finish_rows(rows, activation);
  for (int64_t channel = 0; channel < rows.rows; channel += LANES)
    for (int64_t i = 0; i < rows.count; i += LANES)
      transpose(sums + channel * rows.from_stride + i, rows.from_stride, smaller(LANES, rows.rows - channel),
                smaller(LANES, rows.count - i), out + i * column + channel, column);
}

// What is left to do for the tiles just summed: out of scratch, without the columns that are no pixels, and activated.
inline void finish_tiles(const Convolution& c, const Strip& strip, int64_t first, int64_t count) {
  if (strip.is_home && c.is_clamp()) return;
  const int64_t first_channel = strip.first_group * c.group_rows();
  const int64_t last_channel = smaller(c.shape.out_channels, strip.last_group * c.group_rows());
  const int64_t width = c.shape.out_width;
  const bool is_dense = c.planes.pitch == width && c.out.row == width && (!strip.residual || c.residual.row == width);
  const int64_t pitch = is_dense ? strip.cut.pixels : c.planes.pitch;
  const int64_t row_width = is_dense ? strip.cut.pixels : width;
  for (int64_t tile = first; tile < first + count; ++tile) {
    const int64_t start = strip.cut.start_of(tile, strip.is_bounded);
    const int64_t end = smaller(strip.cut.pixels, start + strip.cut.vectors_of(tile) * LANES);
    for (int64_t row = start / pitch; row * pitch < end; ++row) {
      const int64_t from = larger(start, row * pitch), to = smaller(end, row * pitch + row_width);
      if (from >= to) continue;
      const int64_t column = from - row * pitch;
      float* target = strip.out + first_channel * c.out.channel + row * c.out.row + column;
      Rows rows{target, nullptr, target, last_channel - first_channel, c.out.channel, 0, c.out.channel, to - from};
      if (!strip.is_home) {
        rows.from = strip.scratch + (tile - first) * strip.cut.width() + from - start;
        rows.from_stride = count * strip.cut.width();
        rows.residual_stride = c.residual.channel;
        if (strip.residual)
          rows.residual = strip.residual + first_channel * c.residual.channel + row * c.residual.row + column;
      }
      if (c.out.column == 1) finish_rows(rows, c.activation);
      else finish_pixels(rows, c.activation, c.out.column, strip.out + first_channel + row * c.out.row + column * c.out.column);
    }
  }
}

// One image, strip, part of the output channels and part of the tiles. False if memory ran out.
inline bool run_convolution(const Convolution& c, int64_t task) {
  static thread_local Workspace planes, scratch;
  const SecateurShape& s = c.shape;
  const int64_t tile_part = task % c.tile_parts, channel_part = task / c.tile_parts % c.channel_parts;
  const int64_t strips = c.planes.strips(s), strip_index = task / c.tile_parts / c.channel_parts % strips;
  const int64_t image = task / c.tile_parts / c.channel_parts / strips;
  const int64_t first_row = strip_index * c.planes.strip_rows;
  const int64_t rows = smaller(c.planes.strip_rows, s.out_height - first_row);
  const int64_t pixels = (rows - 1) * c.planes.pitch + s.out_width;
  const float* packed = nullptr;
  if (c.planes.in_place) packed = c.planes.origin(s, c.x, image);
  else {
    float* buffer = planes.reserve(c.planes.floats(s));
    if (!buffer) return false;
    pack(s, c.planes, c.x, c.x.data + image * c.x.image, s.in_channels, first_row, buffer);
    packed = buffer;
  }
  const bool is_home = c.is_home(rows);
  const bool is_bounded = c.is_input_bounded() || (is_home && !c.out.has_slack);
  const int64_t first_group = c.weight.groups * channel_part / c.channel_parts;
  const int64_t last_group = c.weight.groups * (channel_part + 1) / c.channel_parts;
  float* out = c.out.data + image * c.out.image + first_row * c.out.row;
  const float* residual =
      c.residual.data ? c.residual.data + image * c.residual.image + first_row * c.residual.row : nullptr;
  Strip strip{packed,      residual,   out,        nullptr, Cut(pixels, c.tiles.most_vectors, is_bounded),
              first_group, last_group, is_bounded, is_home};
  const int64_t first_tile = strip.cut.count * tile_part / c.tile_parts;
  const int64_t last_tile = strip.cut.count * (tile_part + 1) / c.tile_parts;

  const int64_t channels = (last_group - first_group) * c.group_rows();
  int64_t together = 1;
  if (c.values() / c.channel_parts > RESIDENT_WEIGHT_FLOATS)
    together = larger(1, smaller(last_tile - first_tile, SCRATCH_FLOATS / larger(1, channels * strip.cut.width())));
  if (!is_home) {
    strip.scratch = scratch.reserve(channels * together * strip.cut.width());
    if (!strip.scratch) return false;
  }
  for (int64_t first = first_tile; first < last_tile; first += together) {
    const int64_t count = smaller(together, last_tile - first);
    add_tiles(c, strip, first, count);
    finish_tiles(c, strip, first, count);
  }
  const int64_t first_channel = first_group * c.group_rows();
  fill_border(c.out, rows, s.out_width, out + first_channel * c.out.channel,
              smaller(s.out_channels, last_group * c.group_rows()) - first_channel, first_row == 0 && first_tile == 0,
              first_row + rows == s.out_height && last_tile == strip.cut.count, !is_home);
  return true;
}

int conv2d(const SecateurShape& shape, const SecateurWeight& weight, const SecateurEpilogue& epilogue, const float* x,
           float* out, const Threads& threads) {
  struct Run {
    Convolution convolution;
    bool failed;
  } run{Convolution(shape, weight, epilogue, input_of(shape, x), output_of(shape, epilogue.residual),
                    output_of(shape, out), threads.count),
        false};
  const auto range = [](int64_t begin, int64_t end, void* context) {
    Run& run = *static_cast<Run*>(context);
    for (int64_t task = begin; task < end; ++task)
      if (!run_convolution(run.convolution, task)) __atomic_store_n(&run.failed, true, __ATOMIC_RELAXED);
  };
  const int status = threads.parallel_for(run.convolution.tasks(), range, &run);
  return status != 0 || run.failed;
}

}  // namespace
