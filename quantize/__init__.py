"""Weights in, packed weights out, and what that cost (imported as `fastvlm_mlx.quantize`)."""
