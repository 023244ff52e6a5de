"""Pictures in requests that cannot be read are the client's fault: HTTP 400 instead of 500.

Knows: where vLLM lets others read media, and what Pillow raises. Does not know: models, or merging.
In force where VLLM_MEDIA_CONNECTOR names it, as `pitome-vlm serve` does.

vLLM answers 400 to most broken pictures, but 500 to some: more pixels than Pillow opens at all,
files whose decoder stumbles in its own way, paths on the server.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from .options import MEDIA_CONNECTOR


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class PictureConnector(MediaConnector):
    """vLLM's own reader with its errors sorted."""

    def fetch_image(self, image_url: str, **options: Any) -> Any:
        """See vLLM's `MediaConnector`."""
        with _blame(image_url):
            return super().fetch_image(image_url, **options)

    async def fetch_image_async(self, image_url: str, **options: Any) -> Any:
        """See vLLM's `MediaConnector`."""
        with _blame(image_url):
            return await super().fetch_image_async(image_url, **options)


@contextlib.contextmanager
def _blame(url: str) -> Iterator[None]:
    """Turn what a picture did to its reader into a ValueError, which vLLM answers with 400.

    Raises:
        ValueError: the picture cannot be read.
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"Failed to load image: {error}") from error
    except (SyntaxError, struct.error, EOFError, zlib.error) as error:
        # Pillow's decoders, wherever the bytes came from.
        raise ValueError(f"Failed to load image: {error}") from error
    except Exception as error:
        # Whatever else is wrong with http(s) may be the network; it is vLLM's to judge.
        if not url.lower().startswith(("data:", "file:")):
            raise
        raise ValueError(f"Failed to load image: {error}") from error
