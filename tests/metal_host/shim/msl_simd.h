// Barriers, SIMD-group and quad-group functions.
//
// A lane leaves its argument in a frame on its own stack and waits (msl_simd). When all
// live lanes of its simdgroup are there, one callback computes every lane's result.
#pragma once

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_device_and_threadgroup = 3,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<int>(a) | static_cast<int>(b));
}
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
  thread_scope_system
};

MSL_FN void threadgroup_barrier(mem_flags flags, MSL_HERE) {
  msl_barrier(line_, column_, static_cast<int>(flags), MSL_THREADGROUP);
}
MSL_FN void simdgroup_barrier(mem_flags flags, MSL_HERE) {
  msl_barrier(line_, column_, static_cast<int>(flags), MSL_SIMDGROUP);
}

template <class T>
struct msl_frame {
  T in;
  T out;
  int argument;
  T fill;
};

// All 32 lanes' frames, as the callbacks see them.
template <class T>
struct msl_lanes {
  msl_frame<T>** frames;

  explicit msl_lanes(void** all) : frames(reinterpret_cast<msl_frame<T>**>(all)) {}
  bool has(int lane) const { return lane >= 0 && lane < 32 && frames[lane]; }
  msl_frame<T>& operator[](int lane) const { return *frames[lane]; }

  // For shuffles: `lane` reads what `source` holds.
  void copy(int lane, int source) const {
    if (has(source)) {
      frames[lane]->out = frames[source]->in;
    } else if (source >= 0 && source < 32) {
      msl_report_lane("reads from an inactive lane");
    }
    // A source outside the simdgroup gives the lane its own value: undefined in MSL for
    // shuffle_up and shuffle_down, so nothing should use it.
  }
};

// Pairs lanes 16 apart, then 8, ...: as hardware reduces, in a tree.
template <class T, class F>
MSL_FN void msl_reduce(void** all, int first, int count, F combine) {
  const msl_lanes<T> lanes(all);
  T value[32];
  bool has[32];
  for (int i = 0; i < count; i++) {
    has[i] = lanes.has(first + i);
    if (has[i]) value[i] = lanes[first + i].in;
  }
  for (int apart = count / 2; apart; apart /= 2) {
    for (int i = 0; i < apart; i++) {
      if (!has[i + apart]) continue;
      value[i] = has[i] ? combine(value[i], value[i + apart]) : value[i + apart];
      has[i] = true;
    }
  }
  for (int i = 0; i < count; i++) {
    if (lanes.has(first + i)) lanes[first + i].out = value[0];
  }
}

#define MSL_REDUCTION(NAME, EXPRESSION)                                        \
  template <class T>                                                           \
  MSL_FN T simd_##NAME(T value, MSL_HERE) {                                    \
    msl_frame<T> frame{value, value, 0, value};                                \
    msl_simd(line_, column_, "simd_" #NAME, &frame, [](void** all) {           \
      msl_reduce<T>(all, 0, 32,                                                \
                    [](T a, T b) -> T { return static_cast<T>(EXPRESSION); }); \
    });                                                                        \
    return frame.out;                                                          \
  }                                                                            \
  template <class T>                                                           \
  MSL_FN T quad_##NAME(T value, MSL_HERE) {                                    \
    msl_frame<T> frame{value, value, 0, value};                                \
    msl_simd(line_, column_, "quad_" #NAME, &frame, [](void** all) {           \
      for (int first = 0; first < 32; first += 4) {                            \
        msl_reduce<T>(all, first, 4,                                           \
                      [](T a, T b) -> T { return static_cast<T>(EXPRESSION); }); \
      }                                                                        \
    });                                                                        \
    return frame.out;                                                          \
  }
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(product, a* b)
MSL_REDUCTION(max, metal::max(a, b))
MSL_REDUCTION(min, metal::min(a, b))
MSL_REDUCTION(and, a& b)
MSL_REDUCTION(or, a | b)
MSL_REDUCTION(xor, a ^ b)
#undef MSL_REDUCTION

// SOURCE: the lane that lane i reads from, by its argument n.
#define MSL_SHUFFLE(NAME, SOURCE)                                           \
  template <class T>                                                        \
  MSL_FN T NAME(T value, ushort argument, MSL_HERE) {                       \
    msl_frame<T> frame{value, value, argument, value};                      \
    msl_simd(line_, column_, #NAME, &frame, [](void** all) {                \
      const msl_lanes<T> lanes(all);                                        \
      for (int i = 0; i < 32; i++) {                                        \
        if (!lanes.has(i)) continue;                                        \
        const int n = lanes[i].argument;                                    \
        lanes.copy(i, SOURCE);                                              \
      }                                                                     \
    });                                                                     \
    return frame.out;                                                       \
  }
MSL_FN int msl_lane_in_range(int lane) {
  if (lane >= 32) msl_report_lane("names a lane over 31");
  return lane & 31;
}
MSL_SHUFFLE(simd_shuffle, msl_lane_in_range(n))
MSL_SHUFFLE(simd_broadcast, msl_lane_in_range(n))
MSL_SHUFFLE(simd_shuffle_xor, msl_lane_in_range(i ^ n))
MSL_SHUFFLE(simd_shuffle_down, i + n)
MSL_SHUFFLE(simd_shuffle_up, i - n)
MSL_SHUFFLE(simd_shuffle_rotate_down, (i + n) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (i - n) & 31)
MSL_SHUFFLE(quad_broadcast, (i & ~3) | (n & 3))
MSL_SHUFFLE(quad_shuffle, (i & ~3) | (n & 3))
MSL_SHUFFLE(quad_shuffle_xor, (i & ~3) | ((i ^ n) & 3))
MSL_SHUFFLE(quad_shuffle_down, (i & 3) + n < 4 ? i + n : i)
MSL_SHUFFLE(quad_shuffle_up, (i & 3) - n >= 0 ? i - n : i)
#undef MSL_SHUFFLE

