"""`pitome-vlm train` without installing anything but the dependencies; the same options.

python scripts/train_lora.py --model PATH --data train.jsonl --keep 0.25 --load-4bit -o adapter
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pitome_vlm") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pitome_vlm.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
