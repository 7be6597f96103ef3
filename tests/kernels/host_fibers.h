// Runs CUDA kernels on the host, one fiber for each thread of a block, to test the very source that the GPU runs.
//
// A fiber runs until it waits at a barrier or a shuffle, and each warp as far as it can before the next one starts, in
// ascending or descending order: without a barrier that it needs, a kernel reads shared memory that nobody wrote yet.
// That memory is poisoned before each block. A barrier that not all threads reach is an error.
#pragma once
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("fiber_shared")))  // all fibers share it; the section can be poisoned

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" char __start_fiber_shared[] __attribute__((weak)), __stop_fiber_shared[] __attribute__((weak));

// All of it static: inline variables would be one for all libraries that a process loads.
namespace fibers {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 18;  // bytes

struct Barrier {
  int size, arrived;
  unsigned generation;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  const Barrier* waiting;
  unsigned generation;  // of the barrier that it waits for
};

static std::vector<Fiber> threads;
static std::vector<Barrier> warps;
static std::vector<double> exchanged;  // by shuffles; the widest type
static Barrier block;
static ucontext_t scheduler;
static int current;
static const std::function<void()>* body;
static bool descending;

static void wait(Barrier& barrier) {
  Fiber& fiber = threads[current];
  fiber.generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.generation++;
    return;
  }
  fiber.waiting = &barrier;
  swapcontext(&fiber.context, &scheduler);
  fiber.waiting = nullptr;
}

static void run_fiber() {
  (*body)();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

// Runs the warp's threads as far as they go; returns whether any moved.
static bool run_warp(int warp) {
  bool moved = false;
  for (bool again = true; again; moved |= again) {
    again = false;
    for (int thread = warp * WARP; thread < (warp + 1) * WARP; thread++) {
      const Fiber& fiber = threads[thread];
      if (fiber.done || (fiber.waiting && fiber.waiting->generation == fiber.generation)) continue;
      current = thread;
      threadIdx.x = thread;
      swapcontext(&scheduler, &threads[thread].context);
      again = true;
    }
  }
  return moved;
}

// Runs one block; returns false when threads are left that wait for ever.
static bool run_block() {
  const int num_threads = blockDim.x, num_warps = num_threads / WARP;
  if (__start_fiber_shared) memset(__start_fiber_shared, 0x7f, __stop_fiber_shared - __start_fiber_shared);
  block = {num_threads, 0, 0};
  warps.assign(num_warps, {WARP, 0, 0});
  exchanged.assign(num_threads, 0);
  threads.resize(num_threads);
  for (Fiber& fiber : threads) {
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.done = false;
    fiber.waiting = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (int k = 0; k < num_warps; k++) moved |= run_warp(descending ? num_warps - 1 - k : k);
  }
  for (const Fiber& fiber : threads)
    if (!fiber.done) return false;
  return true;
}

static int launch(const unsigned* grid, unsigned num_threads, const std::function<void()>& kernel) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {num_threads, 1, 1};
  threadIdx = {0, 0, 0};
  body = &kernel;
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        if (!run_block()) return 1;
      }
  return 0;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <class... A> static int launch(const unsigned* grid, unsigned num_threads, void (*kernel)(A...), void** arguments) {
  return launch(grid, num_threads, [=] { call(kernel, arguments, std::index_sequence_for<A...>()); });
}

}  // namespace fibers

extern "C" void fibers_descending(int yes) { fibers::descending = yes; }
#define FIBER_KERNEL(name)                                                                       \
  extern "C" int fiber_##name(const unsigned* grid, unsigned num_threads, void** arguments) {    \
    return fibers::launch(grid, num_threads, name, arguments);                                   \
  }

static void __syncthreads() { fibers::wait(fibers::block); }
static void __syncwarp(unsigned = ~0u) { fibers::wait(fibers::warps[fibers::current / fibers::WARP]); }

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  const int thread = fibers::current;
  memcpy(&fibers::exchanged[thread], &value, sizeof(T));
  __syncwarp();
  memcpy(&value, &fibers::exchanged[thread ^ mask], sizeof(T));
  __syncwarp();
  return value;
}
