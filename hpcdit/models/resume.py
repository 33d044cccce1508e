"""A denoising that goes on where another was left: what a scheduler of diffusers remembers, and how it gets it back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from .base import Snapshot

PLAIN = bool, int, float, str, type(None)


def state(scheduler: Any) -> dict[str, Any]:
    """What a scheduler remembers between steps, copied to the CPU: plain values, tensors, and lists of these."""
    found = {name: value for name, value in vars(scheduler).items() if _known(value)}
    return {name: mapped(value, lambda x: x.to("cpu", copy=True)) for name, value in found.items()}


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with each tensor in it changed; a list becomes a new list."""
    if isinstance(value, list | tuple):
        return [mapped(part, change) for part in value]
    return change(value) if isinstance(value, Tensor) else value


@contextmanager
def resumed(scheduler: Any, start: Snapshot | None, latents: Tensor) -> Iterator[None]:
    """In the body, a pipeline that begins to denoise `latents` goes on after `start`, if there is one.

    It asks its scheduler for timesteps, and gets those that are left; it may tell it to begin; after either the
    scheduler remembers what it knew.
    """
    if start is None:
        yield
        return
    set_timesteps, set_begin_index = scheduler.set_timesteps, getattr(scheduler, "set_begin_index", None)

    def remember() -> None:
        for name, value in start.state.items():
            if hasattr(type(scheduler), name):  # a method or a property is no state
                raise ValueError(f"a scheduler does not remember {name}")
            here = getattr(scheduler, name, None)
            device = here.device if isinstance(here, Tensor) else latents.device
            setattr(scheduler, name, mapped(value, lambda x: x.to(device)))  # noqa: B023

    @wraps(set_timesteps)  # pipelines look at what it takes
    def rest(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        left = scheduler.timesteps[start.step :]
        remember()
        scheduler.timesteps = left

    def begin(index: int = 0) -> None:
        if set_begin_index:
            set_begin_index(index)
        remember()

    scheduler.set_timesteps, scheduler.set_begin_index = rest, begin
    try:
        yield
    finally:
        del scheduler.set_timesteps, scheduler.set_begin_index


def _known(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(part, (Tensor, *PLAIN)) for part in value)
    return isinstance(value, (Tensor, *PLAIN))
