// Running something that may fault.
#pragma once
#include <cstdint>

struct Fault {
  int signal;
  void* address;
  uintptr_t pc;
};

// False where a signal ended the function; then *fault says which.
bool run_catching_faults(void (*function)(void*), void* argument, Fault* fault);
