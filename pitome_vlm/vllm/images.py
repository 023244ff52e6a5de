"""Images in requests that cannot be read are the client's fault: HTTP 400 instead of 500.

vLLM answers 400 to most broken images, but 500 to some: more pixels than Pillow opens at all, files
on which its decoders raise errors of their own, paths on the server. In force where
VLLM_MEDIA_CONNECTOR names it, as `pitome-vlm serve` does.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image
from typing_extensions import override
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from .options import MEDIA_CONNECTOR


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class ImageConnector(MediaConnector):
    """vLLM's own reader; errors of broken images become ValueErrors."""

    @override
    def fetch_image(self, image_url: str, **options: Any) -> Any:
        with _client_errors(image_url):
            return super().fetch_image(image_url, **options)

    @override
    async def fetch_image_async(self, image_url: str, **options: Any) -> Any:
        with _client_errors(image_url):
            return await super().fetch_image_async(image_url, **options)


@contextlib.contextmanager
def _client_errors(url: str) -> Iterator[None]:
    """Turn errors about an image into ValueErrors, which vLLM answers with 400.

    Raises:
        ValueError: the image cannot be read.
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
        # Other errors over http(s) may be the network's; they are left to vLLM.
        if not url.lower().startswith(("data:", "file:")):
            raise
        raise ValueError(f"Failed to load image: {error}") from error
