"""Low-rank adapters: on which weights, their layers, their files, and fusing them."""
