"""What a model family must say. No torch, no diffusers: checkpoint folders are checked by it before either is loaded.

A family is a description of diffusers' own pipeline and transformer. `pipeline.PipelineAdapter` does with it what all
families have in common.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .base import Encoding
    from .configs import Config
    from .loading import ModelFolder, ModelShape
    from .split import Split

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"


def packed(latents: "Tensor", patch: tuple[int, int, int]) -> "Tensor":
    """Latents [B, C, f, h, w] as tokens [B, L, C * patch], as several of diffusers' pipelines have them."""
    batch, channels, *sizes = latents.shape
    grid = [n for size, p in zip(sizes, patch, strict=True) for n in (size // p, p)]
    return latents.reshape(batch, channels, *grid).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpacked(tokens: "Tensor", sizes: tuple[int, ...], patch: tuple[int, int, int]) -> "Tensor":
    """Undoes `packed`; sizes: C, f, h, w."""
    channels, *rest = sizes
    grid = [size // p for size, p in zip(rest, patch, strict=True)]
    latents = tokens.reshape(len(tokens), *grid, channels, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return latents.reshape(len(tokens), *sizes)


@dataclass(frozen=True)
class Component:
    """A part of a checkpoint: which library holds its class, and which classes are supported.

    weights: what its weight files are called, "" where it has none; config: the file with its configuration; needed:
    whether every checkpoint of the family has it. defaults: diffusers' own, for keys that its configuration leaves out.
    vocabulary: of a tokenizer, whether it has one, rather than taking bytes for tokens.
    """

    library: str
    classes: tuple[str, ...]
    weights: str = ""
    config: str = "config.json"
    needed: bool = True
    defaults: Mapping[str, Any] | None = None
    vocabulary: bool = True


def parts(**components: Component) -> Mapping[str, Component]:
    """What a family's checkpoints consist of, by the names of their folders."""
    return components


def model(name: str, defaults: Mapping[str, Any], needed: bool = True) -> Component:
    """A model of diffusers, of one class."""
    return Component(DIFFUSERS, (name,), "diffusion_pytorch_model", needed=needed, defaults=defaults)


def encoder(*classes: str, needed: bool = True) -> Component:
    """A model of transformers."""
    return Component(TRANSFORMERS, classes, "model", needed=needed)


def tokenizer(*classes: str, vocabulary: bool = True) -> Component:
    """Of one of these classes, or of those that transformers puts in their place."""
    replaced = "TokenizersBackend", "PreTrainedTokenizerFast", "AutoTokenizer"
    return Component(TRANSFORMERS, (*classes, *replaced), config="tokenizer_config.json", vocabulary=vocabulary)


def processor(*classes: str) -> Component:
    """What prepares pictures for an encoder of some checkpoints."""
    return Component(TRANSFORMERS, classes, config="preprocessor_config.json", needed=False)


def scheduler(*classes: str) -> Component:
    """Schedulers that draw noise of their own are not to be among them: every rank would draw another."""
    return Component(DIFFUSERS, classes, config="scheduler_config.json")


class Family(ABC):
    """One family; without state.

    pipelines: its classes in model_index.json. components: what they consist of. classifier_free: whether guidance
    takes two predictions; else the scale is one of the transformer's inputs. scale: what the pipeline calls it.
    asked: what the transformer calls those parts of an encoded prompt in which two predictions differ. masked:
    whether keys are left out of attention; waits: whether the transformer asks the device what its inputs are.
    layers: keys of the transformer's configuration that count layers, and the weights of such a layer that make its
    queries. patch: latents of a token, where the pipeline takes and gives tokens. calls_back: whether the pipeline
    tells of the end of each step. schedulers: those that users may choose beside the ones that checkpoints have:
    each takes what the pipeline tells it, and knows the noise levels that the model was trained on.
    """

    pipelines: tuple[str, ...]
    components: Mapping[str, Component]
    classifier_free: bool = True
    scale: str = "guidance_scale"
    asked: Mapping[str, str] = {"prompt_embeds": "encoder_hidden_states"}
    masked: bool = False
    waits: bool = False
    layers: Mapping[str, str] = {"num_layers": "transformer_blocks.{}.attn.to_q.weight"}
    patch: tuple[int, int, int] | None = None
    calls_back: bool = True
    schedulers: tuple[str, ...] = ()

    def graphs(self, counts_keys: bool) -> bool:
        """Whether passes can be CUDA graphs; counts_keys: whether attention reads on the device how many keys count."""
        return not self.waits and (counts_keys or not self.masked)

    @abstractmethod
    def check(self, index: "Config", found: Mapping[str, "Config"]) -> None:
        """Raises InputError unless the parts, of which these are the configurations, fit each other."""

    def tensors(self, part: str, config: "Config") -> Mapping[str, tuple[int, ...] | None]:
        """Some tensors of the weights of `part` if they are what `config` says, and their shapes; None: not there."""
        found = dict[str, tuple[int, ...] | None]()
        if part.startswith("transformer"):
            width = config["num_attention_heads"] * config["attention_head_dim"]
            for key, name in self.layers.items():
                count = config[key]
                found |= {name.format(i): (width, width) if i < count else None for i in range(count + 1)}
        return found

    def shape(self, folder: "ModelFolder") -> "ModelShape":
        """The model's numbers, from its checked configurations."""
        from .loading import ModelShape

        transformer = folder.transformer
        return ModelShape(
            layers=sum(transformer[key] for key in self.layers),
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            **self.sizes(folder),
        )

    def layer_lists(self) -> list[str]:
        """What a transformer calls its lists of layers, in the order in which they compute."""
        return list(dict.fromkeys(name.partition(".{}")[0] for name in self.layers.values()))

    @abstractmethod
    def sizes(self, folder: "ModelFolder") -> dict[str, Any]:
        """Those that families have under names of their own: all others of ModelShape."""

    def prepare(self, pipe: Any) -> None:
        """Changes what of a loaded pipeline has to be another than its own: here, nothing."""
        return

    def resumable(self, scheduler: Any) -> Any:
        """One that keeps all that its steps look back to: here, the same."""
        return scheduler

    @abstractmethod
    def split(self, model: Any, split: "Split") -> None:
        """Tells `split` what of the transformer is cut along tokens."""

    def compile(self, transformer: Any) -> None:
        """On a GPU, with model.compile: what torch.compile is to make of it: here, its layers one by one."""
        from .compiling import compile_layers

        for name in self.layer_lists():
            compile_layers(transformer.get_submodule(name))

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        """An encoded prompt, and how many of its tokens were cut off; limit: max_sequence_length.

        Here: of a pipeline with one text encoder, that says which of its tokens count.
        """
        tokens = pipe.tokenizer(text, verbose=False).input_ids
        encoded, mask, *_ = pipe.encode_prompt(text, None, False, max_sequence_length=limit)
        return {"prompt_embeds": encoded, "prompt_attention_mask": mask}, max(len(tokens) - limit, 0)

    @abstractmethod
    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        """What the pipeline starts from: [1, C, f, h, w]."""

    def pack(self, latents: "Tensor") -> "Tensor":
        """Latents [B, C, f, h, w] as the pipeline takes them."""
        return packed(latents, self.patch) if self.patch else latents

    def unpack(self, latents: "Tensor", sizes: tuple[int, ...]) -> "Tensor":
        """Undoes `pack`; sizes: C, f, h, w."""
        return unpacked(latents, sizes, self.patch) if self.patch else latents

    def guide(self, pipe: Any, scale: float) -> dict[str, Any]:
        """How the pipeline is told the guidance scale."""
        return {self.scale: scale}

    def options(self, pipe: Any, latents: "Tensor", image: Any, seeds: tuple[int, ...]) -> dict[str, Any]:
        """What the pipeline is told beside prompts, sizes, steps, scale and latents [B, C, f, h, w].

        image: the picture that all videos start from, or None; seeds: of each video, for what is drawn beside latents.
        """
        return {} if image is None else {"image": image}

    @abstractmethod
    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        """One video's pixels, [1, 3, F, H, W] from -1 to 1, of latents [1, C, f, h, w]; the pipeline's own bits."""


def unscaled(vae: Any, latents: "Tensor") -> "Tensor":
    """Latents as a VAE with a mean and a deviation a channel takes them.

    Dividing by the inverse instead of multiplying is what diffusers' pipelines do: the same bits.
    """
    mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return latents / (1 / std) + mean
