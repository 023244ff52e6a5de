"""The tables of docs/models.md and docs/encoders.md, from the adapters and their records.

    python -m scripts.models_page

writes them into the pages.
"""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pitome_vlm.adapters import ADAPTERS, Adapter
from pitome_vlm.adapters.encoders import ENCODERS, REFUSED_ENCODERS
from pitome_vlm.adapters.generic import GenericAdapter
from pitome_vlm.adapters.refused import REFUSED
from pitome_vlm.releases import OLDEST_TRANSFORMERS, features_from
from pitome_vlm.vllm import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
ENCODER_PAGE = PAGE.with_name("encoders.md")
BEGIN, END = "<!-- python -m scripts.models_page -->\n", "<!-- end -->\n"
COLUMNS = (
    *(
        "class (... `ForConditionalGeneration`)",
        "`model_type`",
        "merges",
        "images",
        "`tokens=` per",
    ),
    *("places", "4-bit", "LoRA", "vLLM", "transformers", "commands run"),
)
# Which of the families with processors of their own the commands were run on, and how: in the
# tests, or by hand with torchvision installed.
TESTED = ("aya_vision", "gemma3", "idefics3", "paligemma")
BY_HAND = ("internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "mistral3")
BY_HAND += ("lfm2_vl",)
LLAVA = ("llava", "llava_next", "llava_onevision")


def table() -> str:
    """All model types that are wrapped, one row per record."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [
        f"| {' | '.join(_row(adapter))} |" for adapter in ADAPTERS if adapter.calls != "original"
    ]
    return "\n".join(lines) + "\n"


def refusals() -> str:
    """All that are refused, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    return "".join(f"- {', '.join(names)}: {reason}.\n" for reason, names in by_reason.items())


def encoder_table() -> str:
    """All encoders that are wrapped on their own, one row per record."""
    lines = ["| encoder | `model_type` | before the patches | classes |", "|---|---|---|---|"]
    for one in ENCODERS:
        leading = ", ".join(name.replace("_", " ") for name in one.leading)
        leading = leading.replace("class embedding", "cls token") or "-"
        classes = ", ".join(f"`{name}`" for name in one.classes)
        lines.append(f"| {one.title} | `{one.model_type}` | {leading} | {classes} |")
    return "\n".join(lines) + "\n"


def encoder_refusals() -> str:
    """Encoders that are refused, and why."""
    return "".join(f"- `{name}`: {why}.\n" for name, why in REFUSED_ENCODERS.items())


def filled(page: str, texts: tuple[str, str] | None = None) -> str:
    """A page with both texts in their places; those of docs/models.md where none are given."""
    parts = page.split(BEGIN)
    if len(parts) != 3:
        raise ValueError(f"the page must have two places for tables, found {len(parts) - 1}")
    pairs = zip(texts or (table(), refusals()), parts[1:], strict=True)
    filled_in = [BEGIN + text + END + part.partition(END)[2] for text, part in pairs]
    return "".join([parts[0], *filled_in])


def encoders_filled(page: str) -> str:
    """The page of encoders with both in their places."""
    return filled(page, (encoder_table(), encoder_refusals()))


def _row(adapter: Adapter) -> list[str]:
    kinds = adapter.pixel_inputs.values()
    videos = "; videos" if "video" in kinds else ""
    types = ", ".join(f"`{name}`" for name in adapter.model_types)
    if isinstance(adapter, GenericAdapter) and adapter.family.of_tower is not None:
        types += f" on a tower of type `{adapter.family.of_tower}`"
    return [
        ", ".join(dict.fromkeys(f"`{_class(name)}`" for name in adapter.model_types)),
        types,
        _where(adapter),
        _images(adapter) + videos,
        adapter.counted_per,
        "time, row, column" if adapter.own_positions else "order",
        "yes",
        "yes",
        _served(adapter),
        _since(adapter),
        _run(adapter),
    ]


def _class(model_type: str) -> str:
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type].removesuffix(
        "ForConditionalGeneration"
    )


def _where(adapter: Adapter) -> str:
    if isinstance(adapter, GenericAdapter):
        return "after the tower" if adapter.family.tower is None else "in the tower and after it"
    return "after the tower" if adapter.own_positions else "in the tower and after it"


def _served(adapter: Adapter) -> str:
    served = [name for name in adapter.model_types if name in ARCHITECTURES]
    if isinstance(adapter, GenericAdapter) and adapter.family.of_tower is not None:
        served = []
    names = ", ".join(f"`{name}`" for name in served)
    # The plugin serves no videos of these.
    images = isinstance(adapter, GenericAdapter) and "video" in adapter.pixel_inputs.values()
    if images and served:
        names += ", images"
    elif len(served) == len(adapter.model_types):
        return "yes"
    return names or "no"


def _images(adapter: Adapter) -> str:
    if adapter.default_image_size is not None:
        return "any size" if adapter.counted_per == "image" else "any size, in tiles"
    return "tiles of one size" if adapter.counted_per == "tile" else "one size"


def _since(adapter: Adapter) -> str:
    """The first release that serves, with the model types of a later one."""
    if not adapter.own_scatter:
        return _dotted(OLDEST_TRANSFORMERS)
    releases = {name: features_from(name) for name in adapter.model_types}
    first = min(releases.values())
    later = [f"`{name}`: {_dotted(own)}" for name, own in releases.items() if own > first]
    return _dotted(first) + (f" ({', '.join(later)})" if later else "")


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _run(adapter: Adapter) -> str:
    names = set(adapter.model_types)
    if names & set(TESTED if isinstance(adapter, GenericAdapter) else LLAVA):
        return "tests"
    return "by hand" if names & set(BY_HAND) else "no"


def main() -> None:
    """Write the pages."""
    for page, fill in ((PAGE, filled), (ENCODER_PAGE, encoders_filled)):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
