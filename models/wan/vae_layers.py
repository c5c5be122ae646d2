"""The layers of the Wan video VAE, run on one chunk of a video at a time.

Behind every temporal convolution, all that the future needs of the past is two frames. `StreamState` holds them, and
every function here takes it as an argument: the modules themselves stay as they were. The layers and their names are
those of diffusers' `AutoencoderKLWan`. hidden_states are (B, C, n, H, W) throughout.

Source: Wan2.1 `wan/modules/vae.py`, Wan2.2 `wan/modules/vae2_2.py`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanUpBlock,
    WanUpsample,
)
from torch import nn


@dataclass
class StreamState:
    """All that one direction (encode or decode) of one video, or of one tile of it, remembers between chunks."""

    device: torch.device | str | None = None  # where past frames wait between chunks; None: where they were computed
    started: bool = False  # whether the first frame has passed: it takes no part in temporal resampling
    past: dict[nn.Module, torch.Tensor] = field(default_factory=dict)  # convolution -> last frames of its input

    def remember(self, conv: nn.Module, frames: torch.Tensor) -> None:
        """Keep a copy of `frames`: as a view of a chunk, they would keep all of it alive.

        The copy goes where the one before was. What lives long then stays in its place in memory, and the short-lived
        tensors around it leave no holes (new copies each time let the process grow by a fifth).
        """
        past = self.past.get(conv)
        if past is None:
            self.past[conv] = frames.to(self.device or frames.device, copy=True)
        else:
            past.copy_(frames)

    def recall(self, conv: nn.Module, device: torch.device) -> torch.Tensor | None:
        past = self.past.get(conv)
        return None if past is None else past.to(device)


def causal_conv(conv: nn.Conv3d, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    """A convolution that sees three frames: (B, C, n, H, W) -> (B, C', n, H, W). Before the first frame all is zero."""
    past = state.recall(conv, hidden_states.device)
    if past is None:
        batch, channels, _, height, width = hidden_states.shape
        past = hidden_states.new_zeros(batch, channels, 2, height, width)
    hidden_states = torch.cat([past, hidden_states], dim=2)  # (B, C, 2+n, H, W)
    state.remember(conv, hidden_states[:, :, -2:])
    return conv(hidden_states)


def norm_silu(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.silu(norm(hidden_states), inplace=True)


def residual_block(block: WanResidualBlock, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    x = causal_conv(block.conv1, norm_silu(block.norm1, hidden_states), state)
    x = causal_conv(block.conv2, norm_silu(block.norm2, x), state)
    return x.add_(block.conv_shortcut(hidden_states))


def mid_block(block: nn.Module, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    x = residual_block(block.resnets[0], hidden_states, state)
    x = block.attentions[0](x)  # every frame by itself
    return residual_block(block.resnets[1], x, state)


def each_frame(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply a 2-D layer to every frame of (B, C, n, H, W)."""
    batch = hidden_states.shape[0]
    x = layer(hidden_states.transpose(1, 2).flatten(0, 1))  # (B·n, C', H', W')
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def downsample(layer: WanResample, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    """Halve the frame's sides and, in temporal stages, the number of frames (the first frame passes as it is)."""
    x = each_frame(layer.resample, hidden_states)  # (B, C, n, H/2, W/2)
    if layer.mode == "downsample3d":
        past, last_frame = state.recall(layer.time_conv, x.device), x[:, :, -1:]
        if past is not None:
            x = layer.time_conv(torch.cat([past, x], dim=2))  # (B, C, n/2, H/2, W/2)
        state.remember(layer.time_conv, last_frame)
    return x


def upsample(layer: WanResample, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    """Double the frame's sides and, in temporal stages, the number of frames (the first frame passes as it is).

    The temporal convolution never sees the first frame: to the second one the past is still zero. The weights were
    trained with that.
    """
    x = hidden_states
    if layer.mode == "upsample3d" and state.started:
        x = causal_conv(layer.time_conv, x, state)  # (B, 2·C, n, H, W): channel halves are the earlier, the later frame
        x = x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # (B, C, 2·n, H, W)
    return each_frame(layer.resample, x)


def down_block(block: nn.Module, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    if isinstance(block, WanResample):  # Wan2.1: residual blocks and downsampling in one flat list
        return downsample(block, hidden_states, state)
    if not isinstance(block, WanResidualDownBlock):
        return residual_block(block, hidden_states, state)
    x = hidden_states
    for resnet in block.resnets:
        x = residual_block(resnet, x, state)
    if block.downsampler is not None:
        x = downsample(block.downsampler, x, state)
    return x + block.avg_shortcut(hidden_states)


def up_block(block: nn.Module, hidden_states: torch.Tensor, state: StreamState) -> torch.Tensor:
    x = hidden_states
    for resnet in block.resnets:
        x = residual_block(resnet, x, state)
    if isinstance(block, WanUpBlock):  # Wan2.1
        return upsample(block.upsamplers[0], x, state) if block.upsamplers is not None else x
    if block.upsampler is not None:
        x = upsample(block.upsampler, x, state)
    if block.avg_shortcut is not None:
        x = x + block.avg_shortcut(hidden_states, first_chunk=not state.started)
    return x


def run_encoder(encoder: WanEncoder3d, frames: torch.Tensor, state: StreamState) -> torch.Tensor:
    x = causal_conv(encoder.conv_in, frames, state)
    for block in encoder.down_blocks:
        x = down_block(block, x, state)
    x = mid_block(encoder.mid_block, x, state)
    return causal_conv(encoder.conv_out, norm_silu(encoder.norm_out, x), state)


def run_decoder(decoder: WanDecoder3d, latents: torch.Tensor, state: StreamState) -> torch.Tensor:
    x = causal_conv(decoder.conv_in, latents, state)
    x = mid_block(decoder.mid_block, x, state)
    for block in decoder.up_blocks:
        x = up_block(block, x, state)
    return causal_conv(decoder.conv_out, norm_silu(decoder.norm_out, x), state)


def replace_wasteful_layers(module: nn.Module) -> None:
    """Exchange two kinds of diffusers' layers for plain ones with the same parameters and results, in place.

    Their causal convolution pads time and space by copying the chunk once more; here the frames in front come from
    the state, and a plain convolution pads space without a copy. Their upsampling goes through float32, which copies
    of pixels do not need.
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, WanUpsample):
                setattr(parent, name, nn.Upsample(scale_factor=2.0, mode="nearest"))
            elif isinstance(layer, WanCausalConv3d):
                padding = (0, layer.kernel_size[1] // 2, layer.kernel_size[2] // 2)
                conv = nn.Conv3d(
                    layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, device="meta"
                )
                conv.weight, conv.bias = layer.weight, layer.bias
                setattr(parent, name, conv)
