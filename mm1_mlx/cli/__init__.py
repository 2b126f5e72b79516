"""What the doors (`python -m mm1_mlx.generate` and its sisters) share.

Only the standard library is imported at the top of these modules: `--help` and a
usage error must not wait for MLX.
"""
