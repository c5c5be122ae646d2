"""StableAvatar: a transformer and its audio adapter learn to follow speech.

Source: arXiv 2508.08248; StableAvatar `train_1B_square.py`. Where it draws once for a whole global batch (audio drop,
clip level, loss mask), because its processes share a seed, each sample here draws for itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from models.audio_adapter import AudioAdapter
from models.wan.slots import BlockContext, Plugin, Slots
from training.draws import Draws
from training.error_bank import BankView, RecycledError
from training.losses import choose_masks, masked_mse, masks_on_latents, motion_difference
from training.noise import NoiseTable
from training.recipes.base import Batch, Conditions, first_frame_known, posterior_sample, prompt_of, without


@dataclass(frozen=True, kw_only=True)
class AvatarRecipe:
    """Parts of a batch:

        masked, masked_std  (B, C, F, h, w), the posterior of the video with all but its first frame black; the
                            deviation may be missing
        clip                (B, 257, D), CLIP features of the first frame
        audio               (B, L, 768), wav2vec2's last hidden states of the clip's sound
        face_mask, lip_mask (B, 1, T, H, W) in 0 to 1; ones where a video has none

    audio_drop, clip_drop: how often the sound, or CLIP's features, are zeros (14B: 0.1 for CLIP).
    clip_level: how often every token hears the whole clip.
    motion_loss: share of the loss on motion; motion_axis: see `losses.motion_difference`.
    masks: how often the whole picture counts with face and lips twice, and the face alone; else the lips alone.
    """

    noise: NoiseTable = field(default_factory=lambda: NoiseTable(weighting="none"))
    text_drop: float = 0.0
    audio_drop: float = 0.1
    clip_level: float = 0.3
    clip_drop: float = 0.0
    motion_loss: float = 0.25
    motion_axis: str = "frames"
    masks: tuple[float, float] = (0.4, 0.1)

    def trains(self, name: str, trainable: str) -> bool:
        """The adapter always; with it a LoRA, or all blocks. The embeddings of patches, text, time and pictures, and
        the head, stay as they are.
        """
        beside = {"adapter": (), "lora": ("lora_",), "full": ("transformer.blocks.",)}[trainable]
        return name.startswith("audio_adapter.") or any(part in name for part in beside)

    def conditions(self, batch: Batch, draw: Draws) -> Conditions:
        parts = batch.parts
        masked = posterior_sample(parts["masked"], parts.get("masked_std"), draw, "posterior_masked")
        clip = without(parts["clip"], draw.uniform("drop_clip") < self.clip_drop)
        audio = without(parts["audio"], draw.uniform("drop_audio") < self.audio_drop)
        clip_level = draw.uniform("clip_level") < self.clip_level
        frames = 4 * batch.mean.shape[2] - 3
        return Conditions(
            prompt_of(batch, draw, self.text_drop, clip),
            first_frame_known(masked),
            plugins=(lambda trainee: hear(trainee.audio_adapter, audio, frames, clip_level),),
        )

    def corrupt(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Conditions, view: BankView | None, draw: Draws
    ) -> tuple[Tensor, Tensor, Conditions]:
        return clean, noise, conditions

    def loss(self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws) -> Tensor:
        face, lip = (masks_on_latents(batch.parts[f"{name}_mask"], target.shape[2:]) for name in ("face", "lip"))
        which = choose_masks(draw.uniform("mask"), *self.masks)
        losses = masked_mse(prediction, target, face, lip, which)
        if self.motion_loss:
            motion = motion_difference(prediction, target, self.motion_axis)
            losses = (1 - self.motion_loss) * losses + self.motion_loss * motion
        return losses * self.noise.weight(sigma)

    def errors(
        self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws
    ) -> list[RecycledError]:
        return []


def hear(adapter: AudioAdapter, audio: Tensor, num_frames: int, clip_level: Tensor) -> Plugin:
    """The plug-in of a batch whose samples may differ in whether they hear the clip as a whole.

    Args:
        audio: (B, L, audio_dim).
        num_frames: pixel frames.
        clip_level: (B,) bool.
    """
    kinds = clip_level.unique().tolist()
    plugins = {kind: adapter.plugin(audio, num_frames, clip_level=kind) for kind in kinds}
    if len(kinds) == 1:
        return plugins[kinds[0]]

    def plugin(tokens: Tensor, ctx: BlockContext) -> Slots:
        terms = {kind: made(tokens, ctx).cross_attention for kind, made in plugins.items()}
        rows = clip_level.to(tokens.device)[:, None, None]

        @torch.compiler.disable
        def term(index: int, q: Tensor, attend: Callable) -> Tensor:
            return terms[True][index](q, attend).where(rows, terms[False][index](q, attend))

        return Slots(cross_attention=[partial(term, index) for index in range(len(terms[True]))])

    return plugin
