// Dense 3x3 convolutions of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 16 multiplications for four outputs
// in place of 36 (Lavin and Gray 2016, section 4.1).
//
// The output is cut into tiles of two by two pixels, each computed from four by four of the input. A block of rows of
// tiles is transformed channel by channel (B^T d B), so that each of the 16 positions in a tile is a matrix of channels
// by tiles; 16 matrix products with the transformed weights follow, and the sums are transformed back (A^T m A) on their
// way to the output.
#pragma once

#include "packing.h"
#include "tiles.h"

namespace {

constexpr int64_t TILE = 2, POSITIONS = 16;
// A block's transformed input, and the sums of the output channels that are computed together.
constexpr int64_t BLOCK_FLOATS = 160 * 1024, SUM_FLOATS = 96 * 1024;
// Transformed input of one tile of sums, in the first-level cache.
constexpr int64_t PRODUCT_CHANNELS = 128;

struct Winograd {
  const SecateurStep& step;
  Planes planes;
  int64_t tile_columns, block_rows, blocks, pitch, position, channel_parts;

  // The distance `pitch` between channels does not depend on the threads, since offsets are made beforehand.
  Winograd(const SecateurStep& step, int64_t threads)
      : step(step), planes(step.shape, step.x, step.out), tile_columns(divide_up(step.shape.out_width, TILE)),
        channel_parts(1) {
    const SecateurShape& s = step.shape;
    const int64_t tile_rows = divide_up(s.out_height, TILE);
    const int64_t of_input = BLOCK_FLOATS / (POSITIONS * s.in_channels);
    const int64_t most = larger(LANES, smaller(of_input, SUM_FLOATS / (POSITIONS * step.weight.block)));
    blocks = smaller(tile_rows, divide_up(tile_rows * tile_columns, most));
    block_rows = divide_up(tile_rows, blocks);
    blocks = divide_up(tile_rows, block_rows);
    // The last vector of a row of tiles is stored whole.
    pitch = divide_up(block_rows * tile_columns, LANES) * LANES + LANES;
    // A multiple of 4 KiB would put one tile's positions into the same few sets of the first-level cache.
    position = divide_up(s.in_channels * pitch, 1024) * 1024 + LANES;
    if (!planes.in_place) planes.cut(s, block_rows * TILE);
    if (s.batch * blocks % threads != 0 && s.batch * blocks < 4 * threads)
      channel_parts = smaller(step.weight.groups, threads);
  }

  int64_t tasks() const { return step.shape.batch * blocks * channel_parts; }
};

// The 16 positions of each tile of one row of tiles; `rows` are the four rows of its input.
inline void transform_input(const float* const (&rows)[4], int64_t tiles, float* to, int64_t stride) {
  for (int64_t tile = 0; tile < tiles; tile += LANES) {
    Vector d[4][4];
    SECATEUR_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* from = rows[i] + TILE * tile;
      d[i][0] = every_second(from);
      d[i][1] = every_second(from + 1);
      d[i][2] = every_second(from + 2);
      d[i][3] = every_second(from + 3);
    }
    Vector columns[4][4];
    SECATEUR_UNROLL
    for (int j = 0; j < 4; ++j) {
      columns[0][j] = d[0][j] - d[2][j];
      columns[1][j] = d[1][j] + d[2][j];
      columns[2][j] = d[2][j] - d[1][j];
      columns[3][j] = d[1][j] - d[3][j];
    }
    SECATEUR_UNROLL
    for (int i = 0; i < 4; ++i) {
      float* at = to + 4 * i * stride + tile;
      store(at, columns[i][0] - columns[i][2]);
      store(at + stride, columns[i][1] + columns[i][2]);
      store(at + 2 * stride, columns[i][2] - columns[i][1]);
      store(at + 3 * stride, columns[i][1] - columns[i][3]);
    }
  }
}

// Values of `a` and `b` in turn.
inline void interleave(Vector a, Vector b, Vector& first, Vector& second) {
  IntVector lower, upper;
  SECATEUR_UNROLL
  for (int lane = 0; lane < LANES; ++lane) {
    lower[lane] = lane / 2 + lane % 2 * LANES;
    upper[lane] = lower[lane] + LANES / 2;
  }
  first = shuffle(a, b, lower);
  second = shuffle(a, b, upper);
}

