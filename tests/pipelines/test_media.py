"""Samples as files: what goes in comes out, and damaged bytes never raise anything but a ValueError."""

from __future__ import annotations

import io
import resource
import threading

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import media
from pipelines.rewards.base import Media

FORMATS = ("png", "webp")


def _noise(height: int = 24, width: int = 16, seed: int = 0) -> Media:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("media_format", FORMATS)
def test_lossless(media_format: str) -> None:
    for picture in (_noise(), _noise(1, 1), np.zeros((8, 8, 3), np.uint8), np.full((5, 7, 3), 255, np.uint8)):
        data = media.encode(picture, media_format)
        back = media.decode(data)
        assert back.dtype == np.uint8
        assert np.array_equal(back, picture)
        assert media.encode(picture, media_format) == data
        assert Image.open(io.BytesIO(data)).format == media_format.upper()


@pytest.mark.parametrize("media_format", FORMATS)
def test_damage_is_a_value_error_or_another_picture(media_format: str) -> None:
    """Checksums catch damage before this; but media may also come from elsewhere."""
    data = media.encode(_noise(8, 8), media_format)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        for candidate in (bytes(damaged), data[:position]):
            try:
                assert media.decode(candidate).ndim == 3
            except ValueError as error:
                assert str(error).startswith("not a picture: ")  # noqa: PT017  most damage raises, some does not


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"],
    ids=["empty", "text", "head", "cut"],
)
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a picture: "):
        media.decode(data)


def test_a_chunk_that_is_no_chunk_is_no_picture() -> None:
    """Pillow raises a SyntaxError for it, and only when the pixels are read."""
    data = media.encode(_noise(), "png")
    at = data.index(b"IDAT")
    shorter = int.from_bytes(data[at - 4 : at], "big") - 100
    with pytest.raises(ValueError, match="not a picture: broken PNG file"):
        media.decode(data[: at - 4] + shorter.to_bytes(4, "big") + data[at:])


# -- videos -----------------------------------------------------------------------------------------------------------


def _moving(frames: int, height: int, width: int) -> Media:
    """Noise that drifts: a codec predicts most of it, so that its motion vectors and references are used."""
    field = _noise(height + frames, width + frames, seed=frames)
    return np.stack([field[t : t + height, t : t + width] for t in range(frames)])


VIDEOS = {
    "moving": _moving(9, 16, 32),
    "odd": _moving(5, 17, 23),
    "noise": np.stack([_noise(seed=seed) for seed in range(4)]),
    "one frame": _noise()[None],
    "one pixel": np.full((2, 1, 1, 3), 7, np.uint8),
    "black and white": np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 255, 0)]),
    "long": np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(300, 1, 1, 1).repeat(3, -1),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_lossless_and_their_bytes_a_function_of_the_frames(name: str) -> None:
    video = VIDEOS[name]
    data = media.encode(video, "mp4")
    back = media.decode(data)
    assert back.dtype == np.uint8
    assert np.array_equal(back, video)
    assert media.encode(video.copy(order="F"), "mp4") == data


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_videos_of_any_size_are_lossless(frames: int, height: int, width: int, seed: int) -> None:
    video = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    assert np.array_equal(media.decode(media.encode(video, "mp4")), video)


def test_a_video_is_an_ordinary_mp4() -> None:
    with av.open(io.BytesIO(media.encode(VIDEOS["moving"], "mp4"))) as container:
        (stream,) = container.streams
        assert container.format.name.startswith("mov,mp4")
        assert isinstance(stream, av.VideoStream)
        assert (stream.codec_context.name, stream.frames) == ("h264", 9)
        assert stream.average_rate == 16
        assert "encoder" not in container.metadata
        assert "creation_time" not in container.metadata | stream.metadata


