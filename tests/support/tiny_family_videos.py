"""Batches with videos for the tiny models of families, as their processors write them.

Frames follow a time stamp of their own, one token of text.
"""

from __future__ import annotations

import torch
from tiny_family import END, IMAGE, START, VIDEO

STAMPS = 20  # The word before the first frame.


def family_videos(
    name: str, *, frames: int = 3, grid=(8, 12), image: bool = False, shown=None, rows: int = 1
):
    """Rows of one video each, after an image if asked for.

    `shown` [frames x tokens] bool says which tokens of the video the prompt has (VideoLLaMA3).
    """
    generator = torch.Generator().manual_seed(3)
    height, width = grid
    count = height * width // 4
    video = IMAGE if name.startswith("glm4") else VIDEO
    kept = torch.ones(frames, count, dtype=torch.bool) if shown is None else shown.view(frames, -1)
    ids = [1, 5, 6] + ([START, *[IMAGE] * 16, END, 9] if image else [])
    kinds = [int(token == IMAGE) for token in ids]
    for frame in range(frames):
        own = [video] * int(kept[frame].sum())
        ids += [STAMPS + frame, START, *own, END]
        kinds += [0, 0, *[2] * len(own), 0]
    ids, kinds = [*ids, 11, 12, 13], [*kinds, 0, 0, 0]
    channels = 48 if name == "video_llama_3" else 96

    def noise(patches):
        return torch.randn(patches, channels, generator=generator)

    batch = {"input_ids": torch.tensor([ids] * rows)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["pixel_values_videos"] = noise(rows * frames * height * width)
    batch["video_grid_thw"] = torch.tensor([[frames, height, width]] * rows)
    if image:
        batch["pixel_values"] = noise(rows * 64)
        batch["image_grid_thw"] = torch.tensor([[1, 8, 8]] * rows)
    if name != "video_llama_3":
        return batch | {"mm_token_type_ids": torch.tensor([kinds] * rows)}
    batch["video_merge_sizes"] = torch.full((rows,), 2)
    if image:
        batch["image_merge_sizes"] = torch.full((rows,), 2)
    if shown is not None:
        batch["video_compression_mask"] = shown.flatten().repeat(rows)
    return batch


def minicpm_videos(*, frames: int = 2, mode: str = "16x"):
    """A video of MiniCPM-V: all frames share a row of patches."""
    generator = torch.Generator().manual_seed(3)
    count = 16 * 24 // (4 if mode == "4x" else 16)
    ids = [1, 5] + [START, *[VIDEO] * count, END] * frames + [11, 12]
    values = torch.randn(1, 3, 2, 2 * 16 * 24 * frames, generator=generator)
    batch = {"input_ids": torch.tensor([ids]), "pixel_values_videos": values}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["target_sizes_videos"] = torch.tensor([[16, 24]] * frames, dtype=torch.int32)
    return batch | {"downsample_mode": mode}


def gemma4_videos(*, frames: tuple[int, ...] = (2, 3)):
    """Videos of Gemma 4 in one row, each frame of its own row of patches and filled up."""
    generator = torch.Generator().manual_seed(3)
    ids, places = [1, 5], []
    for number, count in enumerate(frames):
        height, width = ((6, 9), (9, 9))[number % 2]
        for frame in range(count):
            ids += [STAMPS + frame, START, *[VIDEO] * (height * width // 9), END]
            row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            own = torch.full((90, 2), -1)
            own[: height * width] = torch.stack([column.flatten(), row.flatten()], -1)
            places.append(own)
    batch = {"input_ids": torch.tensor([[*ids, 11, 12]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["mm_token_type_ids"] = 2 * (batch["input_ids"] == VIDEO).long()
    batch["video_position_ids"] = torch.stack(places)
    batch["pixel_values_videos"] = torch.rand(sum(frames), 90, 48, generator=generator)
    return batch | {"num_frames_per_video": torch.tensor(frames)}
