"""VACE: its branch learns to follow control videos, masks and reference pictures. The base transformer stays as it is.

VACE's authors published no training code; the objective is that of the base model, on the whole video.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.vace import VaceBranch
from models.wan.slots import BlockContext, Plugin, Slots
from models.wan.transformer import WanTransformer
from training.draws import Draws, generator
from training.error_bank import BankView, RecycledError
from training.losses import mse, per_sample, squared_error
from training.noise import NoiseTable
from training.recipes.base import Batch, Conditions, prompt_of


@dataclass(frozen=True, kw_only=True)
class VaceRecipe:
    """Parts of a batch: `vace_context` (B, 96, R + F, h, w), kept and inactive latents and the folded mask; with R
    reference frames in front, which the latents of the batch then have too.

    masked_loss: how often only what the mask opens counts in the loss; the rest is given, and mostly copied.
    """

    noise: NoiseTable = field(default_factory=NoiseTable)
    text_drop: float = 0.1
    masked_loss: float = 0.0

    def trains(self, name: str, trainable: str) -> bool:
        return name.startswith("vace.")

    def conditions(self, batch: Batch, draw: Draws) -> Conditions:
        context = batch.parts["vace_context"]
        return Conditions(
            prompt_of(batch, draw, self.text_drop),
            plugins=(lambda trainee: hints_at_once(trainee.vace, context, checkpointing_of(trainee.transformer)),),
        )

    def corrupt(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Conditions, view: BankView | None, draw: Draws
    ) -> tuple[Tensor, Tensor, Conditions]:
        return clean, noise, conditions

    def loss(self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws) -> Tensor:
        losses = mse(prediction, target)
        if self.masked_loss:
            opened = batch.parts["vace_context"][:, -64:].float().mean(dim=1, keepdim=True)  # (B, 1, F, h, w)
            of_mask = per_sample(squared_error(prediction, target) * opened)
            chosen = draw.uniform("masked_loss") < self.masked_loss
            losses = torch.where(chosen.to(losses.device), of_mask, losses)
        return losses * self.noise.weight(sigma)

    def errors(
        self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws
    ) -> list[RecycledError]:
        return []


def new_branch(transformer: WanTransformer, layers: Sequence[int], seed: int) -> VaceBranch:
    """A branch that begins as VACE's did: its blocks are copies of the base's, and what leads into it and out of it is
    zero, so that it changes nothing yet. The patch embedding of the context follows from the seed.

    Source: arXiv 2503.07598, section 3.3 (context adapter tuning).
    """
    config, dtype = transformer.config, transformer.compute_dtype
    same = {name: getattr(config, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers", "eps", "patch_size")}
    branch = VaceBranch(**same, vace_layers=list(layers))
    with torch.no_grad():
        embedding = branch.vace_patch_embedding
        start = generator(seed, 0, None, "init.vace_patch_embedding").standard_normal(embedding.weight.shape)
        embedding.weight.copy_(torch.from_numpy(start) / embedding.weight[0].numel() ** 0.5)
        embedding.bias.zero_()
        for block, layer in zip(branch.vace_blocks, layers, strict=True):
            block.load_state_dict(transformer.blocks[layer].state_dict(), strict=False)
            for projection in (block.after_proj, *([block.before_proj] if hasattr(block, "before_proj") else [])):
                projection.weight.zero_()
                projection.bias.zero_()
    return branch.set_compute_dtype(dtype)


def checkpointing_of(transformer: WanTransformer) -> Callable:
    """How blocks beside the transformer run while training, which is as its own do: computed again backward, or not."""
    return transformer._gradient_checkpointing_func if transformer.gradient_checkpointing else call


def call(block: nn.Module, *args: object) -> object:
    return block(*args)


def hints_at_once(branch: VaceBranch, context: Tensor, run: Callable = call) -> Plugin:
    """The branch's plug-in with all hints computed before the first block, where inference computes each right before
    it is added: a block that is checkpointed runs twice, the second time from the last to the first.
    """

    def plugin(tokens: Tensor, ctx: BlockContext) -> Slots:
        control, video = branch(list(context), tokens, ctx), tokens
        residuals: list = [None] * branch.config.num_layers
        for block, layer in zip(branch.vace_blocks, branch.config.vace_layers, strict=True):
            prompt = None if ctx.prompt is None else ctx.prompt.block(block)
            control, hint = run(block, control, ctx, prompt, video)
            video = None  # the first block's alone
            residuals[layer] = lambda x, hint=hint: hint.to(x.dtype)
        return Slots(block_residuals=residuals)

    return plugin
