// Shadow memory: what each byte of outputs and threadgroup memory has seen.
//
// Two accesses of different threads to one byte are ordered by a barrier that covers
// the kind of memory, and by nothing else. If one of them writes and they are not both
// atomic, unordered ones are a race, whatever values came out this time.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>

#include "state.h"

static const size_t kNear = 1 << 20;  // an address this close to a buffer was meant for it

void add_range(void* begin, size_t size, Kind kind, const char* name, bool initialised) {
  Range range{static_cast<char*>(begin), static_cast<char*>(begin) + size, kind, name};
  if (run.checked && kind != Kind::Input && size) {
    void* memory = mmap(nullptr, size * sizeof(ByteState), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) range.bytes = static_cast<ByteState*>(memory);
    if (range.bytes && initialised) {
      for (size_t i = 0; i < size; i++) range.bytes[i].initialised = true;
    }
  }
  run.ranges.push_back(range);
}

void drop_ranges() {
  for (Range& range : run.ranges) {
    const size_t size = static_cast<size_t>(range.end - range.begin);
    if (range.bytes) munmap(range.bytes, size * sizeof(ByteState));
    if (range.kind == Kind::Threadgroup) guarded_free(range.begin, size, 16);
  }
  run.ranges.clear();
  run.last_range = 0;
}

static Range* find_range(const char* address) {
  const auto holds = [&](const Range& range) {
    return address >= range.begin && address < range.end;
  };
  if (run.last_range < run.ranges.size() && holds(run.ranges[run.last_range])) {
    return &run.ranges[run.last_range];
  }
  for (size_t i = 0; i < run.ranges.size(); i++) {
    if (holds(run.ranges[i])) {
      run.last_range = i;
      return &run.ranges[i];
    }
  }
  return nullptr;
}

std::string place(const char* address, size_t size) {
  std::string nearest = "far from every buffer";
  size_t distance = kNear;
  for (const Range& range : run.ranges) {
    const size_t before = static_cast<size_t>(range.begin - address);
    const size_t past = static_cast<size_t>(address + size - range.end);
    if (address < range.begin && before < distance) {
      distance = before;
      nearest = "from " + std::to_string(before) + " bytes before '" + range.name + "'";
    } else if (address + size > range.end && past < distance) {
      distance = past;
      nearest = "up to " + std::to_string(past) + " bytes past the end of '" + range.name + "'";
    }
  }
  return nearest;
}

// Constant tables of the program live in the kernel's own library.
static bool is_in_library(const void* address) {
  static uintptr_t known_page = 0;
  static uintptr_t known_library = 0;
  const uintptr_t page = reinterpret_cast<uintptr_t>(address) >> 12;
  if (page == known_page && known_library == run.library) return true;
  Dl_info info;
  if (!dladdr(address, &info)) return false;
  if (reinterpret_cast<uintptr_t>(info.dli_fbase) != run.library) return false;
  known_page = page;
  known_library = run.library;
  return true;
}

static bool in_fibers(const char* address) {
  const char* stack = run.current->stack;
  if (address >= stack && address < stack + kStackSize) return true;
  const char* fibers = reinterpret_cast<const char*>(run.fibers.data());
  return address >= fibers && address < fibers + run.fibers.size() * sizeof(Fiber);
}

struct Accessor {  // who makes the access that is being checked
  uint16_t who;
  uint16_t simdgroup;
  uint32_t epoch;
  uint16_t simd_epoch;
};

static bool ordered(const Mark& mark, const Accessor& me, Kind kind) {
  // Threadgroup memory starts anew with each group; nothing orders groups.
  if (mark.group != run.group) return kind == Kind::Threadgroup;
  if (mark.who == me.who || mark.epoch != me.epoch) return true;
  if (mark.who == kMany) return false;
  const unsigned simdgroup = mark.who & kManyOfSimdgroup ? mark.who - kManyOfSimdgroup
                                                         : (mark.who - 1u) / kSimdWidth;
  return simdgroup == me.simdgroup && mark.simd_epoch != me.simd_epoch;
}

static void report_race(const Mark& mark, const char* now, const char* before,
                        const Range& range, uintptr_t pc) {
  const bool across = mark.group != run.group;
  report("race", 0, pc, run.library + mark.pc, "%s '%s' unordered with a %s%s", now,
         range.name.c_str(), before, across ? " by another threadgroup" : "");
}

// Adds a reader, or an atomic access, to those since the last barrier.
static void note(Mark& old, const Mark& mark, const Accessor& me) {
  const bool same_time = old.who && old.group == mark.group && old.epoch == mark.epoch;
  const uint16_t before = old.who;
  const bool ordered_before = same_time && ordered(old, me, Kind::Output);
  old = mark;
  if (!same_time || ordered_before || before == me.who) return;
  const bool lane_of_mine =
      before < kManyOfSimdgroup && (before - 1u) / kSimdWidth == me.simdgroup;
  const uint16_t lanes_of_mine = static_cast<uint16_t>(kManyOfSimdgroup + me.simdgroup);
  old.who = lane_of_mine || before == lanes_of_mine ? lanes_of_mine : kMany;
}

