"""What `python -m mm1_mlx.benchmark` measures, one module per subject."""
