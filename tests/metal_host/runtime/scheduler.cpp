// Who runs next. One threadgroup at a time; a schedule is chosen by a seed:
//   0          all simdgroups advance together, in order
//   odd        one simdgroup runs as far as it can, then another one
//   even       a simdgroup is chosen anew at every step
//   over 1000  the same, and lanes run in random order too
// Groups run in random order except for seed 0.
#include <algorithm>

#include "state.h"

constexpr uint64_t kShuffleLanes = 1000;

namespace {

struct Random {  // xorshift: the same schedule for the same seed on every machine
  uint64_t state;
  explicit Random(uint64_t seed) : state(88172645463325252ull + seed * 7919) {}
  uint64_t below(uint64_t limit) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % limit;
  }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; i--) std::swap(values[i - 1], values[below(i)]);
  }
};

bool same_site(const Fiber& a, const Fiber& b) {
  return a.line == b.line && a.column == b.column && a.state == b.state;
}

bool earlier_site(const Fiber& a, const Fiber& b) {
  return a.line != b.line ? a.line < b.line : a.column < b.column;
}

bool waits_for_lanes(const Fiber& fiber) {
  return fiber.state == State::AtSimdFunction || fiber.state == State::AtSimdBarrier;
}

class Group {
 public:
  Group(unsigned threads, uint64_t seed, Random& random)
      : threads_(threads),
        simdgroups_((threads + kSimdWidth - 1) / kSimdWidth),
        seed_(seed),
        random_(random),
        order_(threads) {
    for (unsigned i = 0; i < threads; i++) order_[i] = i;
  }

  void run_to_the_end() {
    while (!run.stopped) {
      const int chosen = seed_ ? choose_simdgroup() : -1;
      bool progress = run_lanes(chosen);
      if (run.stopped) return;
      for (unsigned s = 0; s < simdgroups_; s++) {
        if (chosen < 0 || static_cast<int>(s) == chosen) progress |= meet(s);
      }
      if (!progress && !pass_barrier()) return;
    }
  }

 private:
  unsigned first_lane(unsigned simdgroup) const { return simdgroup * kSimdWidth; }
  unsigned end_lane(unsigned simdgroup) const {
    return std::min(threads_, (simdgroup + 1) * kSimdWidth);
  }

  bool can_move(unsigned simdgroup) const {
    for (unsigned i = first_lane(simdgroup); i < end_lane(simdgroup); i++) {
      const State state = run.fibers[i].state;
      if (state != State::Done && state != State::AtBarrier) return true;
    }
    return false;
  }

  int choose_simdgroup() {
    if (seed_ > kShuffleLanes) random_.shuffle(order_);
    if (seed_ % 2 && last_ >= 0 && can_move(static_cast<unsigned>(last_))) return last_;
    std::vector<int> movable;
    for (unsigned s = 0; s < simdgroups_; s++) {
      if (can_move(s)) movable.push_back(static_cast<int>(s));
    }
    if (movable.empty()) return -1;
    last_ = movable[random_.below(movable.size())];
    return last_;
  }

  bool run_lanes(int simdgroup) {
    bool any = false;
    for (unsigned i : order_) {
      if (simdgroup >= 0 && static_cast<int>(i / kSimdWidth) != simdgroup) continue;
      if (run.fibers[i].state != State::Ready) continue;
      any = true;
      resume(run.fibers[i]);
      if (run.stopped) break;
    }
    return any;
  }

  // Completes one SIMD-group function or simdgroup_barrier, where lanes wait for one.
  // Lanes at different places are served in the order of the source, as a GPU would
  // run the branches one after the other, and reported.
  bool meet(unsigned simdgroup) {
    const unsigned begin = first_lane(simdgroup), end = end_lane(simdgroup);
    const Fiber* site = nullptr;
    unsigned live = 0;
    for (unsigned i = begin; i < end; i++) {
      const Fiber& fiber = run.fibers[i];
      if (fiber.state != State::Done) live++;
      if (waits_for_lanes(fiber) && (!site || earlier_site(fiber, *site))) site = &fiber;
    }
    if (!site) return false;
    const Fiber at = *site;
    void* frames[kSimdWidth] = {};
    unsigned here = 0;
    for (unsigned i = begin; i < end; i++) {
      const Fiber& fiber = run.fibers[i];
      if (!same_site(fiber, at)) continue;
      frames[i - begin] = fiber.frame;
      here++;
    }
    report_meeting(at, here, live, end - begin);
    if (at.state == State::AtSimdFunction) {
      run.meeting_line = at.line;
      at.combine(frames);
      run.simd_count++;
    } else {
      if (at.flags & MSL_MEM_DEVICE) run.simd_barriers[simdgroup].device++;
      if (at.flags & MSL_MEM_THREADGROUP) run.simd_barriers[simdgroup].threadgroup++;
    }
    for (unsigned i = begin; i < end; i++) {
      if (same_site(run.fibers[i], at)) run.fibers[i].state = State::Ready;
    }
    return true;
  }

