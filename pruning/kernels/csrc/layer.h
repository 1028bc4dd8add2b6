// The native interface: plain pointers and small structs, no library but the C++ standard one.
//
// One call runs one layer. A caller that holds the layers of a whole network can therefore run them in a loop of its
// own without going back to Python. All tensors are contiguous float32; sizes count elements.
#pragma once

#include <cstdint>

extern "C" {

// Values shared with `ACTIVATIONS` in pruning/kernels/reference.py.
enum SecateurActivation { NONE, RELU, RELU6, SILU, GELU, HARDSWISH };

struct SecateurShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Non-zero weights. Rows (output channels) come in groups: of `block` rows that share their zeros, or, if `block` is 1,
// of `ROWS` rows whose columns are sorted by the subset of the rows that is non-zero there (the pattern). Input channels
// come in chunks, so that the activations of one chunk stay in the first-level cache while all groups read them.
//
// Entry `e = chunk * groups + group` owns the columns `[column_start[e], column_start[e + 1])`, the values from
// `value_start[e]` on, and, if `block` is 1, `counts[e * PATTERNS + pattern]` columns of each pattern.
struct SecateurWeight {
  int64_t block, groups, chunks;
  const int64_t* column_start;
  const int64_t* value_start;
  const int32_t* counts;
  const int32_t* offsets;  // of each column, as `secateur_offsets` gives them for this shape
  const float* values;
};

// What happens to a sum before it is stored: `activation(sum + bias[channel] + residual)`.
struct SecateurEpilogue {
  const float* bias;      // (out_channels) or null
  const float* residual;  // shaped like the output, or null; it may not overlap the output
  int64_t activation;
};
}

// Rows of an unstructured group and the subsets of them. A pattern is a bit mask; 0 never occurs.
constexpr int ROWS = 4;
constexpr int PATTERNS = 1 << ROWS;

// Runs `body(begin, end, context)` on disjoint ranges that cover `[0, count)`. Non-zero if it could not.
using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int (*)(int64_t count, Range body, void* context);

struct Threads {
  int64_t count;
  ParallelFor parallel_for;
};

// What each instruction set implements; `dispatch.cpp` picks one table when the library is first used.
struct InstructionSet {
  const char* name;
  int64_t (*input_floats)(const SecateurShape&);
  void (*offsets)(const SecateurShape&, int64_t count, const int32_t* columns, int32_t* out);
  int (*conv2d)(const SecateurShape&, const SecateurWeight&, const SecateurEpilogue&, const float* x, float* out,
                const Threads&);
  int (*values_grad)(const SecateurShape&, const SecateurWeight&, const float* x, const float* grad_out,
                     float* grad_values, const Threads&);
  int (*linear_rows)(int64_t batch, int64_t in_features, int64_t out_features, const SecateurWeight&,
                     const SecateurEpilogue&, const float* x, float* out, const Threads&);
  int (*mask_fake_quantize)(int64_t rows, int64_t row_size, const float* weight, const uint8_t* mask,
                            const float* scale, float lowest, float highest, float* out, uint8_t* is_inside,
                            const Threads&);
  float (*multiply_add)(int64_t rounds);
};
