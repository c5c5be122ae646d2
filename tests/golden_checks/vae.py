"""The video VAE: encode, decode whole and as a stream."""

import torch

from models.wan.vae import StreamState, vae_from_tensors
from tests.golden_checks import GoldenCase


def check_encode_decode(case: GoldenCase) -> None:
    """`video*` -> `latent*`, `z*` -> `decoded*` (clamped) and `decoded_unclamped*`, for whatever names the case has."""
    vae = vae_from_tensors(case.weights())
    for name, value in case.inputs.items():
        if name.startswith("video"):
            case.check(name.replace("video", "latent", 1), vae.encode(value[None])[0])
            continue
        suffix = name.removeprefix("z")
        latents = value[None]
        state = StreamState()
        unclamped = torch.cat([vae.decode_chunk(part, state) for part in latents.split(1, dim=2)], dim=2)[0]
        if f"decoded_unclamped{suffix}" in case.outputs:
            case.check(f"decoded_unclamped{suffix}", unclamped)
        case.check(f"decoded{suffix}", unclamped.clamp(-1, 1))
        for chunk in (1, 2, latents.shape[2]):  # as a stream, in chunks of any length
            case.check(f"decoded{suffix}", vae.decode(latents, chunk=chunk)[0])


CHECKS = {"wan_vae_encode_decode": check_encode_decode}
