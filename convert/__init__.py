"""Foreign checkpoints to this project's weight names and configurations.

rules.py holds the machine, sources/ one table and config reader per source. Installed
as mm1_mlx.convert, so imports inside are relative.
"""
