"""Named recipes: options that are fixed together."""

from __future__ import annotations

from typing import Any

# Preset name -> the options it fixes. "released" is the code that the authors published, which is
# not the algorithm of their paper; whoever reports a number has to be able to say which it was.
# "paper" leaves tokens in raster order (see `algorithms/pitome.py`), "released" as its code does.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "algorithm": "pitome",
        "metric": "keys",
        "size_bias": False,
        "positions": "compact",
    },
    "released": {
        "algorithm": "pitome",
        "size_bias": False,
        "positions": "compact",
        "energy": "elu",
        "metric": "hidden",
        "placement": "after_layer",
        "early_matching": 0.5,
        "weighted": False,
        "proportional_attention": False,
        "restore_order": False,
    },
}
