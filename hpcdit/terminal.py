"""What people are told while the program runs."""

import os
import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Writes to stderr, or `stream`. One that nobody reads any more (`| head`) is given up: the run goes on.

    What the stream's encoding has no letters for (in a folder's name, say) is written as \\u5706.
    """
    stream = stream or sys.stderr
    if encoding := getattr(stream, "encoding", None):
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        with suppress(OSError):  # what is left in the stream's buffer would fail again as Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
