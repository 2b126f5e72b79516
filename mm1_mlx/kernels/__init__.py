"""One file per kernel: the definition in plain MLX, the fast version, the chooser."""
