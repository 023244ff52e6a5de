"""Training with merging on: LoRA and QLoRA on LLaVA-format data or Hugging Face datasets.

    from pitome_vlm.training import train
    model, processor = pitome_vlm.load(path, keep=0.25, load_in_4bit=True)
    train(model, processor, "train.jsonl", "adapter", val_fraction=0.05)
    model, processor = pitome_vlm.load("adapter")

Needs the extra `train`.
"""

from ..loading.records import DataError
from .collate import Collator
from .examples import Conversations, Example
from .hugging_face import from_dataset
from .lora import PARTS, LoraOptions, prepare, save_adapter, target_modules
from .metrics import answer_metrics, most_likely
from .recipe import TrainingResult, train
from .shorten import ShorteningCollator, shorten
from .sources import from_records, open_conversations, read_llava
from .trainer import KeepMerging, MergingTrainer, ShiftedLabelSmoother

__all__ = [
    "PARTS",
    "Collator",
    "Conversations",
    "DataError",
    "Example",
    "KeepMerging",
    "LoraOptions",
    "MergingTrainer",
    "ShiftedLabelSmoother",
    "ShorteningCollator",
    "TrainingResult",
    "answer_metrics",
    "from_dataset",
    "from_records",
    "most_likely",
    "open_conversations",
    "prepare",
    "read_llava",
    "save_adapter",
    "shorten",
    "target_modules",
    "train",
]