def test_bytes_do_not_depend_on_the_threads_at_hand() -> None:
    golden, found = media.encode(VIDEOS["moving"], "mp4"), []
    threads = [threading.Thread(target=lambda: found.append(media.encode(VIDEOS["moving"], "mp4"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [golden] * 4


def test_the_format_follows_the_sample() -> None:
    assert media.format_of(_noise(), "webp") == "webp"
    assert media.format_of(VIDEOS["odd"], "webp") == "mp4"


def test_a_damaged_video_is_a_value_error_or_another_video() -> None:
    """Any byte flipped, any length: ValueError, or frames; no crash, no endless loop, no gigabytes."""
    data = media.encode(VIDEOS["one frame"], "mp4")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        for candidate in (bytes(damaged), data[:position]):
            try:
                assert media.decode(candidate).ndim in (3, 4)
            except ValueError as error:
                assert str(error).startswith(("not a video: ", "not a picture: "))  # noqa: PT017  most damage raises
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


@pytest.mark.parametrize(
    "data",
    [b"\0\0\0\x20ftyp", b"\0\0\0\x20ftypisom" + b"\0" * 100, b"\0\0\0\x18ftypavif" + b"x" * 50],
    ids=["head", "zeros", "avif"],
)
def test_what_is_no_video(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a video: "):
        media.decode(data)


def test_a_torn_video_is_not_a_shorter_one() -> None:
    """The index of an mp4 may stand before its frames (ours comes after them): then a part would look whole."""
    data = media.encode(VIDEOS["moving"], "mp4")
    moov = data.index(b"moov") - 4
    mdat = data.index(b"mdat") - 4
    index, head = bytearray(data[moov:]), data[:mdat]
    at = index.index(b"stco") + 12
    index[at : at + 4] = (int.from_bytes(index[at : at + 4], "big") + len(index)).to_bytes(4, "big")
    whole = head + bytes(index) + data[mdat:moov]
    assert np.array_equal(media.decode(whole), VIDEOS["moving"])
    with pytest.raises(ValueError, match="not a video: "):
        media.decode(whole[:-300])


@pytest.mark.parametrize(
    ("codecs", "told"),
    [(["mpeg4"], "its pictures are not H.264"), (["libx264"] * 2, "expected one stream of pictures and nothing else")],
)
def test_a_video_of_another_codec_or_of_two_streams_is_refused(codecs: list[str], told: str) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        streams: list[av.VideoStream] = []
        for codec in codecs:
            stream = container.add_stream(codec, rate=16)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            streams.append(stream)
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(_noise(16, 16), format="rgb24")
            container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ValueError, match=f"^not a video: {told}$"):
        media.decode(buffer.getvalue())


def test_a_video_that_unfolds_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = media.encode(np.zeros((50, 64, 64, 3), np.uint8), "mp4")
    assert len(data) < 50 * 64 * 64 / 40  # a bomb is small
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 50 * 64 * 64)
    assert media.decode(data).shape == (50, 64, 64, 3)
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 50 * 64 * 64 - 1)
    told = "not a video: 204800 pixels in all frames are more than 204799, the most that are read"
    with pytest.raises(ValueError, match=f"^{told}$"):
        media.decode(data)


def test_a_video_that_lies_about_its_size_is_refused_while_it_unfolds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index says one small frame; the frames come as they are."""
    data = media.encode(np.zeros((50, 64, 64, 3), np.uint8), "mp4")
    at = data.index(b"avc1", data.index(b"stsd")) + 28  # width and height of the sample entry
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 50 * 64 * 64 - 1)
    with pytest.raises(ValueError, match="not a video: "):
        media.decode(data[:at] + (1).to_bytes(2, "big") * 2 + data[at + 4 :])


# -- for people -------------------------------------------------------------------------------------------------------


def test_comparison_grid_shows_every_picture_in_its_frame() -> None:
    captions = ["one", "two", "three"]
    colours = iter(range(10, 250, 20))
    pictures = [[[np.full((24, 24, 3), next(colours), np.uint8) for _ in range(2)] for _ in captions] for _ in range(2)]
    columns = [
        (title, [[(picture, (row + i) % 2 == 0) for i, picture in enumerate(pair)] for row, pair in enumerate(rows)])
        for title, rows in zip(("before", "after"), pictures, strict=True)
    ]
    canvas = media.decode(media.encode(media.decode(media.comparison_grid(captions, columns)), "png"))
    flat = canvas.reshape(-1, 3)
    for level in range(10, 250, 20):
        assert (flat == level).all(1).sum() == pytest.approx(64 * 64, abs=30)  # letters have soft edges of all greys
    green, red = ((flat == colour).all(1).sum() for colour in ((46, 160, 67), (215, 58, 73)))
    assert green == red > 0


def test_comparison_grid_shows_the_middle_frame_of_a_video() -> None:
    levels = (10, 90, 170)
    video = np.stack([np.full((24, 32, 3), level, np.uint8) for level in levels])
    canvas = media.decode(media.comparison_grid([""], [("", [[(video, True)]])])).reshape(-1, 3)
    assert (canvas == 90).all(1).sum() == 64 * 64
    assert not (canvas == 10).all(1).any()
