"""MONAI's `SwinUNETR`: a shifted-window transformer as encoder, residual convolution blocks as decoder (arXiv:2201.01266)."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from xaiseg.models.blocks import ResidualBlock
from xaiseg.models.layers import Conv, ConvTranspose, LayerNorm, check_norm
from xaiseg.models.remat import rematerialised
from xaiseg.models.swin import MERGINGS, PatchMerging, SwinBlock
from xaiseg.models.taps import Taps

STAGES = 4
_MULTIPLE = 2 ** (STAGES + 1)


class SwinUNETR(nn.Module):
    """Swin UNETR without dropout.

    Attributes:
      patch_merging: `legacy` (networks trained with MONAI up to 1.4), `merging` (from 1.5) or `mergingv2`; see `swin.MERGINGS`.
        The parameters have the same shapes, the logits differ: there is no default.
      feature_size: features at full resolution; stage `i` of 1 to 4 works on `feature_size · 2^(i-1)`.
      out_channels: classes of the logits.
      depths, num_heads: blocks and attention heads of each stage.
      attention_window: sides of the attention windows in tokens, an int or one int per axis.
      mlp_ratio: hidden features of a block's MLP over its features. qkv_bias: of the attention.
      norm: of the convolution blocks, see `layers.NORMS`.
      patch_norm: whether a layer norm follows the patch embedding.
      use_v2: Swin UNETR-V2, a residual convolution block before each stage, always with instance norm.
      normalize: whether a layer norm without parameters stands between the stages and the decoder.
      remat: recompute the blocks in the backward pass instead of keeping their activations; nothing else changes. On CPU it takes
        `XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false` to save memory: by default XLA recomputes too early.
      ndim: spatial axes, 3 or 2.
    """

    patch_merging: str
    feature_size: int = 24
    out_channels: int = 2
    depths: Sequence[int] = (2, 2, 2, 2)
    num_heads: Sequence[int] = (3, 6, 12, 24)
    attention_window: int | Sequence[int] = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm: str = "instance"
    patch_norm: bool = False
    use_v2: bool = False
    normalize: bool = True
    remat: bool = False
    ndim: int = 3

    @nn.compact
    def __call__(
        self, x: Array, offsets: Mapping[str, Array] | None = None, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Logits `(N, *spatial, out_channels)` and the named taps for `x` `(N, *spatial, C)`, each side a multiple of 32.

        Taps are `patch_embed`, `stage{1..4}.block{j}`, `stage{1..4}` after merging, `hidden{0..4}`, which the decoder is given,
        `encoder{1,2,3,4,10}`, `decoder{5..1}.up`, `decoder{5..1}` and `logits`; with `use_v2` also `stage{1..4}.residual`; and
        `.conv1`, `.conv2` inside every convolution block. Raises ValueError for a grid or options that do not fit.
        """
        self._check(x.shape[1:-1])
        taps = Taps(offsets)

        def convolve(name: str, block: nn.Module, *inputs: Array) -> Array:
            inner = taps.within(name)
            # the backward pass starts with the last block: computing it again would keep the same activations, twice
            if self.remat and name != "decoder1":
                return taps(name, rematerialised(block, *inputs, tap=inner, train=train))
            return taps(name, block(*inputs, inner, train))

        def encoder(name: str, y: Array, features: int) -> Array:
            return convolve(name, _residual_block(features, self.ndim, self.norm, name), y)

        def decoder(name: str, y: Array, skip: Array) -> Array:
            return convolve(name, UpBlock(self.norm, name=name), y, skip)

        def hidden(i: int, y: Array) -> Array:
            return taps(f"hidden{i}", LayerNorm(affine=False, name=f"hidden{i}_norm")(y) if self.normalize else y)

        twos = (2,) * self.ndim
        y = Conv(self.feature_size, twos, twos, padding=(0,) * self.ndim, name="patch_embed")(x)
        y = taps("patch_embed", LayerNorm(name="patch_embed_norm")(y) if self.patch_norm else y)
        outputs = [hidden(0, y)]
        for i in range(1, STAGES + 1):
            if self.use_v2:
                block = _residual_block(y.shape[-1], self.ndim, "instance", f"stage{i}_residual")
                y = convolve(f"stage{i}.residual", block, y)
            y = self._stage(i, y, taps)
            outputs.append(hidden(i, y))

        f = self.feature_size
        skips = [
            encoder("encoder1", x, f),
            encoder("encoder2", outputs[0], f),
            encoder("encoder3", outputs[1], 2 * f),
            encoder("encoder4", outputs[2], 4 * f),
            outputs[3],
        ]
        y = encoder("encoder10", outputs[4], 16 * f)
        for i in range(5, 0, -1):
            y = decoder(f"decoder{i}", y, skips[i - 1])
        ones = (1,) * self.ndim
        return taps("logits", Conv(self.out_channels, ones, ones, name="out")(y)), taps.values

    def _stage(self, i: int, y: Array, taps: Taps) -> Array:
        swin_block, merging = (nn.remat(SwinBlock), nn.remat(PatchMerging)) if self.remat else (SwinBlock, PatchMerging)
        for j in range(self.depths[i - 1]):
            block = swin_block(
                self.num_heads[i - 1],
                self._window,
                shifted=j % 2 == 1,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                remat=self.remat,
                name=f"stage{i}_block{j}",
            )
            y = taps(f"stage{i}.block{j}", block(y))
        return taps(f"stage{i}", merging(self.patch_merging, name=f"stage{i}_merge")(y))

    @property
    def _window(self) -> tuple[int, ...]:
        window = self.attention_window
        return (window,) * self.ndim if isinstance(window, int) else tuple(window)

    @property
    def tile_alignment(self) -> tuple[int, ...]:
        """What each side of a grid must be a multiple of."""
        return (_MULTIPLE,) * self.ndim

    def _check(self, grid: Sequence[int]) -> None:
        check_norm(self.norm)
        if self.patch_merging not in MERGINGS:
            raise ValueError(f"patch_merging is {self.patch_merging!r}; known are {', '.join(MERGINGS)}")
        if len(self.depths) != STAGES or len(self.num_heads) != STAGES:
            raise ValueError(
                f"depths {self.depths} and num_heads {self.num_heads} must have one value for each of {STAGES} stages"
            )
        if any(self.feature_size * 2**i % heads for i, heads in enumerate(self.num_heads)):
            raise ValueError(
                f"feature_size {self.feature_size} times 1, 2, 4, 8 cannot be split into {self.num_heads} heads"
            )
        if len(self._window) != self.ndim or len(grid) != self.ndim:
            raise ValueError(f"a window of {self._window} and a grid of {tuple(grid)} must have {self.ndim} sides")
        if any(n % _MULTIPLE for n in grid):
            raise ValueError(f"a grid of {tuple(grid)} does not fit: each side must be a multiple of {_MULTIPLE}")


class UpBlock(nn.Module):
    """Double the grid, append the skip connection, convolve: MONAI's `UnetrUpBlock`. Taps `up` and those of `conv_block`."""

    norm: str

    @nn.compact
    def __call__(self, x: Array, skip: Array, tap: Taps, train: bool = False) -> Array:
        ndim, features = x.ndim - 2, skip.shape[-1]
        up = ConvTranspose(features, (2,) * ndim, (2,) * ndim, use_bias=False, padding=(0,) * ndim, name="up")
        joined = jnp.concatenate([tap("up", up(x)), skip], axis=-1)
        return _residual_block(features, ndim, self.norm, "conv_block")(joined, tap, train)


def _residual_block(features: int, ndim: int, norm: str, name: str) -> ResidualBlock:
    return ResidualBlock(features, (3,) * ndim, (1,) * ndim, norm, name=name)
