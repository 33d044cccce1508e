"""Every model family as tests see it: a tiny random checkpoint, and what diffusers' own pipeline makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import make_wan

PROMPTS = ("a red circle moving left on the sea", "grey", 3), ("the cat", "a red circle on the sky", 8)
STEPS = 3


@dataclass(frozen=True)
class Example:
    """make: writes a checkpoint; size: frames, height and width; length: max_sequence_length; scale: of guidance.

    options: how its pipeline is told beside; named: what it calls the scale.
    """

    make: Callable[[Path], object]
    size: tuple[int, int, int]
    length: int = 24
    scale: float = 4.0
    named: str = "guidance_scale"
    guided: bool = True
    images: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def reference(self, folder: Path, prompt: str, negative: str, seed: int) -> np.ndarray:
        """Levels [F, H, W, 3] of diffusers' own pipeline, on one process."""
        import torch
        from diffusers import DiffusionPipeline

        pipe: Any = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        sizes = {"height": self.size[1], "width": self.size[2]} | ({} if self.images else {"num_frames": self.size[0]})
        made = pipe(
            prompt=prompt,
            **({"negative_prompt": negative} if self.guided else {}),
            **{self.named: self.scale},
            **sizes,
            **self.options,
            num_inference_steps=STEPS,
            max_sequence_length=self.length,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        frames = made.images if self.images else made.frames[0]
        return (frames * 255).round().astype(np.uint8)


EXAMPLES = {
    "wan-experts": Example(partial(make_wan, experts=2), (5, 32, 48)),
    "wan-fine": Example(partial(make_wan, fine=True), (5, 64, 96)),
}
