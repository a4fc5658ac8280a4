"""The embedded backbone's architecture: a Swin of 3 M parameters for images of 32 x 32 pixels.

Swin Transformer: Liu et al. 2021, arXiv:2103.14030, by timm. What differs: two stages instead of four, windows of
4 x 4 tokens, and patches of 4 x 4 pixels made by three convolutions instead of one (Xiao et al. 2021,
"Early convolutions help transformers see better", arXiv:2106.14881), which robust training profits from at this size.
"""

from __future__ import annotations

from torch import Tensor, nn

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images
STD = (0.247, 0.243, 0.262)


class ConvStem(nn.Module):
    """Images of shape `[B, 3, H, W]` to tokens of shape `[B, H/4, W/4, width]`."""

    def __init__(self, width: int, image_size: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )
        self.n = nn.LayerNorm(width)
        # What timm's SwinTransformer asks its patch embedding for.
        self.img_size = (image_size, image_size)
        self.grid_size = (image_size // 4, image_size // 4)
        self.patch_size = (4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.n(self.f(images).permute(0, 2, 3, 1))


def micro_swin(
    num_classes: int = 10,
    *,
    image_size: int = 32,
    width: int = 96,
    depths: tuple[int, ...] = (2, 6),
    num_heads: tuple[int, ...] = (3, 6),
    window_size: int = 4,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A timm SwinTransformer with a convolutional stem, randomly initialised; the defaults are the embedded shape."""
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=image_size,
        patch_size=4,
        window_size=window_size,
        embed_dim=width,
        depths=depths,
        num_heads=num_heads,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
    )
    model.patch_embed = ConvStem(width, image_size)
    return model
