"""keep="auto" with adapt="pixels": a budget for each image that its pixels alone decide.

Counts must be known before the tower runs where prompts are laid out by another process (vLLM), or
where images are to be sorted by length. A patch that is (nearly) equal to two of those next to it
says nothing new; every other patch is worth a token, and so are sixteen of the former. Pages and
screens are mostly blank, photos are not. (That the ends of a run count and blank patches are worth
a sixteenth was chosen on the bundled model's validation scenes: without, 51 tokens instead of 59
and twice the loss.)

Everything is counted in whole numbers, so that it comes out the same on every device.

Axes: F frames, H x W pixels, P pixels of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Grey levels that the range of an image is divided into, and by how many of them two patches may
# differ on average: above the noise of JPEG, below a thin line or a letter.
LEVELS = 255
TOLERANCE = 5
# Patches that say nothing new, for a token.
BLANK = 16
# Fractions between the largest and the smallest, so that images of a batch share them.
STEPS = 12


def distinct_share(pixels: Tensor, grid: tuple[int, int]) -> float:
    """Share of an image's patches that are like less than two of their (up to four) neighbours.

    Args:
        pixels: [F, 3, H, W] of an image (F = 1) or of the frames of a video, scaled in any way.
        grid: (rows, columns) of the patches.
    """
    rows, columns = grid
    high, wide = pixels.shape[-2] // rows, pixels.shape[-1] // columns
    plain = pixels[..., : rows * high, : columns * wide].float()
    low, top = plain.amin(), plain.amax()
    levels = ((plain - low) * (LEVELS / (top - low).clamp(min=1e-12))).round().to(torch.int32)
    patches = levels.reshape(*levels.shape[:2], rows, high, columns, wide)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
    most = TOLERANCE * patches.shape[-1]
    down = (patches[:, 1:] - patches[:, :-1]).abs().sum(-1) <= most
    right = (patches[:, :, 1:] - patches[:, :, :-1]).abs().sum(-1) <= most
    alike = torch.zeros(patches.shape[:3], dtype=torch.int32, device=pixels.device)
    alike[:, 1:] += down
    alike[:, :-1] += down
    alike[:, :, 1:] += right
    alike[:, :, :-1] += right
    return int((alike < 2).sum()) / alike.numel()


def kept_fractions(keep_range: tuple[float, float]) -> list[float]:
    """The fractions an image may keep, rising from the smallest to the largest."""
    fewest, most = keep_range
    steps = [most * (fewest / most) ** (step / STEPS) for step in range(1, STEPS)]
    return sorted({fewest, *steps, most})


def keep_of(pixels: Tensor, grid: tuple[int, int], keep_range: tuple[float, float]) -> float:
    """The fraction of its tokens that an image (or video) keeps.

    Args:
        pixels: as for `distinct_share`.
        grid: (rows, columns) of the patches.
        keep_range: the smallest and the largest fraction.
    """
    share = distinct_share(pixels, grid)
    wanted = share + (1 - share) / BLANK
    return next((one for one in kept_fractions(keep_range) if one >= wanted), keep_range[1])
