"""Weights in, quantized weights out (imported as `fastvlm_mlx.quantize`). Empty so far."""
