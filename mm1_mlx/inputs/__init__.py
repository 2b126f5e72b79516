"""Everything before the model: pictures, prompts, tokens. Import its modules directly.

This file stays empty of imports: prompts.py must not bring in Pillow or MLX.
"""
