"""From pixels to tokens and from stage to stage, channels-last: ``(B, H, W, C)`` in and out."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn

from .norm import LayerNorm, before_linear, conv_norm

__all__ = ["ChannelsLastConv2d", "ConvDownsample", "ConvPatchEmbed", "DepthwiseConv2d"]


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution of ``(B, H, W, C)`` maps; arguments and weights are ``nn.Conv2d``'s.

    The permutations are views: a channels-last map is already what the convolution libraries call ``channels_last``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(B, H, W, C)`` to ``(B, H', W', C')``."""
        x = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias)
        return x.permute(0, 2, 3, 1)


class DepthwiseConv2d(ChannelsLastConv2d):
    """A depthwise convolution of ``(B, H, W, C)`` maps that keeps their size.

    Args:
        dim: Channels, C.
        kernel_size: Side of the filters, odd.
        bias: Whether to add a bias.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(
            dim, dim, kernel_size, padding=(kernel_size - 1) // 2, groups=dim, bias=bias, device=device, dtype=dtype
        )


class ConvPatchEmbed(nn.Module):
    """Overlapping patches: two strided 3x3 convolutions, each with a norm, GELU between them.

    Args:
        patch_size: Total stride, even; the kernels are ``patch_size / 2 + 1`` wide.
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens, C.
        norm_layer: Norm over channels, or None.
        act_layer: Activation between the convolutions.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer=LayerNorm,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        stride = patch_size // 2
        self.minimum = [1, 1]
        conv = partial(ChannelsLastConv2d, kernel_size=stride + 1, stride=stride, padding=1, **dd)
        self.conv1 = conv(in_chans, embed_dim // 2)
        norm1 = norm_layer(embed_dim // 2, **dd) if norm_layer is not None else nn.Identity()
        self.norm1 = before_linear(norm1)
        self.act = act_layer()
        self.conv2 = conv(embed_dim // 2, embed_dim)
        self.norm2 = norm_layer(embed_dim, **dd) if norm_layer is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images ``(B, in_chans, height, width)`` as ``(B, H, W, C)``."""
        x = x.permute(0, 2, 3, 1).contiguous()
        if not torch.jit.is_scripting():
            return conv_norm(self.act(conv_norm(x, self.conv1, self.norm1)), self.conv2, self.norm2)
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class ConvDownsample(nn.Module):
    """Halve the resolution by a strided convolution and a norm.

    Args:
        dim: Channels in.
        out_dim: Channels out.
        kernel_size: 3 (overlapping, padded) or 2.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int = 3, norm_layer=LayerNorm, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = ChannelsLastConv2d(dim, out_dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2, **dd)
        self.norm = norm_layer(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, H, W, dim)`` to ``(B, ~H/2, ~W/2, out_dim)``."""
        if not torch.jit.is_scripting():
            return conv_norm(x, self.conv, self.norm)
        return self.norm(self.conv(x))
