// The functions that Python calls. This file is compiled for the oldest processor of the architecture.
#include <string.h>

#include "layer.h"

#if defined(__x86_64__)
extern const InstructionSet secateur_table_avx512, secateur_table_avx2;
#endif
extern const InstructionSet secateur_table_portable;

namespace {

using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain_size, Range body, void* context);

TorchParallelFor torch_parallel_for = nullptr;
const InstructionSet* chosen = nullptr;

bool is_supported(const InstructionSet* set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == &secateur_table_avx2) return has_avx2;
  if (set == &secateur_table_avx512)
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
  return set == &secateur_table_portable;
}

const InstructionSet* const ALL[] = {
#if defined(__x86_64__)
    &secateur_table_avx512, &secateur_table_avx2,
#endif
    &secateur_table_portable};

int run_here(int64_t count, Range body, void* context) {
  body(0, count, context);
  return 0;
}

int run_in_torch(int64_t count, Range body, void* context) { return torch_parallel_for(0, count, 1, body, context); }

Threads threads_of(int64_t count) {
  if (count > 1 && torch_parallel_for) return {count, run_in_torch};
  return {1, run_here};
}

}  // namespace

#define SECATEUR_EXPORT extern "C" __attribute__((visibility("default")))

// SHA-256 of the sources, in the order of their names.
SECATEUR_EXPORT const char* secateur_sources() { return SECATEUR_SOURCES; }

// PyTorch's own thread pool; without it everything runs on the calling thread.
SECATEUR_EXPORT void secateur_use_threads(TorchParallelFor parallel_for) { torch_parallel_for = parallel_for; }

// Chooses an instruction set by name, or the best one if `name` is empty. Null if there is none such here.
SECATEUR_EXPORT const char* secateur_choose(const char* name) {
  for (const InstructionSet* set : ALL) {
    if (!is_supported(set) || (name[0] != '\0' && strcmp(name, set->name) != 0)) continue;
    chosen = set;
    return set->name;
  }
  return nullptr;
}

// Floats from the first to behind the last that a tile may read of one image, to check that offsets fit 32 bits.
SECATEUR_EXPORT int64_t secateur_input_floats(const SecateurShape* shape) { return chosen->input_floats(*shape); }

// Where each column `(channel * kernel_h + row) * kernel_w + column` lies for this shape and the chosen set.
SECATEUR_EXPORT void secateur_offsets(const SecateurShape* shape, int64_t count, const int32_t* columns,
                                      int32_t* offsets) {
  chosen->offsets(*shape, count, columns, offsets);
}

// The same for the gradient of the values, which packs several images.
SECATEUR_EXPORT void secateur_gradient_offsets(const SecateurShape* shape, int64_t count, const int32_t* columns,
                                               int32_t* offsets) {
  chosen->gradient_offsets(*shape, count, columns, offsets);
}

// The first two for a convolution of a plan.
SECATEUR_EXPORT int64_t secateur_step_floats(const SecateurStep* step) { return chosen->step_floats(*step); }

SECATEUR_EXPORT void secateur_step_offsets(const SecateurStep* step, int64_t count, const int32_t* columns,
                                           int32_t* offsets) {
  chosen->step_offsets(*step, count, columns, offsets);
}

// The functions below return non-zero if memory ran out.
SECATEUR_EXPORT int secateur_run_plan(const SecateurStep* steps, int64_t count, SecateurProgress* progress,
                                      int64_t threads) {
  return chosen->run_plan(steps, count, progress, threads_of(threads));
}

SECATEUR_EXPORT int secateur_conv2d(const SecateurShape* shape, const SecateurWeight* weight,
                                    const SecateurEpilogue* epilogue, const float* x, float* out, int64_t threads) {
  return chosen->conv2d(*shape, *weight, *epilogue, x, out, threads_of(threads));
}

SECATEUR_EXPORT int secateur_values_grad(const SecateurShape* shape, const SecateurWeight* weight, const float* x,
                                         const float* grad_out, float* grad_values, int64_t threads) {
  return chosen->values_grad(*shape, *weight, x, grad_out, grad_values, threads_of(threads));
}

SECATEUR_EXPORT int secateur_linear_rows(int64_t batch, int64_t in_features, int64_t out_features,
                                         const SecateurWeight* weight, const SecateurEpilogue* epilogue,
                                         const float* x, float* out, int64_t threads) {
  return chosen->linear_rows(batch, in_features, out_features, *weight, *epilogue, x, out, threads_of(threads));
}

SECATEUR_EXPORT int secateur_mask_fake_quantize(int64_t rows, int64_t row_size, const float* weight,
                                                const uint8_t* mask, const float* scale, float lowest, float highest,
                                                float* out, uint8_t* is_inside, int64_t threads) {
  return chosen->mask_fake_quantize(rows, row_size, weight, mask, scale, lowest, highest, out, is_inside,
                                    threads_of(threads));
}

// Runs `rounds` rounds of twelve vector multiply-adds each, at the processor's peak.
SECATEUR_EXPORT float secateur_multiply_add(int64_t rounds) { return chosen->multiply_add(rounds); }
