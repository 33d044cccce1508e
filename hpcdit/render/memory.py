"""The host's memory between the steps of a run: what the C library keeps, and what it gives back."""

import ctypes
import gc
import os
import sys

import torch

# glibc's mallopt; <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_freed() -> None:
    """Has malloc keep what is freed for the next step, which asks for the same again.

    Left alone, glibc gives large blocks back to the system at once, and what a thread other than the main one frees
    even more eagerly: a decoder in a thread of its own spends a tenth of its time on fresh pages. Does nothing with
    another C library, or where the environment has settings of its own (MALLOC_...).
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(_TRIM_THRESHOLD, _MOST)
            mallopt(_MMAP_THRESHOLD, _MOST)


def release() -> None:
    """Gives back memory that nobody holds any more, the device's as well."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