static void check_byte(ByteState& byte, const Range& range, const Accessor& me, int access,
                       uintptr_t pc) {
  const Mark mark{run.group, me.epoch, static_cast<uint32_t>(pc - run.library), me.who,
                  me.simd_epoch};
  const bool writes = access & kWrite, atomic = access & kAtomic;
  if ((access & kRead) && !byte.initialised) {
    report("uninitialised", 0, pc, 0, "reads '%s' before it was written",
           range.name.c_str());
    byte.initialised = true;  // once is enough
  }
  const char* now = writes ? "writes" : "reads";
  const auto compare = [&](const Mark& other, const char* what) {
    if (other.who && !ordered(other, me, range.kind)) {
      report_race(other, now, what, range, pc);
    }
  };
  compare(byte.write, "write");
  if (writes) compare(byte.read, "read");
  if (!atomic && (writes || byte.atomic_wrote)) compare(byte.atomic, "atomic access");
  if (atomic) {
    note(byte.atomic, mark, me);
    byte.atomic_wrote = byte.atomic_wrote || writes;
  } else if (writes) {
    byte.write = mark;
    byte.read = byte.atomic = Mark();
    byte.atomic_wrote = false;
  } else {
    note(byte.read, mark, me);
  }
  byte.initialised = byte.initialised || writes;
}

void check_access(const void* pointer, size_t size, int access, uintptr_t pc) {
  if (!run.checked || !run.current || run.in_atomic) return;
  const char* address = static_cast<const char*>(pointer);
  if (in_fibers(address)) return;
  run.accesses++;
  const char* verb = access & kWrite ? "writes" : "reads";
  Range* range = find_range(address);
  if (!range) {
    if (is_in_library(address)) {
      if (access & kWrite) {
        report("address-space", 0, pc, 0, "writes to a variable at program scope");
      }
      return;
    }
    report_and_stop("out-of-bounds", 0, pc, "%s %zu bytes, %s", verb, size,
                    place(address, size).c_str());
    return;
  }
  if (address + size > range->end) {
    report_and_stop("out-of-bounds", 0, pc, "%s %zu bytes, %s", verb, size,
                    place(address, size).c_str());
    return;
  }
  if (range->kind == Kind::Input) {
    if (access & kWrite) {
      report_and_stop("address-space", 0, pc, "writes to the input '%s'",
                      range->name.c_str());
    }
    return;
  }
  if (!range->bytes) return;
  const MslThread& thread = run.current->thread;
  const unsigned simdgroup = thread.simdgroup_index_in_threadgroup;
  const bool local = range->kind == Kind::Threadgroup;
  const Epochs& simd = run.simd_barriers[simdgroup];
  const Accessor me{static_cast<uint16_t>(1 + thread.thread_index_in_threadgroup),
                    static_cast<uint16_t>(simdgroup),
                    local ? run.barriers.threadgroup : run.barriers.device,
                    static_cast<uint16_t>(local ? simd.threadgroup : simd.device)};
  ByteState* bytes = range->bytes + (address - range->begin);
  for (size_t i = 0; i < size; i++) check_byte(bytes[i], *range, me, access, pc);
}

extern "C" void* msl_threadgroup_memory(msl_size_t size, const char* name, int line) {
  Range* found = nullptr;
  for (Range& range : run.ranges) {
    if (range.kind == Kind::Threadgroup && range.line == line && range.name == name) {
      found = &range;
    }
  }
  if (!found) {
    add_range(guarded_alloc(size, 16), size, Kind::Threadgroup, name, false);
    found = &run.ranges.back();
    found->line = line;
    size_t total = 0;
    for (const Range& range : run.ranges) {
      if (range.kind == Kind::Threadgroup) total += range.end - range.begin;
    }
    if (total > kMaxThreadgroupMemory) {
      report("limit", line, 0, 0,
             "%zu bytes of threadgroup memory, but an Apple GPU has %zu", total,
             kMaxThreadgroupMemory);
    }
  }
  if (found->group_of_contents != run.group) {
    // What the group before left is no more to be relied on than anything else: NaNs.
    found->group_of_contents = run.group;
    memset(found->begin, 0xff, size);
    if (found->bytes) memset(static_cast<void*>(found->bytes), 0, size * sizeof(ByteState));
  }
  return found->begin;
}

extern "C" void msl_atomic_begin(const void* address, msl_size_t size, int kind) {
  const uintptr_t pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const int access = kind == MSL_ATOMIC_LOAD    ? kRead
                     : kind == MSL_ATOMIC_STORE ? kWrite
                                                : kRead | kWrite;
  check_access(address, size, access | kAtomic, pc);
  run.in_atomic = true;
  // Fibers give way only where they wait: another thread cannot change the value.
  const uint32_t kSpins = 1 << 20;
  if (run.current && kind != MSL_ATOMIC_STORE && ++run.current->atomic_loads > kSpins) {
    report_and_stop("deadlock", 0, pc,
                    "spins on an atomic: no thread is promised to make progress "
                    "while another one waits for it");
  }
}

extern "C" void msl_atomic_end() { run.in_atomic = false; }
