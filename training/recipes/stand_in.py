"""Stand-In: LoRAs on q, k and v of a reference photo, whose keys and values the video's self-attention then sees.

The reference goes through the transformer in every step, with gradient. Its authors published no training code; the
objective is that of their pipeline's `training_loss`, the rest as said at each setting.

Source: arXiv 2508.07901; Stand-In `pipelines/wan_video.py` (training_loss); Concat-ID `train_concat-id_wan2.1.py`.
"""

from dataclasses import dataclass, field

from torch import Tensor

from training.draws import Draws
from training.error_bank import BankView, RecycledError
from training.losses import masked_mse, masks_on_latents, mse
from training.noise import NoiseTable, spread
from training.recipes.base import Batch, Conditions, prompt_of, without


@dataclass(frozen=True, kw_only=True)
class StandInRecipe:
    """Parts of a batch: `reference` (B, C, 1, h, w), the photo's latent; `face_mask` (B, 1, T, H, W) in 0 to 1, only
    with `face_loss`.

    reference_noise: mean and deviation of the logarithm of the noise on the reference, against copying its details
        (Concat-ID's -3, 0.5; there on pixels, here on latents, as the cache has no pixels); None: none.
    reference_drop: how often the reference is zeros. Stand-In has no guidance over the identity: 0 is right for it.
    face_loss: how often only the face counts in the loss (ConsisID: 0.5).
    """

    noise: NoiseTable = field(default_factory=NoiseTable)
    text_drop: float = 0.1
    reference_noise: tuple[float, float] | None = None
    reference_drop: float = 0.0
    face_loss: float = 0.0

    def trains(self, name: str, trainable: str) -> bool:
        return name.startswith("stand_in.")

    def conditions(self, batch: Batch, draw: Draws) -> Conditions:
        reference = batch.parts["reference"]
        if self.reference_noise is not None:
            level = draw.lognormal("reference_level", *self.reference_noise)
            noise = draw.normal("reference_noise", reference.shape[1:]).to(reference)
            reference = reference + spread(level, reference) * noise
        reference = without(reference, draw.uniform("drop_reference") < self.reference_drop)
        grid = batch.grid
        return Conditions(
            prompt_of(batch, draw, self.text_drop),
            plugins=(lambda trainee: trainee.stand_in.encode(trainee.transformer, reference, grid),),
        )

    def corrupt(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Conditions, view: BankView | None, draw: Draws
    ) -> tuple[Tensor, Tensor, Conditions]:
        return clean, noise, conditions

    def loss(self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws) -> Tensor:
        losses = mse(prediction, target)
        if self.face_loss:
            face = masks_on_latents(batch.parts["face_mask"], target.shape[2:])
            of_face = masked_mse(prediction, target, face, face, ["face"] * len(target))
            losses = of_face.where((draw.uniform("face_loss") < self.face_loss).to(losses.device), losses)
        return losses * self.noise.weight(sigma)

    def errors(
        self, prediction: Tensor, target: Tensor, sigma: Tensor, batch: Batch, draw: Draws
    ) -> list[RecycledError]:
        return []
