"""Tiny random parts that tests share."""

import torch
from diffusers import WanTransformer3DModel

from configs import load_config
from models.audio_adapter import AudioAdapter
from models.identity.stand_in import StandIn
from models.multitalk import MultiTalk
from models.pose_embedder import PoseTokens
from models.vace import VaceBranch
from models.wan.checkpoint import to_diffusers_name
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer
from pipelines.tiny import (
    fill_from_seed,
    tiny_multitalk,
    tiny_pose_embedder,
    tiny_stand_in,
    tiny_transformer,
    tiny_vace,
)

CONFIG = load_config("tiny")
DIM, LAYERS = CONFIG["transformer"]["dim"], CONFIG["transformer"]["num_layers"]
GRID = (4, 6)  # rows and columns of LATENTS in tokens


def transformer(**changes) -> WanTransformer:
    return tiny_transformer(CONFIG | {"transformer": CONFIG["transformer"] | changes})


def diffusers_transformer(model: WanTransformer) -> WanTransformer3DModel:
    """Diffusers' own network with a text-to-video model's weights."""
    c = model.config
    theirs = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.dim // c.num_heads,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
    ).eval()
    theirs.load_state_dict({to_diffusers_name(name): tensor for name, tensor in model.state_dict().items()})
    return theirs


def stand_in(model: WanTransformer) -> StandIn:
    return tiny_stand_in(CONFIG, model)


def vace_branch() -> VaceBranch:
    return tiny_vace(CONFIG)


def multitalk() -> MultiTalk:
    return tiny_multitalk(load_config("tiny-i2v"))


def audio(frames: int, seed: int = 9) -> torch.Tensor:
    """Hidden states of a soundtrack, (frames, layers, C)."""
    encoder = load_config("tiny-i2v")["audio_encoder"]
    return torch.randn(
        frames, encoder["num_hidden_layers"], encoder["hidden_size"], generator=torch.Generator().manual_seed(seed)
    )


def pose(seed: int = 11) -> PoseTokens:
    """A pose video of the size of `latents`, embedded."""
    size = (9, 16 * GRID[0], 16 * GRID[1], 3)
    video = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed))
    return tiny_pose_embedder(CONFIG).encode(video)


def latents(seed: int = 1, batch: int = 1, frames: int = 3, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, frames, 2 * GRID[0], 2 * GRID[1], generator=generator)


def photo(seed: int = 7) -> torch.Tensor:
    return torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int = 3, length: int = 11, **options) -> Prompt:
    states = torch.randn(length, CONFIG["transformer"]["text_dim"], generator=torch.Generator().manual_seed(seed))
    return Prompt([states], **options)


TIMESTEP = torch.tensor([600.0])


def avatar_transformer(**changes) -> WanTransformer:
    """Image-to-video with CLIP features, the base of the audio adapter."""
    return transformer(in_dim=36, image_dim=16, **changes)


def audio_adapter(model: WanTransformer, **options) -> AudioAdapter:
    shape = {"dim": model.config.dim, "num_layers": model.config.num_layers}
    return fill_from_seed(AudioAdapter(**shape, **{"audio_dim": 12} | options), CONFIG["seed"] + 40)


def audio_features(seed: int = 11, tokens: int = 17) -> torch.Tensor:
    return torch.randn(1, tokens, 12, generator=torch.Generator().manual_seed(seed))
