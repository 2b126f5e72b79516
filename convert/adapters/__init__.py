"""Adapters of PEFT and mlx-lm to ours, and back."""
