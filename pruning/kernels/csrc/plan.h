// A whole network in one call: a list of steps, each cut into tasks that threads take one by one.
#pragma once

#include <sched.h>

#include "conv2d.h"
#include "depthwise.h"
#include "linear.h"
#include "maps.h"
#include "winograd.h"

namespace {

inline Convolution convolution_of(const SecateurStep& step, int64_t threads) {
  return Convolution(step.shape, step.weight, step.epilogue, step.x, step.residual, step.out, threads);
}

inline Linear linear_of(const SecateurStep& step) {
  return {step.shape.batch, step.shape.out_channels, step.x.image,    step.residual.image, step.out.image,
          step.weight,      step.epilogue,           step.x.data,     step.residual.data,  step.out.data};
}

// More tasks than threads, because other work on the machine slows some of them down.
inline int64_t parts_of(int64_t units, int64_t threads) { return threads == 1 ? 1 : smaller(units, 4 * threads); }

inline int64_t maps_of(const SecateurStep& step) { return step.shape.batch * step.shape.out_channels; }

inline int64_t tasks_of(const SecateurStep& step, int64_t threads) {
  if (step.kind == CONVOLUTION) return convolution_of(step, threads).tasks();
  if (step.kind == WINOGRAD) return Winograd(step, threads).tasks();
  return parts_of(step.kind == LINEAR ? step.weight.groups : maps_of(step), threads);
}

struct PlanRun {
  const SecateurStep* steps;
  int64_t count;
  SecateurProgress* progress;
  int64_t threads;
  bool failed;

  int64_t take(int64_t step) { return __atomic_fetch_add(&progress[step].next, 1, __ATOMIC_RELAXED); }

  void finish(int64_t step, bool is_done) {
    if (!is_done) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    __atomic_fetch_add(&progress[step].done, 1, __ATOMIC_RELEASE);
  }

  // Only tasks that a running thread has taken are waited for, so one thread alone comes through as well.
  void wait(int64_t step) {
    for (int64_t spin = 0; __atomic_load_n(&progress[step].done, __ATOMIC_ACQUIRE) < progress[step].tasks; ++spin) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spin > 2000) sched_yield();
    }
  }

  // `body(task)` for every task of the step that no other thread has taken.
  template <typename Body>
  void share(int64_t step, const Body& body) {
    for (int64_t task = take(step); task < progress[step].tasks; task = take(step)) finish(step, body(task));
  }

  void run_step(int64_t index) {
    const SecateurStep& step = steps[index];
    const int64_t tasks = progress[index].tasks;
    if (step.kind == CONVOLUTION) {
      const Convolution convolution = convolution_of(step, threads);
      share(index, [&](int64_t task) { return run_convolution(convolution, task); });
    } else if (step.kind == WINOGRAD) {
      const Winograd winograd(step, threads);
      share(index, [&](int64_t task) { return run_winograd(winograd, task); });
    } else if (step.kind == LINEAR) {
      const Linear linear = linear_of(step);
      share(index, [&](int64_t task) {
        const int64_t end = linear.weight.groups * (task + 1) / tasks;
        for (int64_t group = linear.weight.groups * task / tasks; group < end; ++group) run_linear_group(linear, group);
        return true;
      });
    } else if (step.kind == DEPTHWISE) {
      const Depthwise depthwise(step);
      share_maps(index, [&](int64_t image, int64_t channel) { return run_depthwise(depthwise, image, channel); });
    } else {
      share_maps(index, [&](int64_t image, int64_t channel) { return run_map(step, image, channel); });
    }
  }

  template <typename Body>
  void share_maps(int64_t index, const Body& body) {
    const int64_t maps = maps_of(steps[index]), tasks = progress[index].tasks;
    const int64_t channels = steps[index].shape.out_channels;
    share(index, [&](int64_t task) {
      bool is_done = true;
      for (int64_t map = maps * task / tasks; map < maps * (task + 1) / tasks; ++map)
        is_done = body(map / channels, map % channels) && is_done;
      return is_done;
    });
  }
};

int run_plan(const SecateurStep* steps, int64_t count, SecateurProgress* progress, const Threads& threads) {
  PlanRun run{steps, count, progress, threads.count, false};
  for (int64_t step = 0; step < count; ++step) progress[step] = {0, 0, tasks_of(steps[step], threads.count), {}};
  const auto body = [](int64_t, int64_t, void* context) {
    PlanRun& run = *static_cast<PlanRun*>(context);
    for (int64_t step = 0; step < run.count; ++step) {
      run.run_step(step);
      run.wait(step);
    }
  };
  const int status = threads.parallel_for(threads.count, body, &run);
  return status != 0 || run.failed;
}

int64_t step_floats(const SecateurStep& step) {
  if (step.kind == WINOGRAD) return step.shape.in_channels * Winograd(step, 1).pitch;
  return step.kind == CONVOLUTION ? convolution_of(step, 1).planes.floats(step.shape) : Depthwise(step).planes.floats(step.shape);
}

void step_offsets(const SecateurStep& step, int64_t count, const int32_t* columns, int32_t* out) {
  if (step.kind == WINOGRAD) {
    const int64_t pitch = Winograd(step, 1).pitch;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(columns[i] * pitch);
    return;
  }
  const bool is_depthwise = step.kind == DEPTHWISE;
  const Planes planes = is_depthwise ? Depthwise(step).planes : Planes(step.shape, step.x, step.out);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(planes.offset(step.shape, columns[i]));
}

}  // namespace
