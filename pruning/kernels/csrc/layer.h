// The native interface: plain pointers and small structs, no library but the C++ standard one.
//
// One call runs one layer on contiguous tensors (channels first or last), or a whole network as a list of steps on buffers of its own. All values
// are float32; sizes and distances count elements.
#pragma once

#include <cstdint>

extern "C" {

// Values shared with `ACTIVATIONS` in pruning/kernels/reference.py.
enum SecateurActivation { NONE, RELU, RELU6, SILU, GELU, HARDSWISH, SIGMOID, HARDSIGMOID };

struct SecateurShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t channels_last;  // set if input and output have their channels beside each other; steps have views for that
};

// Non-zero weights. Rows (output channels) come in groups: of `block` rows that share their zeros, or, if `block` is 1,
// of `ROWS` rows whose columns are sorted by the subset of the rows that is non-zero there (the pattern). Input channels
// come in chunks, so that the activations of one chunk stay in the first-level cache while all groups read them.
//
// Entry `e = chunk * groups + group` owns the columns `[column_start[e], column_start[e + 1])`, the values from
// `value_start[e]` on, and, if `block` is 1, `counts[e * PATTERNS + pattern]` columns of each pattern.
//
// A block need not divide the output channels: the rows beyond them are in the last group and are not stored.
struct SecateurWeight {
  int64_t block, groups, chunks;
  const int64_t* column_start;
  const int64_t* value_start;
  const int32_t* counts;
  const int32_t* offsets;  // of each column, as `secateur_offsets` gives them for this shape
  const float* values;
};

// Where an activation lies: value (n, c, i, j) at `data[n * image + c * channel + i * row + j * column]`.
struct SecateurView {
  float* data;
  int64_t image, channel, row, column;
  // Zeros around the map of each channel: rows above and below, columns on the left, which are also those on the right
  // of the row before. Whoever writes the map writes them too.
  int64_t border_h, border_w;
  // Set if a vector that begins at the last value may be written, and the one behind it read: such memory belongs to
  // nobody.
  int64_t has_slack;
  // For each place from (0, 0) on, all bits set if it is a pixel and none if it lies between rows; null without borders.
  const int32_t* lanes;
};

// What happens to a sum before it is stored: `activation(sum + bias[channel] + residual)`.
struct SecateurEpilogue {
  const float* bias;      // (out_channels) or null
  const float* residual;  // shaped like the output, or null; it may not overlap the output; null if channels are last
  int64_t activation;
};

enum SecateurKind {
  CONVOLUTION,    // `weight`; the epilogue's residual is the view
  LINEAR,         // the same; offsets are the columns, and batch, in_channels and out_channels the only sizes
  DEPTHWISE,      // weight.values of shape (channels, kernel_h * kernel_w), weight.offsets one for each kernel position
  MAX_POOL,       // padding is not looked at
  AVERAGE_POOL,   // over the pixels in the window
  PADDED_AVERAGE_POOL,  // over all places in the window
  ADAPTIVE_POOL,  // averages; the windows follow from the sizes
  ADD,            // activation(x + residual), or activation(x)
  SCALE,          // x * residual, which has one value for each image and channel
  COPY,           // at (first_channel, padding_h, padding_w) of an output that is zero elsewhere
  WINOGRAD        // a dense CONVOLUTION of 3x3 and stride 1; weight.values of shape (16, groups, in_channels, block) are
                  // transformed, and weight.offsets one for each input channel
};

// One step of a network; sizes that the kind does not speak of are those of `shape`.
struct SecateurStep {
  int64_t kind;
  SecateurShape shape;
  SecateurWeight weight;
  SecateurEpilogue epilogue;
  SecateurView x, residual, out;  // `residual.data` may be null
  int64_t first_channel;
};

// How far threads are with a step; a cache line each, and made zero before a run.
struct SecateurProgress {
  int64_t next, done, tasks, padding[5];
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
  void (*gradient_offsets)(const SecateurShape&, int64_t count, const int32_t* columns, int32_t* out);
  int64_t (*step_floats)(const SecateurStep&);
  void (*step_offsets)(const SecateurStep&, int64_t count, const int32_t* columns, int32_t* out);
  int (*run_plan)(const SecateurStep*, int64_t steps, SecateurProgress*, const Threads&);
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
