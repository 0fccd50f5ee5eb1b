"""Patches as a sequence of tokens, with a stride of their own."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import lecun_normal_, register_notrace_function, to_2tuple

from .checks import check_input
from .disjoint_patches import is_product_of_patches, product_of_patches

__all__ = ["StridedPatchEmbed"]

torch.fx.wrap("check_input")  # FX looks for leaf functions where forward is defined


@torch.fx.wrap
@register_notrace_function
def _check_size(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return ``x`` if its last two sizes are these."""
    if x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f"x: expected images of {height} x {width}, got {x.shape[2]} x {x.shape[3]}; create the model with "
            "img_size=(height, width), or with dynamic_img_size=True for images of any size"
        )
    return x


class StridedPatchEmbed(nn.Module):
    """One convolution from an image to a sequence of patch tokens in raster order.

    Pixels that do not fill a patch at the right and the bottom are not read, unless the image is padded there.

    Args:
        img_size: Image size, (height, width) or one for both.
        patch_size: Side of a patch.
        stride: Distance of neighbouring patches; ``patch_size`` if absent.
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens, C.
        strict_img_size: Take images of ``img_size`` only.
        pad: Pad images with zeros at the right and the bottom to whole patches.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride = to_2tuple(patch_size), to_2tuple(stride or patch_size)
        self.strict_img_size, self.pad = strict_img_size, pad
        self.minimum = [1, 1] if pad else list(self.patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another image size the nominal one."""
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if min(self.grid_size) < 1:
            raise ValueError(f"img_size: expected at least a patch of {self.patch_size}, got {self.img_size}")

    def init_weights(self) -> None:
        """Initialise the convolution as Vim does: LeCun normal, without bias."""
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the stride in pixels."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the patch grid, (rows, columns), of an image size."""
        height, width = img_size
        if self.pad:
            height, width = height + self.stride[0] - 1, width + self.stride[1] - 1
        return (
            (height - self.patch_size[0]) // self.stride[0] + 1,
            (width - self.patch_size[1]) // self.stride[1] + 1,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images ``(B, in_chans, height, width)`` as ``(B, L, C)``."""
        x = check_input(x, "(B, channels, height, width)", self.minimum)
        if self.strict_img_size:
            x = _check_size(x, self.img_size[0], self.img_size[1])
        if self.pad:
            bottom = (self.patch_size[0] - x.shape[2]) % self.stride[0]
            right = (self.patch_size[1] - x.shape[3]) % self.stride[1]
            x = F.pad(x, [0, right, 0, bottom])
        if not torch.jit.is_scripting():
            if is_product_of_patches(x, self.proj):
                return product_of_patches(x, self.proj).flatten(1, 2)
        return self.proj(x).flatten(2).transpose(1, 2)
