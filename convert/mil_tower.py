"""FastViTHD as a Core ML program (MIL), NCHW, structured as Apple's own export of it.

Knows the network's operations, and the folds that make one operation of several: BatchNorm into
its depthwise 7x7, layer scales into the layer before them, attention's 1/sqrt(d) into q's rows.
Folds are made in float64 and rounded once. Knows no files and no checkpoint; imports coremltools
on use.

Sources: apple/ml-fastvlm `mci.py` (`fastvithd`), its `app/` and model export; coremltools' MIL
operations of iOS 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.checkpoint.fuse import BATCH_NORM_EPS, module_paths
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.vision import LAYER_NORM_EPS

INPUT_NAME = "images"
OUTPUT_NAME = "image_features"

Arrays = dict[str, NDArray[np.float32]]
ReadModule = Callable[[str], Arrays]
Var = Any  # coremltools' Var; the package has no types


def build_program(config: VisionConfig, read_module: ReadModule) -> Any:
    """Return the tower as a coremltools `Program` for iOS 16 with float32 weights.

    `read_module` returns the arrays of a module of `fuse.module_paths` in the inference form
    (`fuse.reparameterize_module`), float32, named relative to its path, convolutions OHWI. Input
    `images` [1,3,S,S], S the config's image_size; output `image_features` [1,(S/64)^2,2C].
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder

    # Names end in a count of the process, which coremltools starts anew behind a success only.
    Builder.name_count.clear()
    size = config.image_size
    network = _Network(Builder, config, read_module)

    @Builder.program(
        input_specs=[Builder.TensorSpec(shape=(1, 3, size, size))], opset_version=ct.target.iOS16
    )
    def program(images: Var) -> Var:
        return network.run(images)

    return program


def op_prefix(path: str) -> str:
    """Return what the names of all operations of the module at `path` begin with."""
    return path.replace(".", "_") + "_"


