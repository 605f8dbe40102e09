"""Any source checkpoint → an artifact folder (imported as `fastvlm_mlx.convert`). Empty so far."""
