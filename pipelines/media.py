"""Samples as files: encode for the store, decode for rewards. Lossless, so that a reward sees what the policy drew."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from pipelines.rewards.base import Media

if TYPE_CHECKING:
    from av.container import InputContainer

FRAMES_PER_SECOND = 16
"""Of stored videos: what Wan is trained on."""
MAX_VIDEO_PIXELS = 2**28
"""Of all frames of a video together (81 frames of 1920x1080 are fewer): more are not decoded."""


def format_of(media: Media, image_format: str) -> str:
    """The format that a sample is stored in: mp4 for a video (F, H, W, 3), else that of images."""
    return "mp4" if media.ndim == 4 else image_format


def encode(media: Media, media_format: str) -> bytes:
    """A sample (uint8) to bytes, lossless: an image (H, W, 3) to png or webp, a video (F, H, W, 3) to mp4, which tells no
    format of its own but H.264 in RGB. Equal samples give equal bytes."""
    buffer = io.BytesIO()
    if media.ndim == 4:
        _write_video(media, buffer)
    else:
        Image.fromarray(media).save(buffer, media_format, lossless=True)
    return buffer.getvalue()


def decode(data: bytes) -> Media:
    """The inverse of `encode`: the content says what it is. Raises ValueError on bytes that are no sample, or too large."""
    if data[4:8] == b"ftyp":
        return _read_video(data)
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:  # a torn PNG: SyntaxError
        raise ValueError(f"not a picture: {error}") from error


def _write_video(video: Media, buffer: io.BytesIO) -> None:
    import av

    # One thread and no date or version of the muxer: the bytes are a function of the frames.
    options = {"qp": "0", "preset": "medium", "threads": "1"}
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264rgb", rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _read_video(data: bytes) -> Media:
    import av

    try:
        with av.open(io.BytesIO(data), "r", format="mp4") as container:
            return np.stack(list(_frames(container)))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"not a video: {error}") from error


def _frames(container: InputContainer) -> Iterator[Media]:
    """Frame by frame, so that what a few bytes unfold to is known before there is no memory left for it."""
    if len(container.streams) != 1 or not container.streams.video:
        raise ValueError("expected one stream of pictures and nothing else")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.name != "h264":  # damage can name any of a hundred decoders
        raise ValueError("its pictures are not H.264")
    _bounded(stream.frames * context.height * context.width)
    context.options = {"err_detect": "explode", "max_pixels": str(MAX_VIDEO_PIXELS)}
    pixels = count = 0
    for frame in container.decode(stream):
        pixels, count = pixels + frame.height * frame.width, count + 1
        _bounded(pixels)
        yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    if count != stream.frames or not count:
        raise ValueError(f"{count} of {stream.frames} frames can be read")


def _bounded(pixels: int) -> None:
    if pixels > MAX_VIDEO_PIXELS:
        raise ValueError(f"{pixels} pixels in all frames are more than {MAX_VIDEO_PIXELS}, the most that are read")


def comparison_grid(captions: Sequence[str], columns: Sequence[tuple[str, Sequence[Sequence[tuple[Media, bool]]]]]) -> bytes:
    """A PNG that compares policies: one row a prompt, one block of pictures a column, framed green (right) or red (wrong).

    columns: (title, per prompt the samples with their verdicts). Of a video the middle frame is shown.
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
                still = media[len(media) // 2] if media.ndim == 4 else media
                canvas.paste(Image.fromarray(still).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
