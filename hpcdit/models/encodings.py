"""Encodings of texts, kept for the next videos with the same: the negative prompt of a whole file above all."""

import sys
from collections import OrderedDict
from collections.abc import Callable

from .base import Encoding

MOST_BYTES = 1 << 25  # 8 prompts of the text encoder of Wan in bfloat16, on the device


class Encodings:
    """Calls `encode` for texts that it was not lately called with; keeps up to `most_bytes` of what was used last.

    encode: (text, max_sequence_length) -> (the encoding, how many tokens were cut off).
    """

    def __init__(self, encode: Callable[[str, int], tuple[Encoding, int]], most_bytes: int = MOST_BYTES) -> None:
        self._encode, self._most_bytes, self._bytes = encode, most_bytes, 0
        self._kept: OrderedDict[tuple[str, int], tuple[Encoding, int]] = OrderedDict()

    def __call__(self, text: str, max_sequence_length: int) -> tuple[Encoding, int]:
        key = text, max_sequence_length
        found = self._kept.pop(key, None)
        if found is None:
            found = self._encode(*key)
            self._bytes += _size(text, found[0])
        self._kept[key] = found  # as the last one
        while self._bytes > self._most_bytes:
            (oldest, _), (encoding, _) = self._kept.popitem(last=False)
            self._bytes -= _size(oldest, encoding)
        return found


def _size(text: str, encoding: Encoding) -> int:
    return sys.getsizeof(text) + sum(tensor.untyped_storage().nbytes() for tensor in encoding.values())
