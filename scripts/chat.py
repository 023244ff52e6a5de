"""`pitome-vlm chat` without installing anything but the dependencies; the same options.

python scripts/chat.py --model demo --image scene.png --keep 0.25
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pitome_vlm") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pitome_vlm.cli import app

if __name__ == "__main__":
    app(["chat", *sys.argv[1:]])
