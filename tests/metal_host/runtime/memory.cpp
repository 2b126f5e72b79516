// Buffers between guard pages, and faults that end the kernel instead of Python.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "faults.h"
#include "state.h"

static size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

static size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// On each side of a buffer: only addresses, no memory.
constexpr size_t kGuard = 1 << 20;

static size_t body_size(size_t size) {
  return size ? round_up(size, page_size()) : page_size();
}

// The end is flush with the guard but for the alignment, so that an overrun faults even
// in the fast build.
void* guarded_alloc(size_t size, size_t alignment) {
  const size_t body = body_size(size);
  void* memory =
      mmap(nullptr, body + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(memory) + kGuard;
  if (mprotect(start, body, PROT_READ | PROT_WRITE) != 0) {
    munmap(memory, body + 2 * kGuard);
    return nullptr;
  }
  return start + body - round_up(size ? size : 1, alignment);
}

void guarded_free(void* memory, size_t size, size_t alignment) {
  const size_t body = body_size(size);
  char* end = static_cast<char*>(memory) + round_up(size ? size : 1, alignment);
  munmap(end - body - kGuard, body + 2 * kGuard);
}

// ---- faults

static const int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
static const int kSignalCount = sizeof kSignals / sizeof *kSignals;
static struct sigaction previous[kSignalCount];
static stack_t previous_stack;
static sigjmp_buf give_up;
static volatile sig_atomic_t running = 0;
static Fault last_fault;

static uintptr_t program_counter(void* context) {
#if defined(__linux__) && defined(__x86_64__)
  return static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__linux__) && defined(__aarch64__)
  return static_cast<ucontext_t*>(context)->uc_mcontext.pc;
#elif defined(__APPLE__) && defined(__aarch64__)
  return static_cast<ucontext_t*>(context)->uc_mcontext->__ss.__pc;
#elif defined(__APPLE__) && defined(__x86_64__)
  return static_cast<ucontext_t*>(context)->uc_mcontext->__ss.__rip;
#else
  (void)context;
  return 0;
#endif
}

static void on_fault(int number, siginfo_t* info, void* context) {
  if (running) {
    last_fault = {number, info->si_addr, program_counter(context)};
    siglongjmp(give_up, 1);
  }
  // Not ours: let the previous handler see it when the instruction is run again.
  for (int i = 0; i < kSignalCount; i++) {
    if (kSignals[i] == number) sigaction(number, &previous[i], nullptr);
  }
}

bool run_catching_faults(void (*function)(void*), void* argument, Fault* fault) {
  // Kernels run on small stacks, which may be what has overflowed.
  static char signal_stack[64 << 10];
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &action, &previous[i]);

  bool clean = true;
  if (sigsetjmp(give_up, 1) == 0) {
    running = 1;
    function(argument);
  } else {
    *fault = last_fault;
    clean = false;
  }
  running = 0;
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
  return clean;
}
