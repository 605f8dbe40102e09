"""Vision features to decoder embeddings: LLaVA's `mlp2x_gelu`, or one linear layer.

Knows shapes only. Source: apple/ml-fastvlm `llava/model/multimodal_projector/builder.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import ProjectorConfig
from fastvlm_mlx.model.layers import gelu


class Projector(nn.Module):
    """`linear_1`, and for mlp2x_gelu exact GELU and `linear_2`; both may be quantized."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.in_dim, config.out_dim)
        if config.kind == "mlp2x_gelu":
            self.linear_2 = nn.Linear(config.out_dim, config.out_dim)

    def __call__(self, features: mx.array) -> mx.array:
        """Return embeddings [B,n,H] of `features` [B,n,C]."""
        x = self.linear_1(features.reshape(-1, features.shape[-1]))
        if "linear_2" in self:
            x = self.linear_2(gelu(x))
        return x.reshape(*features.shape[:-1], x.shape[-1])
