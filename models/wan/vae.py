"""The Wan video VAE as a stream: frames to latents and back, in memory that does not grow with the video.

The network is causal in time: behind every temporal convolution, all it needs of the past is two frames. Those frames
are the whole state, so a video may be cut into chunks of any length (after the first frame, which stands alone) and
the result is that of the whole clip. The state is a value the caller's generator owns; nothing stays on the module.

The layers are diffusers' (`vae_layers.py` runs them); this file drives them, on the whole frame or in tiles, and loads
both released layouts: the original files (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`) and Diffusers folders.

Source: Wan2.1 `wan/modules/vae.py`, Wan2.2 `wan/modules/vae2_2.py`; tiling after DiffSynth-Studio `wan_video_vae.py`.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import nn

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, convert_names, part_of_release, read_tensors
from models.wan.vae_layers import StreamState, replace_wasteful_layers, run_decoder, run_encoder

logger = logging.getLogger("selfsame")

# Per-channel statistics of the latents, by number of latent channels: the Wan2.1 VAE (16) and the Wan2.2 VAE (48).
# fmt: off
LATENTS_MEAN = {
    16: (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    48: (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
         -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
}
LATENTS_STD = {
    16: (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    48: (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
}
# fmt: on

PLACE = ("vae", "*_VAE.*")  # its name in a Diffusers repository, and in an original one
_DECODER_RESNET = r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight$"


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@dataclass(frozen=True)
class Tiling:
    """Work on overlapping tiles of the frame, over the whole time axis, to bound memory at large sizes.

    Sizes are (height, width) in latent cells (8 pixels with the Wan2.1 VAE, 16 with the Wan2.2 VAE). Overlaps are
    blended with linear ramps. With the default stride every inner cell is computed four times.
    """

    tile: tuple[int, int] = (30, 52)
    stride: tuple[int, int] = (15, 26)

    def __post_init__(self):
        if not all(0 < stride <= tile for tile, stride in zip(self.tile, self.stride, strict=True)):
            raise ValueError(f"tile stride {self.stride} must be at least 1 and at most the tile {self.tile}")

    def windows(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """The tiles of a frame of height × width latent cells; those at the right and bottom may be smaller."""
        rows, columns = (
            [slice(start, min(start + tile, size)) for start in tile_starts(size, tile, stride)]
            for size, tile, stride in zip((height, width), self.tile, self.stride, strict=True)
        )
        return [(row, column) for row in rows for column in columns]


def tile_starts(size: int, tile: int, stride: int) -> range:
    """Starts of the tiles that cover `size`, none of them wholly inside the one before."""
    return range(0, max(size - tile + stride, 1), stride)


def blend_weight(window: slice, size: int, fade: int, scale: int) -> torch.Tensor:
    """One axis of a tile's blending weight: 1, with a linear ramp over `fade` cells at sides inside the frame.

    `scale` output pixels go to a cell.
    """
    weight = torch.ones((window.stop - window.start) * scale)
    ramp = (torch.arange(fade * scale) + 0.5) / max(fade * scale, 1)
    if fade and window.start > 0:
        weight[: fade * scale] *= ramp
    if fade and window.stop < size:
        weight[-fade * scale :] *= ramp.flip(0)
    return weight


def blend_weights(
    windows: list[tuple[slice, slice]], size: tuple[int, int], tiling: Tiling, scale: int
) -> list[torch.Tensor]:
    """What each tile contributes to each of its output pixels, (h, w) a tile; over all tiles they add up to 1."""
    fade = [tile - stride for tile, stride in zip(tiling.tile, tiling.stride, strict=True)]
    weights = [
        torch.outer(*(blend_weight(side, size[axis], fade[axis], scale) for axis, side in enumerate(window)))
        for window in windows
    ]
    total = torch.zeros(size[0] * scale, size[1] * scale)
    for (row, column), weight in zip(windows, weights, strict=True):
        total[scaled(row, scale), scaled(column, scale)] += weight
    return [
        weight / total[scaled(row, scale), scaled(column, scale)]
        for (row, column), weight in zip(windows, weights, strict=True)
    ]


def scaled(window: slice, scale: int) -> slice:
    return slice(window.start * scale, window.stop * scale)


# ---------------------------------------------------------------------------------------------------------------------
# The VAE


def regroup(parts: Iterable[torch.Tensor], first: int, size: int) -> Iterator[torch.Tensor]:
    """Cut a stream of (B, C, n, H, W) pieces into one of `first` frames, then of `size`; the last may be shorter."""
    if size < 1:
        raise ValueError(f"chunks of {size} frames: the length must be at least 1")
    pending, missing = [], first
    for part in parts:
        while part.shape[2]:
            taken, part = part[:, :, :missing], part[:, :, missing:]
            pending.append(taken)
            missing -= taken.shape[2]
            if missing == 0:
                yield torch.cat(pending, dim=2)
                pending, missing = [], size
    if pending:
        yield torch.cat(pending, dim=2)


class WanVAE(nn.Module):
    """Frames (B, 3, T, H, W) in [-1, 1] <-> normalised latents (B, z, 1 + (T-1)/4, H/s, W/s).

    Normalised means (mean of the posterior - mean) / std with the per-channel constants of the release; this is what
    the transformer works on. Weights may be bfloat16 or float16; the normalisation and everything that goes in or
    comes out is float32. Inputs may be on any device: each chunk is moved when its turn comes.
    """

    past_device: torch.device | None = None  # where past frames wait, unless a call says so; None: on the device

    def __init__(self, autoencoder: AutoencoderKLWan):
        super().__init__()
        replace_wasteful_layers(autoencoder)
        self.config = autoencoder.config
        self.encoder, self.quant_conv = autoencoder.encoder, autoencoder.quant_conv
        self.post_quant_conv, self.decoder = autoencoder.post_quant_conv, autoencoder.decoder
        # Not buffers: `.to(torch.bfloat16)` must leave them float32.
        self._mean, self._std = (
            torch.tensor(values, device="cpu").view(1, -1, 1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )

    @property
    def latent_channels(self) -> int:
        return self.config.z_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent cell, on a side: 8 (Wan2.1) or 16 (Wan2.2)."""
        return self.config.scale_factor_spatial

    @property
    def temporal_factor(self) -> int:
        """Frames to a latent frame, after the first."""
        return self.config.scale_factor_temporal

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    @torch.no_grad()
    def encode_chunk(self, frames: torch.Tensor, state: StreamState) -> torch.Tensor:
        """Encode the next frames of a video, and move `state` on.

        Args:
            frames: (B, 3, n, H, W) in [-1, 1]; n is 1 for the first chunk, a multiple of 4 for the others.
            state: a fresh `StreamState()` for the first chunk, the same object for the rest.

        Returns:
            (B, z, 1, H/s, W/s), then (B, z, n/4, H/s, W/s): normalised latents, float32.
        """
        return self._posterior_chunk(frames, state).chunk(2, dim=1)[0]

    @torch.no_grad()
    def _posterior_chunk(self, frames: torch.Tensor, state: StreamState) -> torch.Tensor:
        """As `encode_chunk`: mean and standard deviation of the posterior, both normalised, (B, 2·z, …) float32."""
        count = frames.shape[2]
        if (count % self.temporal_factor != 0) if state.started else (count != 1):
            raise ValueError(f"a chunk of {count} frames: the first must have 1, the others a multiple of 4")
        x = frames.to(self.device, self.dtype)
        if self.config.patch_size is not None:
            x = patchify(x, self.config.patch_size)  # (B, 12, n, H/2, W/2)
        posterior = self.quant_conv(run_encoder(self.encoder, x, state))  # (B, 2·z, n/4, H/s, W/s)
        state.started = True
        mean, log_variance = posterior.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))  # diffusers' bounds
        scale = self._std.to(mean.device)
        return torch.cat(((mean - self._mean.to(mean.device)) / scale, std / scale), dim=1)

    @torch.no_grad()
    def decode_chunk(self, latents: torch.Tensor, state: StreamState) -> torch.Tensor:
        """Decode the next latent frames of a video, and move `state` on.

        Args:
            latents: (B, z, n, h, w), normalised; n is 1 for the first chunk, anything for the others.
            state: a fresh `StreamState()` for the first chunk, the same object for the rest.

        Returns:
            (B, 3, 1, s·h, s·w), then (B, 3, 4·n, s·h, s·w): frames, float32, not clamped.
        """
        if not state.started and latents.shape[2] != 1:
            raise ValueError(f"a first chunk of {latents.shape[2]} latent frames: it must have 1")
        latents = latents.to(self.device, torch.float32)
        latents = latents * self._std.to(latents.device) + self._mean.to(latents.device)
        x = run_decoder(self.decoder, self.post_quant_conv(latents.to(self.dtype)), state)
        state.started = True
        if self.config.patch_size is not None:
            x = unpatchify(x, self.config.patch_size)
        return x.float()

    def encode_stream(
        self,
        frames: torch.Tensor | Iterable[torch.Tensor],
        chunk: int = 1,
        *,
        tiling: Tiling | None = None,
        cache_device: torch.device | str | None = None,
    ) -> Iterator[torch.Tensor]:
        """Encode a video of any length: yields normalised latents (B, z, n, H/s, W/s), first 1, then up to `chunk`.

        Args:
            frames: (B, 3, T, H, W) in [-1, 1], or pieces of it, of any number of frames each. T = 4·n + 1 is what the
                network can use; up to three frames beyond are dropped, and a warning says so.
            chunk: latent frames at a time (4 frames each). The result does not depend on it.
            tiling: work on tiles of the frame.
            cache_device: where past frames wait between chunks ("cpu" saves device memory).

        Raises:
            ValueError: no frames, not (B, 3, T, H, W), or sides that are not a multiple of `spatial_factor`.
        """
        return self._stream(
            self.encode_chunk,
            self._whole_groups(checked(frames, 3, "frames", self.spatial_factor), chunk),
            tiling,
            cache_device,
            scale_in=self.spatial_factor,
            scale_out=1,
        )

    def decode_stream(
        self,
        latents: torch.Tensor | Iterable[torch.Tensor],
        chunk: int = 1,
        *,
        tiling: Tiling | None = None,
        cache_device: torch.device | str | None = None,
    ) -> Iterator[torch.Tensor]:
        """Decode a video of any length: yields frames (B, 3, n, s·h, s·w) in [-1, 1], first 1, then up to 4·`chunk`.

        Args:
            latents: (B, z, F, h, w), normalised, or pieces of it, of any number of latent frames each.
            chunk, tiling, cache_device: as in `encode_stream`.

        Raises:
            ValueError: no latents, or not (B, z, F, h, w).
        """
        chunks = regroup(checked(latents, self.latent_channels, "latents"), 1, chunk)
        stream = self._stream(
            self.decode_chunk, chunks, tiling, cache_device, scale_in=1, scale_out=self.spatial_factor
        )
        return (frames.clamp_(-1, 1) for frames in stream)

    def encode(self, video: torch.Tensor, **options) -> torch.Tensor:
        """A whole clip at once: (B, 3, T, H, W) in [-1, 1] -> (B, z, 1 + (T-1)//4, H/s, W/s). As `encode_stream`."""
        return torch.cat(list(self.encode_stream(video, **options)), dim=2)

    def posterior(
        self,
        video: torch.Tensor,
        chunk: int = 1,
        *,
        tiling: Tiling | None = None,
        cache_device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean, as `encode` gives it, and standard deviation of the latents, (B, z, 1 + (T-1)//4, H/s, W/s) each.
        Training may draw from them; inference takes the mean.
        """
        pieces = self._whole_groups(checked(video, 3, "frames", self.spatial_factor), chunk)
        scales = {"scale_in": self.spatial_factor, "scale_out": 1}
        stream = self._stream(self._posterior_chunk, pieces, tiling, cache_device, **scales)
        return torch.cat(list(stream), dim=2).chunk(2, dim=1)

    def decode(self, latents: torch.Tensor, **options) -> torch.Tensor:
        """A whole clip at once: (B, z, F, h, w) -> (B, 3, 1 + 4·(F-1), s·h, s·w) in [-1, 1]. As `decode_stream`."""
        return torch.cat(list(self.decode_stream(latents, **options)), dim=2)

    def _whole_groups(self, frames: Iterable[torch.Tensor], chunk: int) -> Iterator[torch.Tensor]:
        """The first frame, then multiples of 4 frames; what is left at the end is dropped, with a warning."""
        for number, group in enumerate(regroup(frames, 1, chunk * self.temporal_factor)):
            surplus = group.shape[2] % self.temporal_factor if number else 0
            if surplus:
                logger.warning("VAE encodes 4·n + 1 frames: the last %d frames of the video are left out", surplus)
            if kept := group.shape[2] - surplus:
                yield group[:, :, :kept]

    def _stream(
        self,
        step: Callable[[torch.Tensor, StreamState], torch.Tensor],
        chunks: Iterable[torch.Tensor],
        tiling: Tiling | None,
        cache_device: torch.device | str | None,
        *,
        scale_in: int,
        scale_out: int,
    ) -> Iterator[torch.Tensor]:
        """Run `step` over the chunks, with one state a tile; `scale_*` are pixels per latent cell on either side."""
        windows = None
        for chunk in chunks:
            if windows is None:
                size = chunk.shape[-2] // scale_in, chunk.shape[-1] // scale_in
                windows = tiling.windows(*size) if tiling else [(slice(0, size[0]), slice(0, size[1]))]
                states = [StreamState(cache_device or self.past_device) for _ in windows]
                weights = blend_weights(windows, size, tiling, scale_out) if len(windows) > 1 else []
            if len(windows) == 1:
                yield step(chunk, states[0])
                continue
            blended = None  # (B, C, n, H, W)
            for (row, column), state, weight in zip(windows, states, weights, strict=True):
                tile = step(chunk[..., scaled(row, scale_in), scaled(column, scale_in)], state)
                if blended is None:
                    blended = tile.new_zeros(*tile.shape[:3], size[0] * scale_out, size[1] * scale_out)
                blended[..., scaled(row, scale_out), scaled(column, scale_out)] += tile.mul_(weight.to(tile.device))
            yield blended


def checked(
    parts: torch.Tensor | Iterable[torch.Tensor], channels: int, name: str, multiple: int = 1
) -> Iterator[torch.Tensor]:
    """The pieces of a video as they come, each refused with a ValueError if its shape cannot be used."""
    count = 0
    for part in [parts] if isinstance(parts, torch.Tensor) else parts:
        if part.ndim != 5 or part.shape[1] != channels:
            raise ValueError(f"{name} of shape {tuple(part.shape)}, expected (batch, {channels}, time, height, width)")
        if not part.is_floating_point():
            raise ValueError(f"{name} of type {part.dtype}: expected floating point")
        if part.shape[-2] % multiple or part.shape[-1] % multiple or 0 in part.shape[-2:]:
            raise ValueError(
                f"{name} of {part.shape[-1]} × {part.shape[-2]} (width × height): sides must be multiples of {multiple}"
            )
        count += part.shape[2]
        yield part
    if not count:
        raise ValueError(f"{name}: empty")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def diffusers_key(key: str, upsampler: int = 3) -> str:
    """Diffusers' name of a tensor of an original VAE file. Keys that are already Diffusers' stay as they are.

    Args:
        upsampler: position of the upsampler in a decoder stage, after its residual blocks (the Wan2.1 file numbers
            the layers of all stages through).
    """
    match key.split("."):
        case ["conv1", *rest]:
            parts = ["quant_conv", *rest]
        case ["conv2", *rest]:
            parts = ["post_quant_conv", *rest]
        case [half, "conv1", *rest]:
            parts = [half, "conv_in", *rest]
        case [half, "head", index, *rest]:
            parts = [half, {"0": "norm_out", "2": "conv_out"}[index], *rest]
        case [half, "middle", "1", *rest]:
            parts = [half, "mid_block", "attentions", "0", *rest]
        case [half, "middle", index, *rest]:
            parts = [half, "mid_block", "resnets", str(int(index) // 2), *_layer(rest)]
        case ["encoder", "downsamples", stage, "downsamples", index, *rest]:  # Wan2.2
            kind = ["downsampler"] if _is_resampler(rest) else ["resnets", index]
            parts = ["encoder", "down_blocks", stage, *kind, *_layer(rest)]
        case ["encoder", "downsamples", index, *rest]:
            parts = ["encoder", "down_blocks", index, *_layer(rest)]
        case ["decoder", "upsamples", stage, "upsamples", index, *rest]:  # Wan2.2
            kind = ["upsampler"] if _is_resampler(rest) else ["resnets", index]
            parts = ["decoder", "up_blocks", stage, *kind, *_layer(rest)]
        case ["decoder", "upsamples", index, *rest]:
            stage, index = divmod(int(index), upsampler + 1)
            kind = ["upsamplers", "0"] if _is_resampler(rest) else ["resnets", str(index)]
            parts = ["decoder", "up_blocks", str(stage), *kind, *_layer(rest)]
        case parts:
            pass
    return ".".join(parts)


def _is_resampler(rest: list[str]) -> bool:
    return rest[0] in ("resample", "time_conv")


def _layer(rest: list[str]) -> list[str]:
    match rest:
        case ["residual", index, *tail]:
            return [{"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}[index], *tail]
        case ["shortcut", *tail]:
            return ["conv_shortcut", *tail]
    return rest


def diffusers_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE state dict in any released layout -> Diffusers' names. Tensors are not touched."""
    if all(key.startswith("model.") for key in tensors):  # DiffSynth-Studio
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    resamplers = [int(key.split(".")[2]) for key in tensors if re.match(r"decoder\.upsamples\.\d+\.resample\.", key)]
    upsampler = min(resamplers, default=3)
    return convert_names(tensors, lambda key: diffusers_key(key, upsampler))


def detect_vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Arguments of `AutoencoderKLWan` read off a state dict with Diffusers' names.

    Raises:
        KeyError: a tensor that every Wan VAE has is missing, or there are no statistics for its latent channels.
    """
    indices = {tuple(map(int, m.groups())) for key in shapes if (m := re.match(_DECODER_RESNET, key))}
    stages = 1 + max((stage for stage, _ in indices), default=-1)
    widths = [shapes[f"decoder.up_blocks.{stage}.resnets.0.conv1.weight"][0] for stage in reversed(range(stages))]
    temporal = [
        any(f"decoder.up_blocks.{stage}.{name}.time_conv.weight" in shapes for name in ("upsampler", "upsamplers.0"))
        for stage in reversed(range(stages - 1))
    ]
    z_dim = shapes["post_quant_conv.weight"][0]
    channels = shapes["encoder.conv_in.weight"][1]
    patch_size = math.isqrt(channels // 3)
    return {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "decoder_base_dim": shapes["decoder.conv_out.weight"][1],
        "z_dim": z_dim,
        "dim_mult": [width // widths[0] for width in widths],
        "num_res_blocks": sum(stage == 0 for stage, _ in indices) - 1,
        "temperal_downsample": temporal,
        "is_residual": "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes,
        "in_channels": channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": patch_size if patch_size > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** (stages - 1) * patch_size,
        "latents_mean": list(LATENTS_MEAN[z_dim]),
        "latents_std": list(LATENTS_STD[z_dim]),
    }


def vae_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Mapping | None = None,
    source: str | Path = "state dict",
) -> WanVAE:
    """Build a VAE around a state dict with original, DiffSynth or Diffusers names.

    Args:
        config: `AutoencoderKLWan` arguments; by default they are read off the tensors.

    Raises:
        WeightsError: not the weights of a Wan VAE; `source` names them.
    """
    tensors = diffusers_names(tensors)
    try:
        config = config or detect_vae_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except (KeyError, ZeroDivisionError) as error:
        raise WeightsError(f"{source}: not the weights of a Wan VAE (no {error})") from error
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan.from_config(config)
    assign_tensors(autoencoder, tensors, dtype=dtype, device=device, source=source)
    return WanVAE(autoencoder).eval().requires_grad_(False)


def load_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", hint: str = ""
) -> WanVAE:
    """Read a Wan2.1 or Wan2.2 VAE, told apart by its tensors (or by the config.json of a Diffusers folder).

    Args:
        path: a weights file; a Diffusers repository or its `vae` folder; or an original repository.
        dtype: of the weights and activations. Upstream runs float32; bfloat16 halves time and memory.
        hint: what to do about missing files; ends the message.

    Raises:
        WeightsError: missing, unreadable, several candidates, or not a Wan VAE.
    """
    weights = part_of_release(path, *PLACE)
    config = _autoencoder_config(weights / "config.json")
    return vae_from_tensors(read_tensors(weights, hint=hint), dtype=dtype, device=device, config=config, source=weights)


def _autoencoder_config(file: Path) -> dict | None:
    """The content of a Diffusers VAE's config.json; None if there is none (that of an original DiT is no VAE's)."""
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file}: not valid JSON ({error})") from error
    return config if config.get("_class_name") == "AutoencoderKLWan" else None
