"""From a tile's pixels to visual tokens: patch embedding, pixel shuffle, projector.

Legend: C patch width, D decoder width, S tile side (px), h and w patches per column and row.

Source: arXiv 2410.08202, section 3.1: x_v = MLP(PatchEmbed(I) + PE), one token per 28x28 px.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_internvl.configuration.model import MonoInternVLConfig, MonoInternVLVisionConfig


class PatchEmbedder(nn.Module):
    """Tiles to patch features: a convolution and a position embedding, no transformer layer.

    Row 0 of the position embedding and the class embedding belong to a class token, which stands
    in front where a vision tower follows. The monolithic model has none; its released checkpoints
    hold both all the same, so they are kept (and can never learn).
    """

    def __init__(self, config: MonoInternVLVisionConfig):
        super().__init__()
        self.patches_per_side = config.image_size // config.patch_size
        self.has_class_token = config.kind == "vit"
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(
            torch.empty(1, self.patches_per_side**2 + 1, config.hidden_size)
        )
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(
            pixel_values.to(self.patch_embedding.weight.dtype)
        )  # (tiles, C, h, w)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (tiles, h*w, C), row-major
        x = x + self.position_embeddings_for(height, width)
        if self.has_class_token:
            token = self.class_embedding + self.position_embedding[:, :1]
            x = torch.cat((token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        return x  # (tiles, h*w, C), or (tiles, 1 + h*w, C)

    def position_embeddings_for(self, height: int, width: int) -> Tensor:
        """(1, height * width, C): the configured tile's grid, resized bicubically if it differs."""
        grid = self.position_embedding[:, 1:]
        side = self.patches_per_side
        if (height, width) == (side, side):
            return grid
        planes = grid.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, side, side)
        planes = F.interpolate(planes, (height, width), mode="bicubic", align_corners=False)
        return planes.flatten(2).transpose(1, 2).to(grid.dtype)


def pixel_shuffle(x: Tensor, version: str = "v2") -> Tensor:
    """Merge 2x2 neighbouring patches into one token of four times the width.

    Args:
        x: (tiles, h, w, C) patch features; h and w even.
        version: "v2" keeps tokens row-major; "v1" is the transposed order of the first releases.

    Returns:
        (tiles, h/2 * w/2, 4C): upper left, upper right, lower left, lower right patch.
    """
    tiles, height, width, channels = x.shape
    x = x.reshape(tiles, height // 2, 2, width // 2, 2, channels)  # (tiles, R, r, Q, q, C)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.permute(order).reshape(tiles, height * width // 4, 4 * channels)


class ImageMarks(nn.Module):
    """Learned tokens that stand among those of pixels: what an image's rows and views end with.

    Source: XComposer2-4KHD has one newline for the rows of global view and tiles and one separator,
    as wide as merged patches, in front of its projector.
    """

    def __init__(self, width: int):
        super().__init__()
        self.newline = nn.Parameter(torch.empty(width))
        self.separator = nn.Parameter(torch.empty(width))

    def forward(self) -> Tensor:
        return torch.stack((self.separator, self.newline))  # (2, 4C): counted from the end


class VisualProjector(nn.Module):
    """Merged patches to the decoder's width: LayerNorm, Linear, GELU (erf), Linear."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__()
        merged, width = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
        self.norm = nn.LayerNorm(merged)
        self.fc1 = nn.Linear(merged, width)
        self.fc2 = nn.Linear(width, width)
        self.marks = ImageMarks(merged) if config.has_image_marks else None

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
