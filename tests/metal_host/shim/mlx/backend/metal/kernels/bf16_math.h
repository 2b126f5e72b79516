// Instead of MLX's file, which needs intrinsics of Apple's compiler: msl_math.h has
// these overloads.
#pragma once
