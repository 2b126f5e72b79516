"""Sides that another Python runs: these files import nothing of mm1_mlx.

A side is started as `PYTHON FILE TASK`; TASK and the last line of stdout are JSON
objects. Beside its own program it may import side_kit, which stands in this folder.
"""
