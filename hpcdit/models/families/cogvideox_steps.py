"""What CogVideoX's pipelines keep between two steps, kept by the scheduler: so that any step may be the first."""

from collections.abc import Sequence
from typing import Any

from diffusers import CogVideoXDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


class Remembering(CogVideoXDPMScheduler):
    """CogVideoXDPMScheduler, which draws noise in its steps and looks back to the step before.

    drawn: how many noises as large as the latents were drawn of each video's seed: one are the latents themselves.
    original, before: the step before's prediction of the video, and its timestep.
    """

    drawn: int
    original: Tensor | None
    before: Tensor | None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.drawn, self.original, self.before = 1, None, None
        self.ready: Sequence[Generator] | None = None  # those of which all that was drawn before is drawn

    def step(  # always as CogVideoX's pipelines call it
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: Tensor,
        timestep_back: Tensor | None,
        sample: Tensor,
        generator: Sequence[Generator],
        return_dict: bool,
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        """As its own; generator: of each video, as its seed makes it but for noise of other sizes drawn since."""
        if generator is not self.ready:
            for _ in range(self.drawn):
                randn_tensor(sample.shape, list(generator), sample.device, sample.dtype)
            self.ready = generator
        self.drawn += 1 if self.original is None else 2
        found: Any = super().step(
            model_output,
            self.original,
            timestep,
            self.before,
            sample,
            generator=generator,
            **rest,
        )
        self.original, self.before = found[1], timestep
        return found[0], found[1]


def remembering(scheduler: Any) -> Any:
    """What stands in its place."""
    dpm = isinstance(scheduler, CogVideoXDPMScheduler)
    return Remembering.from_config(scheduler.config) if dpm else scheduler


def prepare(pipe: Any) -> None:
    """Lets the VAE, which is in float32, encode what is not."""
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x, *rest, **options: encode(x.to(pipe.vae.dtype), *rest, **options)
