"""Kernels of the kinds that people write, which the harness must find sound.

Each file has a kernel's source and a function that calls it, in the way a library
would. The tests compare them with plain MLX, and plant bugs in some of them.
"""
