"""The model as pure maths: no files, no tokenizer, no printing.

Letters in shapes: B batch, N images (tiles count), H W pixels, G patches per side,
P = G*G patches, S = sqrt(Q) side of the pooled grid, Q tokens per image, T tokens,
L sequence with image slots, D decoder width, Dv encoder width, F feed-forward width,
E experts, K = top_k, V vocabulary. Arrays are channels-last.
"""
