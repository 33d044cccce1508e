"""Pictures for people: MP4 files and contact sheets."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
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


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames (uint8 [F, H, W, 3]) as H.264 in MP4, in place of an older file; whole, or not at all.

    Where PyAV was built without x264, MPEG-4 part 2 is used (larger; not every browser plays it). Odd sizes
    get one more row or column, a copy of the last, because colour is stored for 2 x 2 pixels at a time.
    """
    _, height, width, _ = frames.shape
    more = ((0, height % 2), (0, width % 2), (0, 0))
    image = io.BytesIO()
    with av.open(image, "w", format="mp4") as container:
        codec, options = _encoder()
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(65535), options=options)
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
    atomic.write(path, image.getbuffer(), replace=True)


def _encoder() -> tuple[Literal["libx264", "mpeg4"], dict[str, str]]:
    if "libx264" in av.codecs_available:
        return "libx264", {"crf": "18"}
    return "mpeg4", {
        "flags": "+qscale",
        "global_quality": str(2 * 118),
    }  # 118: FFmpeg's unit of its scale 1 to 31


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
