"""SVI's error-recycling fine-tuning: a LoRA learns to lead back to the video from inputs with its own errors in them.

Source: Stable Video Infinity (arXiv 2510.09212) `train_svi.py`, `train_svi_talk.py`, `train_svi_dance.py`. Its names
mislead: latent_error_buffer holds the errors of the noise, y_error_buffer those of the video; what is put into the
condition comes from the latter too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.multitalk import MultiTalk, Speech, audio_window, latent_windows
from models.pose_embedder import PoseEmbedder, PoseTokens
from models.wan.schedulers import get_schedule
from training.draws import Draws
from training.error_bank import BankView, RecycledError
from training.error_recycling import error_buckets
from training.losses import mse, per_sample, squared_error
from training.noise import NoiseTable
from training.recipes.base import Batch, Conditions, MakePlugin, prompt_of, without

POSE_DROPS = (0.05, 0.1)  # SVI-Dance leaves the pose out on two occasions


@dataclass(frozen=True, kw_only=True)
class ErrorRecyclingRecipe:
    """Parts of a batch:

        condition         (B, 4 + C, F, h, w), mask and condition latents of a clip that goes on from one frame
        condition_motion  the same from several motion frames (Film)
        clip              (B, 257, D), CLIP features of the first frame; missing for Wan2.2
        audio             (B, T, S, C), hidden states of a video's sound (Talk)
        pose              (B, T, H, W, 3) in 0 to 255 (Dance)
        made              (B, 1, F, 1, 1), 1 for latent frames that are to be made, 0 for those that are given (Pro)

    variant: shot, film, talk, dance or pro.
    noise_error, image_error, video_error: how often each error is put in, where the bank has one.
    clean: how often none is, whatever the others say; clean_update: how often such a step's error is kept.
    motion: how often Film goes on from all its motion frames, and not from the first alone. (How often a sample of
        Pro's is a next clip its batches decide.)
    condition_drop: how often Talk hears nothing, or Dance sees no picture.
    grids: buckets of noise levels.
    modulate: an error is multiplied by a number in 1 - modulate to 1 + modulate.
    image_frames: latent frames at the start of the condition that get an error.
    image_buckets: where that error is from: "all", "current" for the sample's own bucket, or (first, last).
    last_frames: it is the end of the stored clip, not any part of it.
    """

    variant: str = "shot"
    noise: NoiseTable = field(default_factory=NoiseTable)
    text_drop: float = 0.0
    noise_error: float = 0.01
    image_error: float = 0.9
    video_error: float = 0.9
    clean: float = 0.2
    clean_update: float = 0.1
    motion: float = 0.9
    condition_drop: float = 0.1
    grids: int = 50
    modulate: float = 0.0
    image_frames: int = 3
    image_buckets: str | tuple[int, int] = "all"
    last_frames: bool = False

    def trains(self, name: str, trainable: str) -> bool:
        """The LoRA, and Dance's pose embedder; Talk's audio layers stay as they are."""
        return "lora_" in name or name.startswith("pose_embedder.")

    @property
    def grid(self) -> Tensor:
        """The timesteps of inference, which name the buckets, (grids,)."""
        return get_schedule("euler", self.grids, self.noise.shift).timesteps

    def conditions(self, batch: Batch, draw: Draws) -> Conditions:
        parts = batch.parts
        image, clip = parts.get("condition"), parts.get("clip")
        if self.variant == "film":
            chosen = (draw.uniform("motion") < self.motion).to(image.device)
            image = parts["condition_motion"].where(chosen.view(-1, 1, 1, 1, 1), image)
        plugins: tuple[MakePlugin, ...] = ()
        if self.variant == "talk":
            audio = without(parts["audio"], draw.uniform("drop_condition") < self.condition_drop)
            frames = 4 * batch.mean.shape[2] - 3
            plugins = (lambda trainee: speak(trainee.multitalk, audio, frames),)
        if self.variant == "dance":
            dropped = self.drops_picture(draw)
            image, clip = without(image, dropped), None if clip is None else without(clip, dropped)
            hidden = torch.zeros_like(dropped)
            for number, share in enumerate(POSE_DROPS):
                hidden |= draw.uniform(f"drop_pose{number}") < share
            plugins = (lambda trainee: pose_tokens(trainee.pose_embedder, parts["pose"], hidden),)
        return Conditions(prompt_of(batch, draw, self.text_drop, clip), image, plugins)

    def drops_picture(self, draw: Draws) -> Tensor:
        """(B,) bool: condition and CLIP features are left out together, and then get no error either."""
        share = self.condition_drop if self.variant == "dance" else 0.0
        return draw.uniform("drop_condition") < share

    # ---------------------------------------------------------------------------------------------------- errors in

    def corrupt(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Conditions, view: BankView | None, draw: Draws
    ) -> tuple[Tensor, Tensor, Conditions]:
        """Add errors from the bank to the noise, to the condition and to the video."""
        if view is None:
            return clean, noise, conditions
        start, end = clean.clone(), noise.clone()
        image = None if conditions.image is None else conditions.image.clone()
        is_clean = draw.uniform("clean") < self.clean
        into = {
            name: ((draw.uniform(f"into_{name}") < share) & ~is_clean).tolist()
            for name, share in (("noise", self.noise_error), ("image", self.image_error), ("video", self.video_error))
        }
        without_picture = self.drops_picture(draw).tolist()
        shape = tuple(clean.shape[1:])
        for row, bucket in enumerate(error_buckets(sigma.cpu() * 1000, self.grid).tolist()):
            own = draw.of(row)
            if into["noise"][row]:
                end[row] += self.sampled(view, "noise", "noise", shape, [bucket], own, like=end)
            places = self.frames_of_image(image, row)
            if into["image"][row] and places is not None and not without_picture[row]:
                error = self.sampled(view, "image", "video", shape, self.buckets_for_image(bucket), own, like=image)
                latest = max(0, error.shape[1] - self.image_frames)
                first = latest if self.last_frames else own.integers("image_start", latest + 1).item()
                given = image[row, 4:, places]  # channels of the mask stay
                given += error[:, first : first + given.shape[1]]
            if into["video"][row]:
                start[row] += self.sampled(view, "video", "video", shape, [bucket], own, like=start)
        return start, end, replace(conditions, image=image)

    def frames_of_image(self, image: Tensor | None, row: int) -> slice | None:
        """The latent frames of a sample's condition that an error goes to; None without any. The first ones, however
        many were handed over; of Pro those of the clip before, for by the picture the person is found again.
        """
        if image is None:
            return None
        if self.variant != "pro":
            return slice(0, self.image_frames)
        handed = slice(1, 1 + self.image_frames)
        return handed if image[row, 4:, handed].any() else None

    def buckets_for_image(self, current: int) -> Sequence[int]:
        if self.image_buckets == "all":
            return range(self.grids)
        if self.image_buckets == "current":
            return [current]
        first, last = self.image_buckets
        return range(first, min(last + 1, self.grids))

    def sampled(
        self,
        view: BankView,
        target: str,
        kind: str,
        shape: tuple[int, ...],
        buckets: Sequence[int],
        draw: Draws,
        like: Tensor,
    ) -> Tensor:
        """An error (C, F, h, w) of these buckets, all equally likely, times its random factor; zeros if there is none.

        target: what it is put into; names the draws.
        """
        entries = view.entries(kind, shape, buckets)
        if not entries:
            return like.new_zeros(shape)
        chosen = view.read(kind, entries[draw.integers(f"{target}_entry", len(entries)).item()])
        factor = 1 - self.modulate + 2 * self.modulate * draw.uniform(f"{target}_factor").item()
        return chosen.to(like) * factor

    # --------------------------------------------------------------------------------------------------- errors out

    def loss(self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws) -> Tensor:
        if (made := batch.parts.get("made")) is None:
            return mse(prediction, target) * self.noise.weight(sigma)
        of_made = per_sample(squared_error(prediction, target) * made) / per_sample(made)
        return of_made * self.noise.weight(sigma)

    def errors(
        self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws
    ) -> list[RecycledError]:
        velocity = prediction.float() - target.float()
        velocity = (velocity * batch.parts["made"] if "made" in batch.parts else velocity).cpu()
        kept = (draw.uniform("clean") >= self.clean) | (draw.uniform("clean_update") < self.clean_update)
        buckets = error_buckets(sigma.cpu() * 1000, self.grid).tolist()
        rows = zip(draw.positions, buckets, sigma.tolist(), velocity, kept.tolist(), strict=True)
        return [RecycledError(*row) for row in rows]


# ------------------------------------------------------------------------------------------------ Talk and Dance


def speak(multitalk: MultiTalk, audio: Tensor, num_frames: int) -> Speech:
    """The plug-in of a batch's sounds (B, T, S, C), each from its start."""
    windows = [latent_windows(audio_window(one, 0, num_frames)) for one in audio]
    return Speech(multitalk, torch.cat([first for first, _ in windows]), torch.cat([latter for _, latter in windows]))


def pose_tokens(embedder: PoseEmbedder, poses: Tensor, hidden: Tensor) -> PoseTokens:
    """The plug-in of a batch's pose videos, zeros for those that are hidden. The embedder trains."""
    tokens = embedder.embed(poses)
    return replace(tokens, tokens=without(tokens.tokens, hidden.to(tokens.tokens.device)))
