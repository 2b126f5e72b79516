// What a compiled kernel and the runtime call of each other.
//
// Kernels see no header of libc or libstdc++: there `exp` or `max` could silently be
// the host's function instead of Metal's.
#pragma once

typedef unsigned long msl_size_t;

// All thread attributes of MSL that MLX can pass, under MSL's own names.
struct MslThread {
  unsigned thread_position_in_grid[3];
  unsigned thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3];
  unsigned threads_per_threadgroup[3];           // of this group: edge groups are smaller
  unsigned dispatch_threads_per_threadgroup[3];  // of a whole group
  unsigned threads_per_grid[3];
  unsigned threadgroups_per_grid[3];
  unsigned grid_origin[3];
  unsigned grid_size[3];
  unsigned thread_index_in_threadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup;
  unsigned thread_index_in_quadgroup;
  unsigned quadgroup_index_in_threadgroup;
  unsigned quadgroups_per_threadgroup;
  unsigned dispatch_quadgroups_per_threadgroup;
  unsigned threads_per_simdgroup;
  unsigned thread_execution_width;
};

enum MslScope { MSL_THREADGROUP = 0, MSL_SIMDGROUP = 1 };

// The values of metal::mem_flags that order memory.
enum MslMemory { MSL_MEM_DEVICE = 1, MSL_MEM_THREADGROUP = 2 };

enum MslAtomic { MSL_ATOMIC_LOAD = 0, MSL_ATOMIC_STORE = 1, MSL_ATOMIC_RMW = 2 };

// The runtime is loaded globally, so it hides all else that it defines.
#pragma GCC visibility push(default)
extern "C" {

// Blocks the calling lane until its simdgroup's lanes are all here. Then `combine` gets
// the 32 frames (null for an inactive lane) and fills in each lane's result.
void msl_simd(int line, int column, const char* what, void* frame,
              void (*combine)(void** frames));

// threadgroup_barrier or simdgroup_barrier; flags: a sum of MslMemory.
void msl_barrier(int line, int column, int flags, int scope);

// The memory of a threadgroup variable; the same for all threads of a group.
void* msl_threadgroup_memory(msl_size_t size, const char* name, int line);

// Brackets an atomic access, which is made by plain memory operations in between.
void msl_atomic_begin(const void* address, msl_size_t size, int kind);
void msl_atomic_end();

// The matrix functions of MSL need 32 lanes, and a shuffle its source lane.
void msl_report_lane(const char* message);

// The attributes of the running thread.
const MslThread* msl_thread();
}
#pragma GCC visibility pop
