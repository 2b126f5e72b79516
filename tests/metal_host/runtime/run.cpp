// The entry points for Python (launch.py): one run of a kernel, and its findings.
#include <dlfcn.h>
#include <signal.h>

#include <cstdio>
#include <cstring>

#include "faults.h"
#include "state.h"

static std::string formatted(const char* format, va_list arguments) {
  char text[512];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

static void add_finding(const char* kind, int line, uintptr_t pc, uintptr_t other,
                        const std::string& message) {
  for (Finding& known : run.findings) {
    if (known.line == line && known.pc == pc && known.message == message) {
      known.count++;
      return;
    }
  }
  std::string example;
  if (run.current) {
    example = "thread " + std::to_string(run.current->thread.thread_index_in_threadgroup) +
              " of threadgroup " + std::to_string(run.group);
  }
  run.findings.push_back({kind, message, line, pc, other, example, 1});
}

void report(const char* kind, int line, uintptr_t pc, uintptr_t other, const char* format,
            ...) {
  va_list arguments;
  va_start(arguments, format);
  add_finding(kind, line, pc, other, formatted(format, arguments));
  va_end(arguments);
}

void report_and_stop(const char* kind, int line, uintptr_t pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add_finding(kind, line, pc, 0, formatted(format, arguments));
  va_end(arguments);
  run.stopped = true;
  suspend(State::Done);
}

static void report_fault(const Fault& fault) {
  const char* address = static_cast<const char*>(fault.address);
  const Fiber* fiber = run.current;
  std::string message;
  const char* kind = "out-of-bounds";
  if (fault.signal == SIGFPE) {
    kind = "undefined";
    message = "integer division by zero or overflow";
  } else if (fault.signal == SIGILL || fault.signal == SIGTRAP) {
    kind = "undefined";
    message = "runs into what the compiler has proven to be undefined";
  } else if (fiber && address >= fiber->stack && address < fiber->stack + kStackSize) {
    kind = "limit";
    message = "overflows the stack of " + std::to_string(kStackSize >> 10) + " KB";
  } else {
    message = "touches memory, " + place(address, 1);
  }
  // +1: the others are return addresses, one past the instruction that is meant.
  add_finding(kind, 0, fault.pc + 1, 0, message);
}

// Bytes of outputs that nobody wrote hold whatever was there before.
static void report_unwritten() {
  for (const Range& range : run.ranges) {
    if (range.kind != Kind::Output || !range.bytes) continue;
    const size_t size = static_cast<size_t>(range.end - range.begin);
    size_t missing = 0, first = 0;
    for (size_t i = 0; i < size; i++) {
      if (range.bytes[i].initialised) continue;
      if (!missing) first = i;
      missing++;
    }
    if (missing) {
      report("never-written", 0, 0, 0,
             "%zu of %zu bytes of the output '%s' are never written, the first at byte %zu",
             missing, size, range.name.c_str(), first);
    }
  }
}

struct Launch {
  const unsigned* grid;
  const unsigned* threadgroup;
  uint64_t seed;
};

static void launch(void* argument) {
  const Launch* what = static_cast<const Launch*>(argument);
  run_groups(what->grid, what->threadgroup, what->seed);
}

#pragma GCC visibility push(default)
extern "C" {

struct MslBuffer {
  void* pointer;  // what the kernel gets
  void* begin;    // where its memory starts: before `pointer` for negative strides
  msl_size_t size;
  const char* name;
  int is_output;
  int is_initialised;
};

struct MslStatistics {
  uint64_t switches, barriers, simd_functions, accesses;
};

struct MslFinding {
  const char* kind;
  const char* message;
  const char* example;
  int line;
  uintptr_t pc;     // from the start of the library, or 0
  uintptr_t other;  // the same
  uint64_t count;
};

void* msl_alloc(msl_size_t size) { return guarded_alloc(size, 16); }
void msl_free(void* memory, msl_size_t size) { guarded_free(memory, size, 16); }

// The number of findings; msl_finding(i) gives each.
int msl_run(KernelEntry entry, const MslBuffer* buffers, int count, const unsigned* grid,
            const unsigned* threadgroup, int checked, uint64_t seed,
            MslStatistics* statistics) {
  run.findings.clear();
  run.entry = entry;
  run.checked = checked != 0;
  run.stopped = false;
  run.in_atomic = false;
  run.switches = run.barrier_count = run.simd_count = run.accesses = 0;
  Dl_info info = {};
  dladdr(reinterpret_cast<void*>(entry), &info);
  run.library = reinterpret_cast<uintptr_t>(info.dli_fbase);

  std::vector<void*> pointers;
  for (int i = 0; i < count; i++) {
    const MslBuffer& buffer = buffers[i];
    pointers.push_back(buffer.pointer);
    add_range(buffer.begin, buffer.size, buffer.is_output ? Kind::Output : Kind::Input,
              buffer.name, buffer.is_initialised);
  }
  run.buffers = pointers.data();

  Launch what{grid, threadgroup, seed};
  Fault fault;
  if (!run_catching_faults(launch, &what, &fault)) {
    report_fault(fault);
    run.stopped = true;
  }
  run.current = nullptr;
  if (!run.stopped) report_unwritten();
  drop_ranges();
  *statistics = {run.switches, run.barrier_count, run.simd_count, run.accesses};
  return static_cast<int>(run.findings.size());
}

void msl_finding(int index, MslFinding* out) {
  const Finding& finding = run.findings[static_cast<size_t>(index)];
  const auto offset = [](uintptr_t pc) { return pc > run.library ? pc - run.library : 0; };
  *out = {finding.kind,    finding.message.c_str(),
          finding.example.c_str(), finding.line,
          offset(finding.pc),      offset(finding.other),
          finding.count};
}

void msl_report_lane(const char* message) {
  report("divergence", run.meeting_line, 0, 0, "%s", message);
}
}
#pragma GCC visibility pop
