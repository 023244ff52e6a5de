"""Tiny models with the interface of the original llava package, and batches in its format.

`make test` builds a stand-in written for these tests: the same methods, arguments and configuration
names, no code of the package. `make test-llava` sets PITOME_TEST_LLAVA=package and runs the same
tests on the package's own classes (`llava-torch`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import tempfile

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MptConfig,
    MptForCausalLM,
    MptModel,
)

IMAGE, PATCHES, SIDE = -200, 144, 12
PACKAGE = os.environ.get("PITOME_TEST_LLAVA") == "package"
PINPOINTS = [[96, 192], [192, 96], [192, 192]]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 8,
    "projection_dim": 16,
}
DECODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MM_OPTIONS = {
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": PINPOINTS,
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 4096,
}


class Tower(nn.Module):
    """A CLIP tower that is built empty and filled by `load_model`."""

    def __init__(self, config):
        super().__init__()
        self.is_loaded = False
        self.select_layer = config.mm_vision_select_layer
        self.select_feature = config.mm_vision_select_feature
        self.waiting = CLIPVisionConfig(**TOWER)

    def load_model(self, device_map=None):
        del device_map
        self.vision_tower = CLIPVisionModel(self.waiting).eval().requires_grad_(False)
        self.is_loaded = True

    @torch.no_grad()
    def forward(self, images):
        states = self.vision_tower(images.to(self.dtype), output_hidden_states=True).hidden_states
        chosen = states[self.select_layer].to(images.dtype)
        return chosen[:, 1:] if self.select_feature == "patch" else chosen

    @property
    def config(self):
        return self.vision_tower.config if self.is_loaded else self.waiting

    @property
    def dtype(self):
        return self.vision_tower.dtype

    @property
    def hidden_size(self):
        return self.config.hidden_size

    @property
    def num_patches_per_side(self):
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self):
        return self.num_patches_per_side**2


def add_parts(core, config):
    core.vision_tower = Tower(config)
    core.mm_projector = nn.Sequential(
        nn.Linear(config.mm_hidden_size, 32), nn.GELU(), nn.Linear(32, 32)
    )
    if "unpad" in config.mm_patch_merge_type:
        core.image_newline = nn.Parameter(torch.randn(32))


class Multimodal:
    """What the stand-ins of all language models share."""

    def get_vision_tower(self):
        tower = getattr(self.get_model(), "vision_tower", None)
        # A tower that sharding must not touch is kept where torch does not see it.
        return tower[0] if isinstance(tower, list) else tower

    def encode_images(self, images):
        return self.get_model().mm_projector(self.get_vision_tower()(images))

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
    ):
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = iter(self._encoded_images(images, image_sizes))
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for index, ids in enumerate(input_ids):
            shown = visible[index].bool()
            ids, wanted = ids[shown], None if labels is None else labels[index][shown]
            rows.append(self._row(ids, wanted, features))
        embeds, new_labels, valid = self._padded(rows, self.config)
        counted = (valid.long().cumsum(1) - 1).clamp(min=0) * valid
        return (
            None,
            None if position_ids is None else counted.to(position_ids),
            None if attention_mask is None else valid.to(attention_mask),
            past_key_values,
            embeds,
            None if labels is None else new_labels,
        )

    def _row(self, ids, labels, features):
        """Embeddings and labels of one row; a row without a placeholder uses up an image."""
        labels = torch.full_like(ids, -100) if labels is None else labels
        embeds, wanted = [], []
        places = (ids == IMAGE).nonzero()[:, 0].tolist()
        for begin, end in zip([0, *(p + 1 for p in places)], [*places, len(ids)], strict=True):
            embeds.append(self.get_model().embed_tokens(ids[begin:end]))
            wanted.append(labels[begin:end])
            if end < len(ids):
                embeds.append(next(features))
                wanted.append(labels.new_full((len(embeds[-1]),), -100))
        if not places:
            embeds.append(next(features)[:0])
        return torch.cat(embeds), torch.cat(wanted)

    @staticmethod
    def _padded(rows, config):
        limit = config.tokenizer_model_max_length
        rows = [(embeds[:limit], labels[:limit]) for embeds, labels in rows]
        width = max(len(embeds) for embeds, _ in rows)
        left = config.tokenizer_padding_side == "left"
        embeds = rows[0][0].new_zeros(len(rows), width, rows[0][0].shape[1])
        labels = rows[0][1].new_full((len(rows), width), -100)
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, (row, wanted) in enumerate(rows):
            place = slice(width - len(row), None) if left else slice(len(row))
            embeds[index, place], labels[index, place], valid[index, place] = row, wanted, True
        return embeds, labels, valid

    def _encoded_images(self, images, sizes):
        """One [n, C] per image."""
        if isinstance(images, torch.Tensor) and images.dim() == 4:
            return list(self.encode_images(images))
        tiles = [image[None] if image.dim() == 3 else image for image in images]
        features = self.encode_images(torch.cat(tiles)).split([len(one) for one in tiles])
        if self.config.mm_patch_merge_type == "flat":
            return [one.flatten(0, 1) for one in features]
        return [self._spatial(one, sizes[i]) for i, one in enumerate(features)]

    def _spatial(self, tiles, size):
        """The overview first, then the tiles side by side without the padding of the image."""
        newline, side = self.model.image_newline, self.get_vision_tower().num_patches_per_side
        if len(tiles) == 1:
            return torch.cat([tiles[0], newline[None]])
        columns, rows = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.get_vision_tower().config.image_size
        )
        grid = tiles[1:].unflatten(0, (rows, columns)).unflatten(2, (side, side))
        grid = grid.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)  # [rows, columns, C]
        grid = unpadded(grid, size)
        ends = newline.expand(len(grid), 1, -1)
        return torch.cat([tiles[0], torch.cat([grid, ends.to(grid)], 1).flatten(0, 1)])


def get_anyres_image_grid_shape(image_size, grid_pinpoints, patch_size):
    """(columns, rows) of tiles of `patch_size` pixels for an image of (width, height)."""

    def used(shape):
        scale = min(shape[0] / image_size[0], shape[1] / image_size[1])
        area = int(image_size[0] * scale) * int(image_size[1] * scale)
        return min(area, image_size[0] * image_size[1])

    best = max(grid_pinpoints, key=lambda shape: (used(shape), -shape[0] * shape[1]))
    return best[0] // patch_size, best[1] // patch_size


def unpadded(grid, size):
    high, wide = grid.shape[:2]
    if size[0] / size[1] > wide / high:
        cut = (high - int(size[1] * (wide / size[0]))) // 2
        return grid[cut : high - cut]
    cut = (wide - int(size[0] * (high / size[1]))) // 2
    return grid[:, cut : wide - cut]


class Calls:
    """`forward` and `generate` as the package has them."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        images=None,
        image_sizes=None,
        return_dict=None,
        **others,
    ):
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids,
                    position_ids,
                    attention_mask,
                    past_key_values,
                    labels,
                    images,
                    image_sizes,
                )
            )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return self._language_model(**given, **others)

    def _language_model(self, **given):
        return super().forward(**given)

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        positions, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if images is None:
            embeds = self.get_model().embed_tokens(inputs)
        else:
            _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, positions, mask, None, None, images, image_sizes=image_sizes
            )
        return super().generate(
            position_ids=positions, attention_mask=mask, inputs_embeds=embeds, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        vision = {name: kwargs.pop(name, None) for name in ("images", "image_sizes")}
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs | {name: value for name, value in vision.items() if value is not None}


class LlavaLlamaForCausalLM(Calls, Multimodal, LlamaForCausalLM):
    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaModel(config)
        add_parts(self.model, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self):
        return self.model


class LlavaMistralForCausalLM(Calls, Multimodal, MistralForCausalLM):
    def __init__(self, config):
        super(MistralForCausalLM, self).__init__(config)
        self.model = MistralModel(config)
        add_parts(self.model, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self):
        return self.model


class LlavaMptForCausalLM(Calls, Multimodal, MptForCausalLM):
    """No rotary positions, and the language model under another name."""

    def __init__(self, config):
        super(MptForCausalLM, self).__init__(config)
        self.transformer = MptModel(config)
        self.transformer.embed_tokens = self.transformer.wte
        add_parts(self.transformer, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self):
        return self.transformer

    def _language_model(self, **given):
        unknown = ("position_ids", "cache_position")
        return super()._language_model(**{k: v for k, v in given.items() if k not in unknown})


class StrictLlava(LlavaLlamaForCausalLM):
    """The package lists the arguments of `forward` that transformers had when it was written."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        images=None,
        image_sizes=None,
        return_dict=None,
    ):
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache,
            output_attentions,
            output_hidden_states,
            images,
            image_sizes,
            return_dict,
        )


STAND_INS = {
    "llama": (LlamaConfig, LlavaLlamaForCausalLM),
    "mistral": (MistralConfig, LlavaMistralForCausalLM),
    "mpt": (MptConfig, LlavaMptForCausalLM),
    "strict": (LlamaConfig, StrictLlava),
}
# The MPT class of llava-torch 1.2.2.post1 fails in its own forward (test_original_ecosystem.py).
KINDS = ("llama", "mistral") if PACKAGE else ("llama", "mistral", "mpt")
ROTARY = ("llama", "mistral")


@functools.cache
def saved_tower():
    """A folder with a tiny CLIP tower, which the package loads by name."""
    folder = tempfile.mkdtemp(prefix="tiny-clip-")
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(folder)
    size = {"height": 96, "width": 96}
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=size).save_pretrained(folder)
    return folder


def package_classes(kind):
    names = {"llama": ("LlavaConfig", "LlavaLlamaForCausalLM")}
    names["mpt"] = ("LlavaMptConfig", "LlavaMptForCausalLM")
    names["mistral"] = ("LlavaMistralConfig", "LlavaMistralForCausalLM")
    module = importlib.import_module(f"llava.model.language_model.llava_{kind}")
    return tuple(getattr(module, name) for name in names[kind])


def original_model(kind="llama", *, loaded=True, seed=0, attention="sdpa", **options):
    """A model of 12 x 12 patches; `options` are fields of its config."""
    torch.manual_seed(seed)
    config_class, model_class = package_classes(kind) if PACKAGE else STAND_INS[kind]
    decoder = DECODER
    if kind == "mpt":
        decoder = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4}
    config = config_class(**decoder)
    config.use_cache = True
    for name, value in (MM_OPTIONS | options).items():
        setattr(config, name, value)
    if kind != "mpt":
        config._attn_implementation = attention
    if PACKAGE:
        config.mm_vision_tower = saved_tower()
    model = model_class(config).eval()
    if loaded:
        with contextlib.redirect_stdout(io.StringIO()):
            model.get_vision_tower().load_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                wide = any(part in name for part in ("embed_tokens", "lm_head", "wte"))
                parameter.normal_(0, 1.0 if wide else 0.2 if "vision_tower" in name else 0.5)
            elif "image_newline" in name:
                parameter.normal_(0, 1.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def original_batch(images=(1, 2), texts=(5, 9), *, side="right", seed=1):
    """`images[i]` placeholders and `texts[i]` closing words in row i, padded on `side`."""
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    rows = []
    for count, text in zip(images, texts, strict=True):
        row = [1]
        for _ in range(count):
            row += [*words(3), IMAGE]
        rows.append(row + words(text))
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    # A row without a placeholder takes an image all the same.
    pixels = torch.randn(sum(max(1, n) for n in images), 3, 96, 96, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "images": pixels}


def expected_layout(model, batch):
    """Positions and sizes of every column of every row of a flat prompt, by plain loops."""
    import pitome_vlm

    visual = pitome_vlm.encode_images(model, batch["images"])
    groups = iter(zip(visual.source_maps, visual.counts, strict=True))
    rows = []
    for ids, mask in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True
    ):
        place, row = 0, []
        shown = [token for token, here in zip(ids, mask, strict=True) if here]
        if IMAGE not in shown:
            next(groups)
        for token in shown:
            if token != IMAGE:
                row.append((float(place), 1.0))
                place += 1
                continue
            source, count = next(groups)
            for group in range(count):
                members = [i for i, one in enumerate(source.tolist()) if one == group]
                row.append((place + sum(members) / len(members), float(len(members))))
            place += len(source)
        rows.append(row)
    return rows
