// The runtime's state. One run at a time: the Python side holds a lock.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <string>
#include <vector>

#include "context.h"
#include "kernel_api.h"

constexpr unsigned kSimdWidth = 32;
constexpr unsigned kMaxThreads = 1024;             // of a threadgroup, on every Apple GPU
constexpr size_t kMaxThreadgroupMemory = 32 << 10;  // the same
constexpr size_t kStackSize = 256 << 10;           // mapped lazily: most is never touched

typedef void (*KernelEntry)(void** buffers, const MslThread* thread);

// ---- findings

// The names are part of the Python API (findings.py).
struct Finding {
  const char* kind;
  std::string message;
  int line;         // of the generated source, or 0 where only the address is known
  uintptr_t pc;     // of the access, or 0
  uintptr_t other;  // of the access that it conflicts with, or 0
  std::string example;
  uint64_t count;
};

void report(const char* kind, int line, uintptr_t pc, uintptr_t other, const char* format,
            ...) __attribute__((format(printf, 5, 6)));

// Reports, and ends the whole run: what follows would be built on sand.
void report_and_stop(const char* kind, int line, uintptr_t pc, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// ---- threads

enum class State { Ready, AtSimdFunction, AtSimdBarrier, AtBarrier, Done };

struct Fiber {
  Context context;
  char* stack = nullptr;
  State state = State::Done;
  MslThread thread;

  // Where and why it waits.
  int line = 0;
  int column = 0;
  int flags = 0;
  const char* what = "";
  void* frame = nullptr;
  void (*combine)(void**) = nullptr;

  uint32_t atomic_loads = 0;    // since it last waited: finds a thread that spins
};

// ---- memory

enum class Kind { Input, Output, Threadgroup };

// One access, kept to be compared with later ones.
struct Mark {
  uint32_t group = 0;
  uint32_t epoch = 0;       // barriers of the right memory kind that the group has passed
  uint32_t pc = 0;          // from the start of the kernel's library
  uint16_t who = 0;         // 0 nobody, else see the constants below
  uint16_t simd_epoch = 0;  // the same count for simdgroup_barrier
};
constexpr uint16_t kManyOfSimdgroup = 0x4000;  // + its index: several of its lanes
constexpr uint16_t kMany = 0xffff;             // lanes of several simdgroups
// Everything else is 1 + the thread's index.

// The last write, reads and atomic accesses. Atomic ones have a mark of their own, because
// they must not hide a plain access before them from other threads' atomic ones.
struct ByteState {
  Mark write, read, atomic;
  bool atomic_wrote = false;
  bool initialised = false;
};

struct Range {
  char* begin;
  char* end;
  Kind kind;
  std::string name;
  ByteState* bytes = nullptr;  // mapped lazily; null for inputs and where unchecked
  size_t group_of_contents = SIZE_MAX;  // threadgroup memory: whose contents these are
  int line = 0;
};

// ---- one run

struct Epochs {
  uint32_t device = 0;
  uint32_t threadgroup = 0;
};

struct Run {
  KernelEntry entry = nullptr;
  void** buffers = nullptr;
  bool checked = false;
  bool stopped = false;
  uintptr_t library = 0;  // where the kernel's shared object was loaded

  std::vector<Fiber> fibers;
  Fiber* current = nullptr;  // null while the scheduler itself runs
  bool in_atomic = false;    // the accesses that follow have been checked as one
  Context scheduler;
  int meeting_line = 0;  // of the SIMD-group function whose results are being computed

  std::vector<Range> ranges;
  size_t last_range = 0;

  uint32_t group = 0;
  Epochs barriers;                    // of the group
  std::vector<Epochs> simd_barriers;  // of each simdgroup

  std::vector<Finding> findings;
  uint64_t switches = 0, barrier_count = 0, simd_count = 0, accesses = 0;
};

extern Run run;

// ---- what the parts offer one another

void suspend(State why);                              // fibers.cpp
void prepare_fibers(unsigned count);                  // fibers.cpp
void start_fiber(Fiber& fiber);                       // fibers.cpp
void resume(Fiber& fiber);                            // fibers.cpp
void add_range(void* begin, size_t size, Kind kind, const char* name,
               bool initialised);                     // shadow.cpp
void drop_ranges();                                   // shadow.cpp
std::string place(const char* address, size_t size);  // shadow.cpp
enum Access { kRead = 1, kWrite = 2, kAtomic = 4 };
void check_access(const void* address, size_t size, int access, uintptr_t pc);
void* guarded_alloc(size_t size, size_t alignment);  // memory.cpp
void guarded_free(void* memory, size_t size, size_t alignment);
void run_groups(const unsigned grid[3], const unsigned threadgroup[3], uint64_t seed);
