"""Models and images from files and the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy_names

if TYPE_CHECKING:
    from .images import ImageError as ImageError
    from .images import ImageLimits as ImageLimits
    from .images import load_image as load_image
    from .models import load as load

# So that an image is read, or refused, before torch is imported.
__getattr__ = lazy_names(
    __name__,
    {"ImageError": "images", "ImageLimits": "images", "load_image": "images", "load": "models"},
)

__all__ = ["ImageError", "ImageLimits", "load", "load_image"]
