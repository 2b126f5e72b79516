// The whole runtime as one unit: it is built at first use, and so compiles fastest.
#include "fibers.cpp"
#include "shadow.cpp"
#include "hooks.cpp"
#include "memory.cpp"
#include "scheduler.cpp"
#include "run.cpp"
