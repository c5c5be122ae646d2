"""What is trained, as one module: the transformer and its adapters. Its forward pass is the whole prediction, so that
DistributedDataParallel or FSDP wraps every parameter that trains; one that is called past the wrapper is never reduced.
"""

import math
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from errors import UsageError
from models.identity.stand_in import Identity, StandIn
from models.lora import Lora
from models.wan.transformer import WanTransformer
from training.draws import generator
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


def select_trained(trainee: nn.Module, trains: Callable[[str], bool]) -> int:
    """Have these parameters trained and no other. Returns how many values they have.

    Raises:
        UsageError: there are none, as of a LoRA that was not added.
    """
    count = 0
    for name, parameter in trainee.named_parameters():
        parameter.requires_grad_(trains(name))
        count += parameter.numel() * parameter.requires_grad
    if not count:
        raise UsageError("nothing of this model is trained; train.trainable names a part that it does not have")
    return count


def with_known_frames(latents: Tensor, timestep: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latent frames in place of the first, and a timestep for each token (B, L): 0 for theirs."""
    count = known.shape[2]
    latents = torch.cat((known, latents[:, :, count:]), dim=2)
    _, _, frames, height, width = latents.shape
    per_frame = timestep[:, None].repeat(1, frames)
    per_frame[:, :count] = 0
    return latents, per_frame.repeat_interleave((height // 2) * (width // 2), dim=1)


class TrainableStandIn(nn.Module):
    """Stand-In's LoRAs as parameters. At the start the deltas are zero: down ~ N(0, 1/rank²), up = 0.

    seed: of the run; each matrix begins as its name and the seed say.
    """

    def __init__(self, dim: int, num_layers: int, rank: int = 128, seed: int = 0):
        super().__init__()
        self.down = nn.ModuleList(
            nn.ParameterDict({p: nn.Parameter(normal(seed, f"{i}.{p}", (rank, dim)) / rank) for p in "qkv"})
            for i in range(num_layers)
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


# ------------------------------------------------------------------------------------------------------------ LoRA


def add_lora(
    transformer: WanTransformer,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    init: str = "kaiming",
    rslora: bool = False,
    seed: int = 0,
) -> None:
    """Put LoRA layers into a transformer, in float32; their forward pass lies inside its own.

    Args:
        rank, alpha: scale is alpha/rank, or alpha/√rank with `rslora`.
        targets: names of layers at the end of their path: q, k, v, o, ffn.0, ffn.2.
        init: of the first factor: kaiming (uniform) or gaussian (deviation 1/rank); the second is zero.
        seed: of the run.

    Raises:
        UsageError: a target that no layer has.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UsageError(f"train.lora.targets: {target!r} is no linear layer of this transformer; q, k, v, o are")
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=list(targets))
    transformer.add_adapter(config)
    for name, layer in lora_layers(transformer).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if init == "kaiming":
            bound = 1 / math.sqrt(down.shape[1])
            values = generator(seed, 0, None, f"init.{name}").uniform(-bound, bound, tuple(down.shape))
            start = torch.from_numpy(values).float()
        else:
            start = normal(seed, name, down.shape) / rank
        down.data = start.to(down.device)
        up.data = torch.zeros_like(up, dtype=torch.float32)


def lora_layers(transformer: WanTransformer) -> dict[str, LoraLayer]:
    """Layers that have a LoRA, by their names."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def lora_tensors(transformer: WanTransformer) -> dict[str, Tensor]:
    """The LoRA under ComfyUI's names; every script takes it by --lora_path. Its scale is in the second factor and alpha
    is the rank, so that readers which heed alpha and those which do not get the same strength.
    """
    tensors = {}
    for name, layer in lora_layers(transformer).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        key = f"diffusion_model.{name}"
        tensors[f"{key}.lora_A.weight"] = down.detach()
        tensors[f"{key}.lora_B.weight"] = up.detach() * layer.scaling["default"]
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """N(0, 1) float32 for the start of a parameter: of the seed and its name alone."""
    drawn = generator(seed, 0, None, f"init.{name}").standard_normal(tuple(shape), dtype="float32")
    return torch.from_numpy(drawn)


@torch.no_grad()
def copy_lora(lora: Lora, transformer: WanTransformer) -> None:
    """Begin from another LoRA, read for the transformer as it was before `add_lora`.

    Raises:
        UsageError: its layers or its rank are others, or it changes weights in full.
    """
    layers = {f"{name}.weight": layer for name, layer in lora_layers(transformer).items()}
    if lora.full or lora.pairs.keys() != layers.keys():
        raise UsageError(
            f"{lora.source} changes {len(lora.targets)} weights, the LoRA to be trained {len(layers)}; "
            "give train.lora.targets as it was trained with"
        )
    for name, layer in layers.items():
        pair, down, up = lora.pairs[name], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if pair.down.shape != down.shape:
            raise UsageError(f"{lora.source} is of rank {pair.down.shape[0]}; give train.lora.rank as it has")
        down.copy_(pair.down)
        up.copy_(pair.up.float() * (pair.scale / layer.scaling["default"]))
