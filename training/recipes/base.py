"""What every denoising recipe shares: a batch, what a network is given, one step; and plain training on text or image.

    losses, errors = denoising_step(recipe, trainee, batch, draw, view)

A recipe is four pure functions of a batch and its draws. The loop calls them; nothing is kept between calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from models.wan.slots import Plugin, Prompt
from pipelines.conditions import fold_mask
from training.draws import Draws
from training.error_bank import BankView, RecycledError
from training.losses import mse
from training.noise import NoiseTable, add_noise

if TYPE_CHECKING:
    from training.trainee import Trainee

# Made inside the trainee's forward pass, so that gradients of what it uses are recorded there.
MakePlugin = Callable[["Trainee"], Plugin]


@dataclass(frozen=True)
class Batch:
    """The samples of one forward pass as the cache has them, all of one size.

    positions:  in the global batch.
    mean, std:  of the VAE's posterior, normalised, (B, C, F, h, w); std None trains on the mean, as Wan and SVI do.
    text:       a list of (len, text_dim), or a tensor (B, T, text_dim).
    empty_text: (len, text_dim), the empty prompt, for samples whose text is dropped.
    parts:      what the recipe reads beside these, by name; each recipe lists its own.
    """

    positions: Sequence[int]
    mean: Tensor
    text: Sequence[Tensor] | Tensor
    std: Tensor | None = None
    empty_text: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def latents(self, draw: Draws) -> Tensor:
        """The clean latents: a sample of the posterior, another in each epoch, from what was encoded once."""
        return posterior_sample(self.mean, self.std, draw, "posterior")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the video in tokens."""
        return self.mean.shape[-2] // 2, self.mean.shape[-1] // 2


@dataclass(frozen=True)
class Conditions:
    """What a network is given beside noisy latents and timestep.

    image: (B, 4 + C, F, h, w), the mask and condition latents of image-to-video models, beside the noisy channels.
    plugins: what adapters add; called with the trainee in its forward pass.
    known: (B, C, k, h, w), latent frames at the start that are given clean and told to be at timestep 0 (TI2V).
    """

    prompt: Prompt
    image: Tensor | None = None
    plugins: tuple[MakePlugin, ...] = ()
    known: Tensor | None = None


class Recipe(Protocol):
    """How one kind of model is trained."""

    noise: NoiseTable

    def trains(self, name: str, trainable: str) -> bool:
        """Whether this parameter of the trainee is trained; `trainable` is adapter, lora or full."""

    def conditions(self, batch: Batch, draw: Draws) -> Conditions:
        """What the network is told, with this step's dropouts."""

    def corrupt(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Conditions, view: BankView | None, draw: Draws
    ) -> tuple[Tensor, Tensor, Conditions]:
        """What is mixed instead of the clean latents and the noise, and the conditions that go with it."""

    def loss(self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws) -> Tensor:
        """(B,) float32, weighted."""

    def errors(
        self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws
    ) -> list[RecycledError]:
        """What the bank is offered."""


def denoising_step(
    recipe: Recipe,
    trainee: Callable[[Tensor, Tensor, Conditions], Tensor],
    batch: Batch,
    draw: Draws,
    view: BankView | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, list[RecycledError]]:
    """One forward pass of training.

    Args:
        trainee: (noisy latents, timestep (B,), conditions) -> velocity.
        view: of the error bank; None without one.
        indices: (B,) of the noise table, where they are not to be drawn: a held-out loss is taken at fixed ones.

    Returns:
        losses (B,) float32, and the errors for the bank.
    """
    conditions = recipe.conditions(batch, draw)
    index = recipe.noise.sample(draw) if indices is None else indices
    clean = batch.latents(draw)  # (B, C, F, h, w)
    sigma, timestep = (table[index].to(clean.device) for table in (recipe.noise.sigmas, recipe.noise.timesteps))
    noise = draw.normal("noise", clean.shape[1:]).to(clean)
    start, end, conditions = recipe.corrupt(clean, noise, sigma, conditions, view, draw)
    target = end - clean  # from the clean latents, also where the mixed ones carry an error: the way back is learnt
    prediction = trainee(add_noise(start, end, sigma), timestep, conditions)
    losses = recipe.loss(prediction, target, sigma, batch, draw)
    return losses, recipe.errors(prediction.detach(), target, sigma, batch, draw)


# ------------------------------------------------------------------------------------------- pieces of conditions


def posterior_sample(mean: Tensor, std: Tensor | None, draw: Draws, purpose: str) -> Tensor:
    """mean + std·e, one row a sample."""
    if std is None:
        return mean
    return mean + std * draw.normal(purpose, mean.shape[1:]).to(mean)


def prompt_of(batch: Batch, draw: Draws, text_drop: float, image: Tensor | None = None) -> Prompt:
    """The prompts, each replaced by the empty one with probability `text_drop`; CLIP features (B, 257, D) beside."""
    text = batch.text
    dropped = (draw.uniform("drop_text") < text_drop).tolist()
    if any(dropped):
        if batch.empty_text is None:
            raise ValueError(f"text_drop is {text_drop:g}, but the batch has no encoding of the empty prompt")
        text = [batch.empty_text if drop else rows for drop, rows in zip(dropped, text, strict=True)]
    return Prompt(text, image)


def without(values: Tensor, dropped: Tensor) -> Tensor:
    """Zeros in the rows that are dropped; (B, …) and (B,) bool."""
    return values * (~dropped).to(values).view(-1, *[1] * (values.ndim - 1))


def first_frame_known(latents: Tensor) -> Tensor:
    """y = mask and condition latents (B, 4 + C, F, h, w): the first frame is marked as known, alone."""
    known = torch.zeros(4 * latents.shape[2] - 3)
    known[0] = 1
    return torch.cat((fold_mask(known, latents).expand(len(latents), -1, -1, -1, -1), latents), dim=1)


# ----------------------------------------------------------------------------------------------------- the recipe


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """Text or image to video, LoRA or full.

    Parts of a batch: `condition` (B, 4 + C, F, h, w) and `clip` (B, 257, D), both only for image-to-video models.

    text_drop: how often a prompt is replaced by the empty one, for classifier-free guidance.
    known_frames: latent frames at the start that are given clean (TI2V: 1 teaches image to video).
    """

    noise: NoiseTable = field(default_factory=NoiseTable)
    text_drop: float = 0.1
    known_frames: int = 0

    def trains(self, name: str, trainable: str) -> bool:
        return "lora_" in name if trainable == "lora" else name.startswith("transformer.")

    def conditions(self, batch: Batch, draw: Draws) -> Conditions:
        prompt = prompt_of(batch, draw, self.text_drop, batch.parts.get("clip"))
        return Conditions(prompt, batch.parts.get("condition"))

    def corrupt(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Conditions, view: BankView | None, draw: Draws
    ) -> tuple[Tensor, Tensor, Conditions]:
        if self.known_frames:
            conditions = replace(conditions, known=clean[:, :, : self.known_frames])
        return clean, noise, conditions

    def loss(self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws) -> Tensor:
        return mse(prediction, target, self.known_frames) * self.noise.weight(sigma)

    def errors(
        self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws
    ) -> list[RecycledError]:
        return []
