"""What is trained: the VAE on clips, and transformers on the latents of clips."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from . import models, whole
from .data import Size, draw
from .graphs import Graphs
from .latents import Bank, Scenes, choice, generator, statistics
from .ranks import Ranks
from .settings import Settings
from .training import averaged

_L1, _KL = 0.05, 3e-5
_DROPPED = 0.12  # of the captions: what guidance guides away from
_UNIFORM = 0.2  # of the times; the others lie where rendering looks, and more of them in the middle
_LENGTHS = (16, 32, 64, 64, 128, 226, 512)  # slots of text that rendering may have


class Work(ABC):
    """A stage's modules and its loss. `modules` are those that are trained."""

    modules: dict[str, Any]

    def __init__(self, settings: Settings, name: str, ranks: Ranks) -> None:
        self.settings, self.name, self.stage, self.ranks = settings, name, settings.stages[name], ranks
        self.device = settings.on()
        cuda = self.device.type == "cuda"
        self.autocast = cuda if settings.autocast is None else settings.autocast
        self.compile = cuda if settings.compile is None else settings.compile
        self.graph = cuda if settings.graph is None else settings.graph
        self.sizes = {settings.size(size): weight for size, weight in self.stage.sizes.items()}

    @cached_property
    def scenes(self) -> Scenes:
        return Scenes(self.stage.two, self.settings.emphasis, self.device)

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """This rank's part of a step's loss: their mean is the loss. All draws come from seed, stage and step."""

    def begin(self, step: int) -> tuple[Size, int, torch.Generator]:
        """A step's size, how many clips of it, and where its draws come from."""
        what = self.settings.seed, self.name, step
        size = choice(self.sizes, *what)
        count = max(round(self.stage.batch * self.settings.usual.pixels / size.pixels), 1)
        if count < self.ranks.size:
            raise ValueError(f"stages.{self.name}.batch: {count} clips of {size}; allowed: one or more for every rank")
        return size, count, generator(self.device, *what)

    def part(self, mean: Tensor, rows: int, count: int) -> Tensor:
        """A mean over this rank's rows as its part of the mean over all."""
        return mean * (rows * self.ranks.size / count)

    def checkpoint(self, stage: str) -> Path:
        return self.settings.folder / f"{stage}.safetensors"

    def half(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


class VaeWork(Work):
    """Reconstruction: squared error, a little absolute error for the edges, and a little KL."""

    def __init__(self, settings: Settings, name: str, ranks: Ranks) -> None:
        super().__init__(settings, name, ranks)
        torch.manual_seed(settings.seed)
        self._vae = models.vae(settings)
        if self.stage.start:
            self._vae.load_state_dict(averaged(self.checkpoint(self.stage.start), "vae"))
        whole.whole(self._vae).to(self.device)
        for module in self._vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                last = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
                module.weight.data = module.weight.data.to(memory_format=last)
            if self.compile and isinstance(module, WanResidualBlock):
                module.compile(dynamic=False)  # else later levels share slow kernels for any size
        self.modules = {"vae": self._vae}

    def loss(self, step: int) -> Tensor:
        size, count, source = self.begin(step)
        mine = self.ranks.rows(count)
        clips = draw(self.scenes.rows[self.scenes.draw(count, source)], size, source, mine)
        # Compiling takes half a minute for a size: only the usual one is worth it.
        stance = "default" if size == self.settings.usual else "force_eager"
        with self.half(), torch.compiler.set_stance(stance):
            mean, log_variance = whole.encode(self._vae, clips)
            mean, log_variance = mean.float(), log_variance.float()
            noise = torch.randn((count, *mean.shape[1:]), device=self.device, generator=source)[mine]
            made = whole.decode(self._vae, mean + torch.exp(0.5 * log_variance) * noise).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = functional.mse_loss(made, clips) + _L1 * functional.l1_loss(made, clips) + _KL * kl
        return self.part(loss, len(clips), count)


class DenoiseWork(Work):
    """Flow matching on normalised latents, text to video or image to video."""

    def __init__(self, settings: Settings, name: str, ranks: Ranks) -> None:
        super().__init__(settings, name, ranks)
        torch.manual_seed(settings.seed)
        self._image = self.stage.trains == "image"
        self._model, self._text = models.transformer(settings, self._image), models.text_encoder(settings)
        if self.stage.start:
            self._begin_with(self.stage.start)
        self._model.to(self.device)
        self._text.to(self.device).requires_grad_(self.stage.encoder)
        self._padded = models.padded(self._model)
        if self.compile:
            for block in self._model.blocks:
                block.compile()
        self._lengths = torch.tensor(_LENGTHS, device=self.device)
        self._graphs = Graphs([*self._model.parameters(), *self._text.parameters()])
        self.modules = {"transformer": self._model, "text_encoder": self._text}

    def _begin_with(self, stage: str) -> None:
        weights = averaged(self.checkpoint(stage), "transformer")
        channels = self._model.config.in_channels
        if weights["patch_embedding.weight"].shape[1] < channels:
            weights = models.widened(weights, channels)
        self._model.load_state_dict(weights)
        self._text.load_state_dict(averaged(self.checkpoint(stage), "text_encoder"), strict=False)

    @cached_property
    def _tokens(self) -> Tensor:
        """Of all captions, and of none."""
        return models.tokens([*self.scenes.captions, ""]).to(self.device)

    @cached_property
    def _bank(self) -> Bank:
        settings = self.settings
        vae = models.vae(settings)
        vae.load_state_dict(averaged(self.checkpoint(settings.last("vae")), "vae"))
        if self.ranks.rank == 0:
            latent_statistics(settings)
        self.ranks.first(0, self.device)  # the others read the file when it is there
        mean, std = latent_statistics(settings)
        return Bank(
            whole.whole(vae).to(self.device), mean.to(self.device), std.to(self.device), self.scenes, self.sizes,
            settings.bank.clips, settings.bank.steps, settings.seed, self._image, self.autocast, self.ranks,
        )  # fmt: skip

    def loss(self, step: int) -> Tensor:
        size, count, drawn = self._draw(step)
        if self.graph:
            return self._graphs.loss(size, lambda *given: self._loss(count, *given), drawn)
        return self._loss(count, *drawn)

    def _draw(self, step: int) -> tuple[Size, int, tuple[Tensor, ...]]:
        """The size of a step's clips, how many all ranks have, and this rank's of all that is drawn for them."""
        size, count, source = self.begin(step)
        x, beside, which = self._bank.batch(step, size, count, source)

        def uniform() -> Tensor:
            return torch.rand(count, device=self.device, generator=source)

        which = torch.where(uniform() < _DROPPED, len(self.scenes.captions), which)
        middle = torch.sigmoid(torch.randn(count, device=self.device, generator=source))
        middle = models.SHIFT * middle / (1 + (models.SHIFT - 1) * middle)
        time = torch.where(uniform() < _UNIFORM, uniform(), middle)
        noise = torch.randn(x.shape, device=self.device, generator=source)
        lengths = self._lengths[torch.randint(len(_LENGTHS), (count,), device=self.device, generator=source)]
        mine = self.ranks.rows(count)
        return size, count, tuple(values[mine] for values in (x, beside, noise, time, self._tokens[which], lengths))

    def _loss(self, count: int, x: Tensor, beside: Tensor, noise: Tensor, time: Tensor, tokens: Tensor,
              lengths: Tensor) -> Tensor:  # fmt: skip
        """A function of what is drawn alone, which asks the device for nothing."""
        self._padded.pad(lengths)
        weight = time.view(-1, 1, 1, 1, 1)
        mask = tokens != 0
        with self.half():
            text = self._text(tokens, models.prepared(mask)).last_hidden_state * mask[..., None]
            mixed = torch.cat([(1 - weight) * x + weight * noise, beside], 1)
            flow = self._model(mixed, 1000 * time, text, return_dict=False)[0]
        return self.part(functional.mse_loss(flow.float(), noise - x), len(x), count)


def work(settings: Settings, name: str, ranks: Ranks) -> Work:
    """The work of a stage. Raises OSError where the checkpoint that it starts from is missing."""
    return (VaeWork if settings.stages[name].trains == "vae" else DenoiseWork)(settings, name, ranks)


def latent_statistics(settings: Settings) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the trained VAE's latents, [z] each: measured once, and kept."""
    path = settings.folder / "latents.safetensors"
    if not path.exists():
        device = settings.on()
        vae = models.vae(settings)
        vae.load_state_dict(averaged(settings.folder / f"{settings.last('vae')}.safetensors", "vae"))
        scenes = Scenes(settings.stages[settings.last("vae")].two, {}, device)
        count = min(settings.bank.clips, 2048)
        mean, std = statistics(whole.whole(vae).to(device), scenes, settings.usual, count, settings.seed)
        save_file({"mean": mean.cpu(), "std": std.cpu()}, path)
    values = load_file(path)
    return values["mean"], values["std"]
