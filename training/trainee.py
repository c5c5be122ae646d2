"""What is trained, as one module: the transformer and its adapters. Its forward pass is the whole prediction, so that
DistributedDataParallel or FSDP wraps every parameter that trains; one that is called past the wrapper is never reduced.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.identity.stand_in import Identity, StandIn
from models.wan.transformer import WanTransformer
from training.recipes.base import Conditions


class Trainee(nn.Module):
    """A transformer and the adapters beside it, by the names that recipes call them by.

    trainee = Trainee(transformer, audio_adapter=adapter)
    trainee(noisy latents, timestep, conditions) -> velocity
    """

    def __init__(self, transformer: WanTransformer, **adapters: nn.Module):
        super().__init__()
        self.transformer = transformer
        for name, adapter in adapters.items():
            setattr(self, name, adapter)

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Velocity of noisy latents (B, C, F, h, w) at timesteps (B,), 0 to 1000. Same shape, float32."""
        if conditions.known is not None:
            latents, timestep = with_known_frames(latents, timestep, conditions.known)
        return self.transformer(
            latents,
            timestep,
            conditions.prompt,
            condition=conditions.image,
            plugins=[make(self) for make in conditions.plugins],
        )


def with_known_frames(latents: Tensor, timestep: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latent frames in place of the first, and a timestep for each token (B, L): 0 for theirs."""
    count = known.shape[2]
    latents = torch.cat((known, latents[:, :, count:]), dim=2)
    _, _, frames, height, width = latents.shape
    per_frame = timestep[:, None].repeat(1, frames)
    per_frame[:, :count] = 0
    return latents, per_frame.repeat_interleave((height // 2) * (width // 2), dim=1)


class TrainableStandIn(nn.Module):
    """Stand-In's LoRAs as parameters. At the start the deltas are zero: down ~ N(0, 1/rank²), up = 0."""

    def __init__(self, dim: int, num_layers: int, rank: int = 128):
        super().__init__()
        self.down = nn.ModuleList(
            nn.ParameterDict({p: nn.Parameter(torch.randn(rank, dim) / rank) for p in "qkv"}) for _ in range(num_layers)
        )
        self.up = nn.ModuleList(
            nn.ParameterDict({p: nn.Parameter(torch.zeros(dim, rank)) for p in "qkv"}) for _ in range(num_layers)
        )

    @classmethod
    def of(cls, weights: StandIn) -> "TrainableStandIn":
        """Trainable copies of loaded weights."""
        rank, dim = weights.down[0]["q"].shape
        module = cls(dim, len(weights.down), rank)
        with torch.no_grad():
            for own, given in ((module.down, weights.down), (module.up, weights.up)):
                for parameters, tensors in zip(own, given, strict=True):
                    for name, tensor in tensors.items():
                        parameters[name].copy_(tensor)
        return module

    def weights(self) -> StandIn:
        """The same parameters, as inference has them; `weights().state_dict()` has the released names."""
        return StandIn([dict(each.items()) for each in self.down], [dict(each.items()) for each in self.up])

    def encode(self, transformer: WanTransformer, reference: Tensor, grid: tuple[int, int]) -> Identity:
        """Keys and values of one photo a sample, (B, C, 1, h, w), with gradients."""
        identity = self.weights().encode(transformer, [reference], grid)
        # The last block's q changes only tokens that nothing reads. Processes that reduce gradients wait for each
        # parameter's, so it gets one: zero.
        unused: Sequence[Tensor] = (self.down[-1]["q"], self.up[-1]["q"])
        key, value = identity.keys_values[-1]
        key = key + sum(parameter.sum() for parameter in unused) * 0
        return Identity((*identity.keys_values[:-1], (key, value)), identity.grid, identity.steps)
