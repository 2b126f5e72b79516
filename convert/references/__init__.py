"""The originals in PyTorch, for `verify` alone: transformers where it has the part.

Nothing here is used to answer, train or convert, and only this room and verify.py may
import torch.
"""
