// One fiber per thread of a threadgroup: its stack, its start, its waits.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "state.h"

Run run;

void suspend(State why) {
  Fiber* fiber = run.current;
  fiber->state = why;
  fiber->atomic_loads = 0;
  run.switches++;
  switch_context(fiber->context, run.scheduler);
}

static void run_thread() {
  run.entry(run.buffers, &run.current->thread);
  suspend(State::Done);
  abort();  // a thread that is done is never resumed
}

// Stacks are kept from run to run, and between groups.
void prepare_fibers(unsigned count) {
  if (run.fibers.size() < count) run.fibers.resize(count);
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = run.fibers[i];
    if (fiber.stack) continue;
    void* memory = mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    // Stacks grow down: running out of one hits its first page.
    mprotect(memory, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
    fiber.stack = static_cast<char*>(memory);
  }
}

void start_fiber(Fiber& fiber) {
  start_context(fiber.context, fiber.stack, kStackSize, run_thread);
  fiber.state = State::Ready;
  fiber.atomic_loads = 0;
}

void resume(Fiber& fiber) {
  run.current = &fiber;
  switch_context(run.scheduler, fiber.context);
  run.current = nullptr;
}

extern "C" {

const MslThread* msl_thread() { return &run.current->thread; }

void msl_simd(int line, int column, const char* what, void* frame,
              void (*combine)(void**)) {
  Fiber& fiber = *run.current;
  fiber.line = line;
  fiber.column = column;
  fiber.what = what;
  fiber.frame = frame;
  fiber.combine = combine;
  suspend(State::AtSimdFunction);
}

void msl_barrier(int line, int column, int flags, int scope) {
  Fiber& fiber = *run.current;
  fiber.line = line;
  fiber.column = column;
  fiber.flags = flags;
  fiber.what = scope == MSL_SIMDGROUP ? "simdgroup_barrier" : "threadgroup_barrier";
  suspend(scope == MSL_SIMDGROUP ? State::AtSimdBarrier : State::AtBarrier);
}
}
