"""Models and images from files and the hub."""

from __future__ import annotations

from .images import ImageError, ImageLimits, load_image
from .models import load

__all__ = ["ImageError", "ImageLimits", "load", "load_image"]