class _Network:
    """Adds each module's operations to the program being built."""

    def __init__(self, mb: Any, config: VisionConfig, read_module: ReadModule) -> None:
        self.mb = mb
        self.config = config
        self.read_module = read_module

    def run(self, x: Var) -> Var:
        for path in module_paths(self.config):
            name, weights = op_prefix(path), self.read_module(path)
            if path == "stem":
                x = self.stem(name, weights, x)
            elif path == "expansion":
                x = self.expansion(name, weights, x)
            elif path.endswith("downsample"):
                x = self.downsample(name, weights, x)
            elif path.endswith("pos_emb"):
                x = self.conv(name + "conv", x, *_unit(weights, ""), groups=x.shape[1])
            elif self.config.token_mixers[int(path.split(".")[1])] == "repmixer":
                x = self.repmixer_block(name, weights, x)
            else:
                x = self.attention_block(name, weights, x)
        return self.mb.transpose(x=self.tokens("", x), perm=[0, 2, 1], name=OUTPUT_NAME)

    def stem(self, name: str, weights: Arrays, x: Var) -> Var:
        dim = self.config.embed_dims[0]
        for i, stride, groups in (("0", 2, 1), ("1", 2, dim), ("2", 1, 1)):
            x = self.conv(name + i, x, *_unit(weights, i + "."), stride=stride, groups=groups)
            x = self.gelu(f"{name}{i}_gelu", x)
        return x

    def repmixer_block(self, name: str, weights: Arrays, x: Var) -> Var:
        x = self.conv(name + "mixer", x, *_unit(weights, "mixer."), groups=x.shape[1])
        return self.ffn(name, weights, x, weights["layer_scale"])

    def attention_block(self, name: str, weights: Arrays, x: Var) -> Var:
        mb, dim, (height, width) = self.mb, x.shape[1], x.shape[2:]
        head_dim, tokens = self.config.head_dim, height * width
        heads = dim // head_dim
        normed = mb.layer_norm(
            x=mb.transpose(x=self.tokens(name, x), perm=[0, 2, 1], name=name + "channels_last"),
            axes=[-1],
            gamma=weights["norm.weight"],
            beta=weights["norm.bias"],
            epsilon=np.float32(LAYER_NORM_EPS),
            name=name + "norm",
        )
        qkv = _wide(weights["qkv.weight"])
        qkv[:dim] *= head_dim**-0.5
        qkv = mb.linear(x=normed, weight=_single(qkv), name=name + "qkv")
        qkv = mb.reshape(x=qkv, shape=[1, tokens, 3 * heads, head_dim], name=name + "qkv_heads")
        qkv = mb.transpose(x=qkv, perm=[0, 2, 1, 3], name=name + "heads_first")
        q, k, v = mb.split(x=qkv, num_splits=3, axis=1, name=name + "split")
        scores = mb.matmul(x=q, y=k, transpose_y=True, name=name + "scores")
        scores = mb.softmax(x=scores, axis=-1, name=name + "softmax")
        mixed = mb.matmul(x=scores, y=v, name=name + "mixed")
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3], name=name + "tokens_first")
        mixed = mb.reshape(x=mixed, shape=[1, tokens, dim], name=name + "merged")
        scale = _wide(weights["layer_scale_1"]).reshape(-1)
        mixed = mb.linear(
            x=mixed,
            weight=_single(_wide(weights["proj.weight"]) * scale[:, None]),
            bias=_single(_wide(weights["proj.bias"]) * scale),
            name=name + "proj",
        )
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1], name=name + "channels_first")
        mixed = mb.reshape(x=mixed, shape=[1, dim, height, width], name=name + "grid")
        x = mb.add(x=x, y=mixed, name=name + "attended")
        return self.ffn(name, weights, x, weights["layer_scale_2"])

    def ffn(self, name: str, weights: Arrays, x: Var, layer_scale: NDArray[np.float32]) -> Var:
        name += "ffn_"
        y = self.conv(name + "conv", x, *_with_batch_norm(weights, "ffn.conv."), groups=x.shape[1])
        y = self.conv(name + "fc1", y, *_unit(weights, "ffn.fc1."))
        y = self.gelu(name + "gelu", y)
        weight, bias = _unit(weights, "ffn.fc2.")
        scale = _wide(layer_scale).reshape(-1)
        weight, bias = weight * scale[:, None, None, None], bias * scale
        return self.mb.add(x=x, y=self.conv(name + "fc2", y, weight, bias), name=name + "out")

    def downsample(self, name: str, weights: Arrays, x: Var) -> Var:
        """The 7x7 has several outputs a channel: as many groups as inputs."""
        x = self.conv(name + "0", x, *_unit(weights, "0."), stride=2, groups=x.shape[1])
        x = self.gelu(name + "0_gelu", x)
        return self.gelu(name + "1_gelu", self.conv(name + "1", x, *_unit(weights, "1.")))

    def expansion(self, name: str, weights: Arrays, x: Var) -> Var:
        mb = self.mb
        x = self.conv(name + "conv", x, *_unit(weights, "conv."), groups=x.shape[1])
        gate = mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True, name=name + "se_mean")
        gate = self.conv(name + "se_reduce", gate, *_unit(weights, "se.reduce."))
        gate = mb.relu(x=gate, name=name + "se_relu")
        gate = self.conv(name + "se_expand", gate, *_unit(weights, "se.expand."))
        gate = mb.sigmoid(x=gate, name=name + "se_gate")
        return self.gelu(name + "gelu", mb.mul(x=x, y=gate, name=name + "gated"))

    def conv(
        self,
        name: str,
        x: Var,
        weight: NDArray[np.float64],
        bias: NDArray[np.float64],
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> Var:
        """Convolve with an OIHW weight, padded so that stride 1 keeps the size."""
        return self.mb.conv(
            x=x,
            weight=_single(weight),
            bias=_single(bias),
            strides=[stride, stride],
            pad_type="custom",
            pad=[weight.shape[-1] // 2] * 4,
            groups=groups,
            name=name,
        )

    def gelu(self, name: str, x: Var) -> Var:
        return self.mb.gelu(x=x, mode="EXACT", name=name)

    def tokens(self, name: str, x: Var) -> Var:
        """View [1,C,H,W] as [1,C,H*W], row by row."""
        shape = [1, x.shape[1], x.shape[2] * x.shape[3]]
        return self.mb.reshape(x=x, shape=shape, name=name + "tokens")


def _wide(array: NDArray[np.float32]) -> NDArray[np.float64]:
    return array.astype(np.float64)


def _single(array: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.ascontiguousarray(array, np.float32)


def _oihw(weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Bring a convolution's weight OHWI, or a 1x1's as a matrix [O,I], to OIHW."""
    if weight.ndim == 2:
        weight = weight[:, None, None, :]
    return _wide(weight).transpose(0, 3, 1, 2)


def _unit(weights: Arrays, prefix: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (weight OIHW, bias) of a convolution."""
    return _oihw(weights[prefix + "weight"]), _wide(weights[prefix + "bias"])


def _with_batch_norm(
    weights: Arrays, prefix: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (weight OIHW, bias) of a bias-free convolution with the BatchNorm after it."""
    variance = _wide(weights[prefix + "bn.running_var"])
    scale = _wide(weights[prefix + "bn.weight"]) / np.sqrt(variance + BATCH_NORM_EPS)
    shift = _wide(weights[prefix + "bn.bias"]) - _wide(weights[prefix + "bn.running_mean"]) * scale
    return _oihw(weights[prefix + "conv.weight"]) * scale[:, None, None, None], shift
