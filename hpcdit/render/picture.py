"""The pictures that videos start from: read whole once, before anything is loaded."""

from hashlib import sha256
from pathlib import Path

from ..command_line import one_line

FORMATS = "PNG", "JPEG", "WEBP"
ALLOWED = f"a picture that can be read, {', '.join(FORMATS)}, with 16 to 65536 pixels a side"


def digest(path: Path) -> str:
    """sha256 of a picture's file. Raises ValueError, one line without the path, for what is none."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            sides = picture.size
    except OSError as error:
        raise ValueError(error.strerror or "not a picture") from None
    except (ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise ValueError(one_line(str(error)) or "not a picture") from None
    if not all(16 <= side <= 65536 for side in sides):
        raise ValueError(f"{sides[0]} x {sides[1]} pixels")
    return sha256(data).hexdigest()