struct OutputRow {
  const float* residual;  // null without one
  float* to;              // null below the last row
};

struct Clamp {
  Vector low, high;

  // Of the activations that are one; the others are left to do.
  explicit Clamp(int64_t activation)
      : low(splat(activation == RELU || activation == RELU6 ? 0.0f : -__builtin_inff())),
        high(splat(activation == RELU6 ? 6.0f : __builtin_inff())) {}
};

inline void store_pixels(Vector v, const OutputRow& row, int64_t at, int64_t count, const Clamp& range) {
  if (count >= LANES) {
    if (row.residual) v += load(row.residual + at);
    store(row.to + at, clamp(v, range.low, range.high));
  } else if (count > 0) {
    if (row.residual) v += load_some(row.residual + at, count);
    store_some(row.to + at, clamp(v, range.low, range.high), count);
  }
}

// The two output rows of one row of tiles, from sums whose positions are `stride` apart.
inline void transform_output(const float* from, int64_t stride, int64_t tiles, int64_t width, float bias,
                             const OutputRow (&rows)[TILE], const Clamp& range) {
  for (int64_t tile = 0; tile < tiles; tile += LANES) {
    Vector sums[TILE][4];
    SECATEUR_UNROLL
    for (int j = 0; j < 4; ++j) {
      Vector m[4];
      SECATEUR_UNROLL
      for (int i = 0; i < 4; ++i) m[i] = load(from + (4 * i + j) * stride + tile);
      sums[0][j] = m[0] + m[1] + m[2];
      sums[1][j] = m[1] - m[2] - m[3];
    }
    SECATEUR_UNROLL
    for (int i = 0; i < TILE; ++i) {
      if (!rows[i].to) continue;
      Vector first, second;
      interleave(sums[i][0] + sums[i][1] + sums[i][2] + bias, sums[i][1] - sums[i][2] - sums[i][3] + bias, first,
                 second);
      const int64_t at = TILE * tile;
      store_pixels(first, rows[i], at, width - at, range);
      store_pixels(second, rows[i], at + LANES, width - at - LANES, range);
    }
  }
}

// Sums of the output channels of some groups, 16 positions a channel.
inline void multiply(const Winograd& w, const float* transformed, int64_t tiles, int64_t first_group,
                     int64_t last_group, float* sums) {
  const SecateurStep& step = w.step;
  const SecateurWeight& weight = step.weight;
  const int64_t channels = step.shape.in_channels, stride = POSITIONS * w.pitch;
  const int64_t vectors = divide_up(tiles, LANES);
  const Tiles by_rows(weight.block, vectors);
  const int64_t cuts = divide_up(vectors, by_rows.most_vectors), most = divide_up(vectors, cuts);
  for (int64_t position = 0; position < POSITIONS; ++position) {
    const float* x = transformed + position * w.position;
    for (int64_t vector = 0; vector < vectors; vector += most) {
      const Tile tile = by_rows.by_vectors[smaller(most, vectors - vector) - 1];
      for (int64_t channel = 0; channel < channels; channel += PRODUCT_CHANNELS) {
        const int64_t columns = smaller(PRODUCT_CHANNELS, channels - channel);
        for (int64_t group = first_group; group < last_group; ++group) {
          const float* values = weight.values + ((position * weight.groups + group) * channels + channel) * weight.block;
          for (int64_t row = 0; row < weight.block; row += by_rows.rows) {
            float* to = sums + ((group - first_group) * weight.block + row) * stride + position * w.pitch + vector * LANES;
            const Operands operands{x + channel * w.pitch + vector * LANES, weight.offsets, values + row, nullptr,
                                    columns, weight.block, channels * weight.block};
            Destination d{};
            d.from = channel > 0 ? to : nullptr;
            d.to = to;
            d.from_stride = d.stride = stride;
            d.rows = by_rows.rows;
            d.low = -__builtin_inff();
            d.high = __builtin_inff();
            tile(operands, d);
          }
        }
      }
    }
  }
}

