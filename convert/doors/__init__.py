"""The commands behind `python -m mm1_mlx.convert NAME`."""