  static void report_meeting(const Fiber& at, unsigned here, unsigned live,
                             unsigned lanes) {
    if (here != live) {
      report("divergence", at.line, 0, 0, "%s is reached by %u of %u live lanes of a simdgroup",
             at.what, here, live);
    } else if (live < lanes) {
      // Defined in MSL (the others are inactive), and often meant.
      report("remark", at.line, 0, 0, "%s with %u of %u lanes already returned", at.what,
             lanes - live, lanes);
    }
  }

  // All that live wait at a threadgroup_barrier. False: none lives any more.
  bool pass_barrier() {
    const Fiber* first = nullptr;
    unsigned gone = 0;
    bool same = true;
    for (unsigned i = 0; i < threads_; i++) {
      const Fiber& fiber = run.fibers[i];
      if (fiber.state == State::Done) {
        gone++;
      } else if (!first) {
        first = &fiber;
      } else {
        same &= same_site(fiber, *first);
      }
    }
    if (!first) return false;
    if (!same) {
      report("divergence", first->line, 0, 0,
             "threads of a threadgroup wait at different barriers");
      run.stopped = true;
      return false;
    }
    if (gone) {
      report("divergence", first->line, 0, 0,
             "threadgroup_barrier is not reached by %u of %u threads", gone, threads_);
    }
    run.barrier_count++;
    if (first->flags & MSL_MEM_DEVICE) run.barriers.device++;
    if (first->flags & MSL_MEM_THREADGROUP) run.barriers.threadgroup++;
    for (unsigned i = 0; i < threads_; i++) {
      Fiber& fiber = run.fibers[i];
      if (fiber.state == State::AtBarrier) fiber.state = State::Ready;
    }
    return true;
  }

  const unsigned threads_, simdgroups_;
  const uint64_t seed_;
  Random& random_;
  std::vector<unsigned> order_;
  int last_ = -1;  // the simdgroup that ran last
};

void fill_attributes(MslThread& t, unsigned index, const unsigned at[3],
                     const unsigned size[3], const unsigned whole[3],
                     const unsigned grid[3], const unsigned groups[3]) {
  const unsigned position[3] = {index % size[0], index / size[0] % size[1],
                                index / size[0] / size[1]};
  for (int d = 0; d < 3; d++) {
    t.thread_position_in_threadgroup[d] = position[d];
    t.threadgroup_position_in_grid[d] = at[d];
    t.thread_position_in_grid[d] = at[d] * whole[d] + position[d];
    t.threads_per_threadgroup[d] = size[d];
    t.dispatch_threads_per_threadgroup[d] = whole[d];
    t.threads_per_grid[d] = t.grid_size[d] = grid[d];
    t.threadgroups_per_grid[d] = groups[d];
    t.grid_origin[d] = 0;
  }
  const unsigned threads = size[0] * size[1] * size[2];
  const unsigned dispatched = whole[0] * whole[1] * whole[2];
  t.thread_index_in_threadgroup = index;
  t.thread_index_in_simdgroup = index % kSimdWidth;
  t.simdgroup_index_in_threadgroup = index / kSimdWidth;
  t.simdgroups_per_threadgroup = (threads + kSimdWidth - 1) / kSimdWidth;
  t.dispatch_simdgroups_per_threadgroup = (dispatched + kSimdWidth - 1) / kSimdWidth;
  t.thread_index_in_quadgroup = index % 4;
  t.quadgroup_index_in_threadgroup = index / 4;
  t.quadgroups_per_threadgroup = (threads + 3) / 4;
  t.dispatch_quadgroups_per_threadgroup = (dispatched + 3) / 4;
  t.threads_per_simdgroup = t.thread_execution_width = kSimdWidth;
}

}  // namespace

// As dispatchThreads does: a group is at most the grid, and groups at the edge are cut.
void run_groups(const unsigned grid[3], const unsigned threadgroup[3], uint64_t seed) {
  unsigned whole[3], groups[3];
  for (int d = 0; d < 3; d++) {
    whole[d] = std::min(threadgroup[d], grid[d]);
    groups[d] = (grid[d] + whole[d] - 1) / whole[d];
  }
  prepare_fibers(whole[0] * whole[1] * whole[2]);
  std::vector<uint32_t> order(static_cast<size_t>(groups[0]) * groups[1] * groups[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<uint32_t>(i);
  Random random(seed);
  if (seed) random.shuffle(order);
  for (uint32_t group : order) {
    const unsigned at[3] = {group % groups[0], group / groups[0] % groups[1],
                            group / groups[0] / groups[1]};
    unsigned size[3];
    for (int d = 0; d < 3; d++) size[d] = std::min(whole[d], grid[d] - at[d] * whole[d]);
    const unsigned threads = size[0] * size[1] * size[2];
    run.group = group;
    run.barriers = Epochs();
    run.simd_barriers.assign((threads + kSimdWidth - 1) / kSimdWidth, Epochs());
    for (unsigned i = 0; i < threads; i++) {
      fill_attributes(run.fibers[i].thread, i, at, size, whole, grid, groups);
      start_fiber(run.fibers[i]);
    }
    Group(threads, seed, random).run_to_the_end();
    if (run.stopped) return;
  }
}
