"""Pictures for people: MP4 files and contact sheets."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw, ImageFont

from . import atomic

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_GROUND, _INK = (205, 205, 205), (24, 24, 24)  # neither the white nor the middle grey of many a clip
_GAP, _NEAR, _TEXT, _LEADING = 8, 4, 22, 28  # pixels; the text can still be read at half the size
_SMALL, _LARGE = 192, 320  # smaller frames are enlarged to this, larger ones reduced
_LINES, _LETTERS = 4, 1000  # of a caption


@dataclass(frozen=True)
class Encoder:
    """One of FFmpeg's video encoders, by its name there, and what it is told."""

    name: Literal["h264_nvenc", "libx264", "mpeg4"]
    options: Mapping[str, str]


# Of about the same quality: what is lost is hard to see. 118 is FFmpeg's unit of the scale from 1 to 31.
NVENC = Encoder("h264_nvenc", {"preset": "p5", "rc": "constqp", "qp": "20"})
X264 = Encoder("libx264", {"crf": "18"})
MPEG4 = Encoder("mpeg4", {"flags": "+qscale", "global_quality": str(2 * 118)})


def software() -> Encoder:
    """What encodes on any CPU. Where PyAV was built without x264 it is MPEG-4 part 2 (larger; not every browser
    plays it)."""
    return X264 if X264.name in av.codecs_available else MPEG4


def hardware(gpu: int, height: int, width: int) -> tuple[Encoder, str]:
    """The encoder of a GPU (its number in CUDA) if it starts with frames of this size, else `software` and why.

    Many GPUs for computing, A100 and H100 among them, have no encoder.
    """
    encoder = replace(NVENC, options={**NVENC.options, "gpu": str(gpu)})
    if encoder.name not in av.codecs_available:
        return software(), f"PyAV was built without {encoder.name}"
    try:
        _encoded(np.zeros((1, height, width, 3), np.uint8), 1, encoder)
    except av.FFmpegError as error:
        return software(), f"{encoder.name} does not start: {error.strerror}"
    return encoder, ""


def write_mp4(path: Path, frames: np.ndarray, fps: float, encoder: Encoder | None = None) -> None:
    """Writes frames (uint8 [F, H, W, 3]) as H.264 in MP4, in place of an older file; whole, or not at all.

    encoder: by default `software`, which also helps out where another one fails: a GPU has a limit to what it encodes
    at a time. Odd sizes get one more row or column, a copy of the last, because colour is stored for 2 x 2 pixels.
    """
    try:
        image = _encoded(frames, fps, encoder or software())
    except av.FFmpegError:
        if encoder is None:
            raise
        image = _encoded(frames, fps, software())
    atomic.write(path, image.getbuffer(), replace=True)


def _encoded(frames: np.ndarray, fps: float, encoder: Encoder) -> io.BytesIO:
    _, height, width, _ = frames.shape
    more = ((0, height % 2), (0, width % 2), (0, 0))
    image = io.BytesIO()
    with av.open(image, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream(encoder.name, rate=rate, options=dict(encoder.options))
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        # Said in the file: players guess the colour space from the size otherwise, and not all alike.
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.pad(frame, more, mode="edge"), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())
    return image


def contact_sheet(clips: Sequence[tuple[str, np.ndarray]], columns: int = 5) -> Image.Image:
    """A row for each clip (caption, uint8 [F, H, W, 3]): evenly spaced frames, the caption below them.

    Captions are wrapped, and cut after four lines. Clips may differ in size. ValueError: there is no clip.
    """
    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    strips = [_strip(frames[spaced(len(frames), columns)]) for _, frames in clips]
    font = _font()
    width = max(strip.width for strip in strips)
    captions = [_wrap(caption, font, width) for caption, _ in clips]
    heights = [strip.height + _NEAR + _LEADING * len(lines) for strip, lines in zip(strips, captions, strict=True)]
    size = (width + 2 * _GAP, sum(heights) + 2 * _GAP * len(clips) + _GAP)
    sheet = Image.new("RGB", size, _GROUND)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for strip, lines in zip(strips, captions, strict=True):
        sheet.paste(strip, (_GAP, y))
        y += strip.height + _NEAR
        for line in lines:
            draw.text((_GAP, y), line, fill=_INK, font=font)
            y += _LEADING
        y += 2 * _GAP
    return sheet


def spaced(count: int, columns: int) -> list[int]:
    """At most `columns` of `count` frames: the first, the last, and evenly spaced ones between them."""
    return np.linspace(0, count - 1, min(count, columns)).round().astype(int).tolist()


def _strip(frames: np.ndarray) -> Image.Image:
    height, width = frames.shape[1:3]
    side = max(height, width)
    factor = max(1, _SMALL // side) if side <= _LARGE else _LARGE / side
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # Small frames keep their pixels, so that the sheet shows what was made and nothing smoother.
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    strip = Image.new("RGB", (len(frames) * (size[0] + _GAP) - _GAP, size[1]), _GROUND)
    for i, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size, how), (i * (size[0] + _GAP), 0))
    return strip


def _font() -> _Font:
    """One with many scripts where the machine has it; Pillow's own has little more than ASCII."""
    for name in ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, _TEXT)
    return ImageFont.load_default(_TEXT)


def _wrap(caption: str, font: _Font, width: int) -> list[str]:
    """The caption in at most four lines, none wider than `width` pixels; words that are wider get broken."""
    lines, line = [], ""
    for word in caption[:_LETTERS].split():
        for part in _broken(word, font, width):
            longer = f"{line} {part}" if line else part
            if font.getlength(longer) <= width:
                line = longer
            else:
                lines.append(line)
                line = part
    lines.append(line)
    if len(lines) <= _LINES and len(caption) <= _LETTERS:
        return lines
    *whole, last = lines[:_LINES]
    while last and font.getlength(f"{last} ...") > width:
        last = last[:-1]
    return [*whole, f"{last} ..."]


def _broken(word: str, font: _Font, width: int) -> Iterator[str]:
    """The word in pieces, each the longest that is at most `width` pixels wide and has a letter."""
    while word:
        end = len(word)
        while end > 1 and font.getlength(word[:end]) > width:
            end -= 1
        yield word[:end]
        word = word[end:]
