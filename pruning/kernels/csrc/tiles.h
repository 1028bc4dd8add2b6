// The inner loops: the sums of a few rows (output channels) by a few vectors of pixels, all in registers.
#pragma once

#include "simd.h"

namespace {

// The non-zero weights of one group and the pixels they are applied to.
struct Operands {
  const float* x;  // the first pixel of the tile in the plane of channel 0
  const int32_t* offsets;
  const float* values;
  const int32_t* counts;  // of columns, by pattern (unstructured)
  int64_t columns;        // (block)
  int64_t block;          // distance of the values of two columns (block)
  int64_t ahead;          // distance of the next entry's values (block), fetched early: large layers are in no near cache
};

// What is stored is `clamp(sum + bias[row] + from[row * from_stride + pixel])`; `bias` and `from` may be null. Each
// chunk's sum starts at zero and is added to that of the chunks before, which keeps rounding errors small.
struct Destination {
  const float* bias;
  const float* from;
  float* to;
  const int32_t* lanes;  // what is stored where none of the bits is set is zero; may be null
  int64_t from_stride, stride;
  int64_t rows;  // of the tile's; the last unstructured group may have fewer
  float low, high;
};

using Tile = void (*)(const Operands&, const Destination&);

template <int G, int NV>
inline __attribute__((always_inline)) void finish(const Vector (&sums)[G][NV], const Destination& d) {
  const Vector low = splat(d.low), high = splat(d.high);
  SECATEUR_UNROLL
  for (int g = 0; g < G; ++g) {
    if (g >= d.rows) break;
    const Vector bias = splat(d.bias ? d.bias[g] : 0.0f);
    SECATEUR_UNROLL
    for (int v = 0; v < NV; ++v) {
      Vector total = sums[g][v] + bias;
      if (d.from) total += load(d.from + g * d.from_stride + v * LANES);
      total = clamp(total, low, high);
      if (d.lanes) total = from_bits(to_bits(total) & load_lanes(d.lanes + v * LANES));
      store(d.to + g * d.stride + v * LANES, total);
    }
  }
}

// G rows share their zeros: each vector of pixels is loaded once and used G times.
template <int G, int NV>
void block_tile(const Operands& operands, const Destination& destination) {
  Vector sums[G][NV] = {};
  const float* values = operands.values;
  for (int64_t column = 0; column < operands.columns; ++column, values += operands.block) {
    __builtin_prefetch(values + operands.ahead);
    const float* x = operands.x + operands.offsets[column];
    Vector pixels[NV];
    SECATEUR_UNROLL
    for (int v = 0; v < NV; ++v) {
      pixels[v] = load(x + v * LANES);
      SECATEUR_KEEP(pixels[v]);
    }
    SECATEUR_UNROLL
    for (int g = 0; g < G; ++g) {
      const Vector weight = splat(values[g]);
      SECATEUR_UNROLL
      for (int v = 0; v < NV; ++v) sums[g][v] += pixels[v] * weight;
    }
  }
  finish(sums, destination);
}

// The columns in which exactly the rows of PATTERN are non-zero, then those of the next pattern. Sorting columns by
// pattern turns a branch for each weight into straight code with each load used as often as the pattern has rows.
// Only the rows from FIRST on that `sums` holds are looked at.
template <int PATTERN, int FIRST, int HELD, int NV>
inline __attribute__((always_inline)) void add_patterns(Vector (&sums)[HELD][NV], const float* x,
                                                        const int32_t*& offsets, const float*& values,
                                                        const int32_t* counts) {
  if constexpr (PATTERN < PATTERNS) {
    constexpr int WEIGHTS = __builtin_popcount(PATTERN), USED = PATTERN >> FIRST & ((1 << HELD) - 1);
    if constexpr (USED == 0) {
      offsets += counts[PATTERN];
      values += counts[PATTERN] * WEIGHTS;
    } else {
      for (int32_t left = counts[PATTERN]; left > 0; --left, ++offsets, values += WEIGHTS) {
        const float* from = x + *offsets;
        SECATEUR_UNROLL
        for (int v = 0; v < NV; ++v) {
          Vector pixels = load(from + v * LANES);
          if constexpr (__builtin_popcount(USED) > 1) SECATEUR_KEEP(pixels);
          int weight = 0;
          SECATEUR_UNROLL
          for (int row = 0; row < ROWS; ++row) {
            if (!(PATTERN >> row & 1)) continue;
            if (row >= FIRST && row < FIRST + HELD) sums[row - FIRST][v] += pixels * values[weight];
            ++weight;
          }
        }
      }
    }
    add_patterns<PATTERN + 1, FIRST>(sums, x, offsets, values, counts);
  }
}

template <int FIRST, int HELD, int NV>
inline __attribute__((always_inline)) void add_rows(const Operands& operands, Destination d) {
  if (FIRST >= d.rows) return;
  Vector sums[HELD][NV] = {};
  const int32_t* offsets = operands.offsets;
  const float* values = operands.values;
  add_patterns<1, FIRST>(sums, operands.x, offsets, values, operands.counts);
  d.rows -= FIRST;
  d.to += FIRST * d.stride;
  if (d.bias) d.bias += FIRST;
  if (d.from) d.from += FIRST * d.from_stride;
  finish(sums, d);
}

template <int NV>
void pattern_tile(const Operands& operands, const Destination& destination) {
  add_rows<0, ROWS, NV>(operands, destination);
}

// Two rows and then the other two: fewer sums for each vector, so that tiles can be twice as wide. Patterns with rows in
// both halves are run through twice, and still fewer loops begin and end for as many pixels.
template <int NV>
void pattern_tile_by_halves(const Operands& operands, const Destination& destination) {
  add_rows<0, ROWS / 2, NV>(operands, destination);
  add_rows<ROWS / 2, ROWS / 2, NV>(operands, destination);
}

// By number of vectors, from one on. The sums, one vector of pixels for each and a weight have to fit the registers.
#if SECATEUR_REGISTERS == 32
constexpr Tile EIGHT_ROWS[] = {block_tile<8, 1>, block_tile<8, 2>, block_tile<8, 3>};
constexpr Tile FOUR_ROWS[] = {block_tile<4, 1>, block_tile<4, 2>, block_tile<4, 3>,
                              block_tile<4, 4>, block_tile<4, 5>, block_tile<4, 6>};
constexpr Tile PATTERN_ROWS[] = {pattern_tile<1>, pattern_tile<2>, pattern_tile<3>, pattern_tile<4>,
                                 pattern_tile<5>, pattern_tile<6>, pattern_tile<7>};
#else
constexpr Tile FOUR_ROWS[] = {block_tile<4, 1>, block_tile<4, 2>, block_tile<4, 3>};
constexpr Tile PATTERN_ROWS[] = {pattern_tile<1>, pattern_tile<2>, pattern_tile<3>, pattern_tile_by_halves<4>,
                                 pattern_tile_by_halves<5>, pattern_tile_by_halves<6>};
#endif

// The tiles for one format: how many rows each sums, and the most vectors it can.
struct Tiles {
  const Tile* by_vectors;
  int64_t most_vectors, rows;

  // For weights of this block on strips of so many vectors.
  Tiles(int64_t block, int64_t vectors) {
    rows = ROWS;
    if (block == 1) {
      by_vectors = PATTERN_ROWS;
      most_vectors = sizeof(PATTERN_ROWS) / sizeof(Tile);
      return;
    }
    by_vectors = FOUR_ROWS;
    most_vectors = sizeof(FOUR_ROWS) / sizeof(Tile);
#if SECATEUR_REGISTERS == 32
    // Four rows, if they take the whole strip at once and eight do not.
    const bool are_four_enough = vectors > 3 && vectors <= most_vectors;
    if (block >= 8 && !are_four_enough) {
      rows = 8;
      by_vectors = EIGHT_ROWS;
      most_vectors = sizeof(EIGHT_ROWS) / sizeof(Tile);
    }
#endif
  }
};

}  // namespace