// Lanes beyond the edge take `fill` from the lane that stands there, counted round.
template <class T>
MSL_FN T simd_shuffle_and_fill_down(T value, T fill, ushort delta, MSL_HERE) {
  msl_frame<T> frame{value, value, delta, fill};
  msl_simd(line_, column_, "simd_shuffle_and_fill_down", &frame, [](void** all) {
    const msl_lanes<T> lanes(all);
    for (int i = 0; i < 32; i++) {
      if (!lanes.has(i)) continue;
      const int source = i + lanes[i].argument;
      if (source < 32) {
        lanes.copy(i, source);
      } else {
        lanes[i].out = lanes.has(source - 32) ? lanes[source - 32].fill : lanes[i].fill;
      }
    }
  });
  return frame.out;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_up(T value, T fill, ushort delta, MSL_HERE) {
  msl_frame<T> frame{value, value, delta, fill};
  msl_simd(line_, column_, "simd_shuffle_and_fill_up", &frame, [](void** all) {
    const msl_lanes<T> lanes(all);
    for (int i = 0; i < 32; i++) {
      if (!lanes.has(i)) continue;
      const int source = i - lanes[i].argument;
      if (source >= 0) {
        lanes.copy(i, source);
      } else {
        lanes[i].out = lanes.has(source + 32) ? lanes[source + 32].fill : lanes[i].fill;
      }
    }
  });
  return frame.out;
}

template <class T>
MSL_FN T simd_broadcast_first(T value, MSL_HERE) {
  msl_frame<T> frame{value, value, 0, value};
  msl_simd(line_, column_, "simd_broadcast_first", &frame, [](void** all) {
    const msl_lanes<T> lanes(all);
    int first = 0;
    while (!lanes.has(first)) first++;
    for (int i = first; i < 32; i++) {
      if (lanes.has(i)) lanes.copy(i, first);
    }
  });
  return frame.out;
}

#define MSL_SCAN(NAME, START, EXPRESSION, INCLUSIVE)               \
  template <class T>                                               \
  MSL_FN T NAME(T value, MSL_HERE) {                               \
    msl_frame<T> frame{value, value, 0, value};                    \
    msl_simd(line_, column_, #NAME, &frame, [](void** all) {       \
      const msl_lanes<T> lanes(all);                               \
      T so_far = static_cast<T>(START);                            \
      for (int i = 0; i < 32; i++) {                               \
        if (!lanes.has(i)) continue;                               \
        const T a = so_far, b = lanes[i].in;                       \
        so_far = static_cast<T>(EXPRESSION);                       \
        lanes[i].out = INCLUSIVE ? so_far : a;                     \
      }                                                            \
    });                                                            \
    return frame.out;                                              \
  }
MSL_SCAN(simd_prefix_inclusive_sum, 0, a + b, true)
MSL_SCAN(simd_prefix_exclusive_sum, 0, a + b, false)
MSL_SCAN(simd_prefix_inclusive_product, 1, a* b, true)
MSL_SCAN(simd_prefix_exclusive_product, 1, a* b, false)
#undef MSL_SCAN

struct msl_votes {
  ulong yes;
  ulong active;
};
MSL_FN msl_votes msl_vote(bool mine, const char* what, int line, int column) {
  struct Frame {
    bool in;
    msl_votes out;
  } frame{mine, {0, 0}};
  msl_simd(line, column, what, &frame, [](void** all) {
    Frame** frames = reinterpret_cast<Frame**>(all);
    msl_votes votes{0, 0};
    for (int i = 0; i < 32; i++) {
      if (!frames[i]) continue;
      votes.active |= 1ul << i;
      if (frames[i]->in) votes.yes |= 1ul << i;
    }
    for (int i = 0; i < 32; i++) {
      if (frames[i]) frames[i]->out = votes;
    }
  });
  return frame.out;
}

struct simd_vote {
  using vote_t = ulong;
  ulong yes;

  explicit simd_vote(ulong votes = 0) : yes(votes) {}
  explicit operator ulong() const { return yes; }
  bool any() const { return yes != 0; }
  bool all() const { return yes == 0xffffffffu; }
};
MSL_FN simd_vote simd_ballot(bool mine, MSL_HERE) {
  return simd_vote(msl_vote(mine, "simd_ballot", line_, column_).yes);
}
MSL_FN simd_vote simd_active_threads_mask(MSL_HERE) {
  return simd_vote(msl_vote(true, "simd_active_threads_mask", line_, column_).yes);
}
MSL_FN bool simd_any(bool mine, MSL_HERE) {
  return msl_vote(mine, "simd_any", line_, column_).yes != 0;
}
MSL_FN bool simd_all(bool mine, MSL_HERE) {
  const msl_votes votes = msl_vote(mine, "simd_all", line_, column_);
  return votes.yes == votes.active;
}
MSL_FN bool simd_is_first(MSL_HERE) {
  const ulong active = msl_vote(true, "simd_is_first", line_, column_).active;
  return static_cast<uint>(__builtin_ctzl(active)) == msl_thread()->thread_index_in_simdgroup;
}
}  // namespace metal