// One image, block of rows of tiles and part of the output channels. False if memory ran out.
inline bool run_winograd(const Winograd& w, int64_t task) {
  static thread_local Workspace packed, transformed, sums;
  const SecateurStep& step = w.step;
  const SecateurShape& s = step.shape;
  const SecateurWeight& weight = step.weight;
  const int64_t part = task % w.channel_parts, block = task / w.channel_parts % w.blocks;
  const int64_t image = task / w.channel_parts / w.blocks;
  const int64_t first_row = block * w.block_rows * TILE;
  const int64_t out_rows = smaller(w.block_rows * TILE, s.out_height - first_row);
  const int64_t tile_rows = divide_up(out_rows, TILE), tiles = tile_rows * w.tile_columns;
  const float* x = nullptr;
  if (w.planes.in_place) x = w.planes.origin(s, step.x, image) + first_row * w.planes.pitch;
  else {
    float* buffer = packed.reserve(w.planes.floats(s));
    if (!buffer) return false;
    pack(s, w.planes, step.x, step.x.data + image * step.x.image, s.in_channels, first_row, buffer);
    x = buffer;
  }
  float* input = transformed.reserve(POSITIONS * w.position);
  const int64_t together = larger(1, SUM_FLOATS / (POSITIONS * w.pitch * weight.block));
  float* products = sums.reserve(smaller(together, weight.groups) * weight.block * POSITIONS * w.pitch);
  if (!input || !products) return false;
  for (int64_t channel = 0; channel < s.in_channels; ++channel) {
    const float* map = x + channel * w.planes.channel_stride;
    for (int64_t row = 0; row < tile_rows; ++row) {
      const float* from = map + row * TILE * w.planes.pitch;
      // Below the last row of an odd height lies foreign memory, and nothing that is stored depends on it.
      const float* last = from + (row * TILE + 1 < out_rows ? 3 : 2) * w.planes.pitch;
      const float* const rows[4] = {from, from + w.planes.pitch, from + 2 * w.planes.pitch, last};
      transform_input(rows, w.tile_columns, input + channel * w.pitch + row * w.tile_columns,
                      w.position);
    }
  }
  const Clamp range(step.epilogue.activation);
  const int64_t end_group = weight.groups * (part + 1) / w.channel_parts;
  for (int64_t group = weight.groups * part / w.channel_parts; group < end_group; group += together) {
    const int64_t last = smaller(end_group, group + together);
    multiply(w, input, tiles, group, last, products);
    const int64_t first_channel = group * weight.block;
    const int64_t channels = smaller(s.out_channels, last * weight.block) - first_channel;
    float* out = step.out.data + image * step.out.image + first_channel * step.out.channel + first_row * step.out.row;
    for (int64_t channel = 0; channel < channels; ++channel) {
      float* map = out + channel * step.out.channel;
      const float* residual = nullptr;
      if (step.residual.data)
        residual = step.residual.data + image * step.residual.image + (first_channel + channel) * step.residual.channel +
                   first_row * step.residual.row;
      for (int64_t row = 0; row < tile_rows; ++row) {
        OutputRow rows[TILE];
        for (int64_t i = 0; i < TILE; ++i) {
          const int64_t at = row * TILE + i;
          rows[i] = {residual ? residual + at * step.residual.row : nullptr,
                     at < out_rows ? map + at * step.out.row : nullptr};
        }
        transform_output(products + channel * POSITIONS * w.pitch + row * w.tile_columns, w.pitch, w.tile_columns,
                         s.out_width, step.epilogue.bias ? step.epilogue.bias[first_channel + channel] : 0.0f, rows,
                         range);
      }
      if (step.epilogue.activation > RELU6)
        finish_rows({map, nullptr, map, out_rows, step.out.row, 0, step.out.row, s.out_width}, step.epilogue.activation);
    }
    fill_border(step.out, out_rows, s.out_width, out, channels, block == 0, block == w.blocks - 1, true);
  }
  return true;
}

}  // namespace
