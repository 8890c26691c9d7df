"""Samples as files: encode for the store, decode for rewards. Lossless, so that a reward sees what the policy drew."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from pipelines.rewards.base import Media


def encode(media: Media, media_format: str) -> bytes:
    """An image (H, W, 3) uint8 to PNG or WebP bytes, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(media).save(buffer, media_format, lossless=True)
    return buffer.getvalue()


def decode(data: bytes) -> Media:
    """The inverse of `encode`. Raises ValueError on bytes that are no picture."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:  # a torn PNG: SyntaxError
        raise ValueError(f"not a picture: {error}") from error


def comparison_grid(captions: Sequence[str], columns: Sequence[tuple[str, Sequence[Sequence[tuple[Media, bool]]]]]) -> bytes:
    """A PNG that compares policies: one row a prompt, one block of pictures a column, framed green (right) or red (wrong).

    columns: (title, per prompt the pictures with their verdicts). All pictures are of one size.
    """
    cell, gap, text_width, header = 64, 6, 230, 26
    per_block = len(columns[0][1][0])
    block = per_block * (cell + gap) + 3 * gap
    width, height = text_width + len(columns) * block, header + len(captions) * (cell + gap) + gap
    canvas = Image.new("RGB", (width, height), (250, 250, 250))
    pen = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        pen.text((gap, header + row * (cell + gap) + cell // 2 - 6), caption, fill=(30, 30, 30))
    for column, (title, rows) in enumerate(columns):
        left = text_width + column * block
        pen.text((left, gap), title, fill=(30, 30, 30))
        for row, pictures in enumerate(rows):
            for position, (media, right) in enumerate(pictures):
                x, y = left + position * (cell + gap), header + row * (cell + gap)
                frame = (46, 160, 67) if right else (215, 58, 73)
                pen.rectangle((x - 2, y - 2, x + cell + 1, y + cell + 1), fill=frame)
                canvas.paste(Image.fromarray(media).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
