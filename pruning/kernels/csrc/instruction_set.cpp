// Compiled once for each instruction set, with `SECATEUR_NAME` its name.
#include "conv2d.h"
#include "fake_quantize.h"
#include "gradient.h"
#include "linear.h"
#include "plan.h"

namespace {

constexpr int MULTIPLY_ADDS = 12 * LANES;

void write_offsets(const SecateurShape& shape, const Planes& planes, int64_t count, const int32_t* columns,
                   int32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(planes.offset(shape, columns[i]));
}

void offsets(const SecateurShape& shape, int64_t count, const int32_t* columns, int32_t* out) {
  write_offsets(shape, Planes(shape), count, columns, out);
}

void gradient_offsets(const SecateurShape& shape, int64_t count, const int32_t* columns, int32_t* out) {
  write_offsets(shape, gradient_planes(shape), count, columns, out);
}

// What a share of peak is a share of: `rounds * MULTIPLY_ADDS` multiply-adds that wait for nothing but each other.
float multiply_add(int64_t rounds) {
  constexpr int SUMS = MULTIPLY_ADDS / LANES;
  Vector sums[SUMS], factor = splat(0.999f), term = splat(0.001f);
  // All different, or the compiler would see that some are equal and compute them only once.
  for (int s = 0; s < SUMS; ++s) sums[s] = splat(static_cast<float>(s));
  for (int64_t round = 0; round < rounds; ++round) {
    SECATEUR_KEEP(factor);
    SECATEUR_UNROLL
    for (int s = 0; s < SUMS; ++s) sums[s] = sums[s] * factor + term;
  }
  Vector total{};
  for (int s = 0; s < SUMS; ++s) total += sums[s];
  return total[0];
}

int64_t input_floats(const SecateurShape& shape) { return Planes(shape).floats(shape); }

}  // namespace

#define SECATEUR_JOIN(a, b) a##b
#define SECATEUR_TABLE(name) SECATEUR_JOIN(secateur_table_, name)
#define SECATEUR_TEXT(name) #name
#define SECATEUR_STRING(name) SECATEUR_TEXT(name)

extern const InstructionSet SECATEUR_TABLE(SECATEUR_NAME);
const InstructionSet SECATEUR_TABLE(SECATEUR_NAME) = {SECATEUR_STRING(SECATEUR_NAME), input_floats, offsets, gradient_offsets,
                                                      step_floats, step_offsets, run_plan, conv2d, values_grad,
                                                      linear_rows, mask_fake_quantize, multiply_add};
