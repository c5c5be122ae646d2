"""MultiTalk's audio layers: a clip's speech, heard by a Wan image-to-video model frame by frame (SVI-Talk).

A projection turns the wav2vec2 states around each latent frame into 32 audio tokens. In every block, between
cross-attention and feed-forward, the video tokens of a latent frame attend to that frame's audio tokens and to nothing
else:

    x = x + audio_cross_attn(norm_x(x), audio tokens of x's latent frame)

Source: arXiv 2505.22647 and MeiGen-AI/MultiTalk `wan/modules/multitalk_model.py` (the path of one speaker);
Stable-Video-Infinity `diffsynth/pipelines/svi_video_talk.py` (get_audio_embedding, preprocess_audio).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from errors import WeightsError
from models.audio_adapter import OwnTokens
from models.wan.attention import AttentionKernel
from models.wan.checkpoint import assign_tensors, read_tensors, split_scales
from models.wan.float8 import use_float8
from models.wan.slots import BlockContext, Slots
from models.wan.transformer import WanTransformer, cast_linears

WINDOW = 5  # audio frames around each video frame: two before, two after
TEMPORAL_FACTOR = 4  # video frames of every latent frame but the first


# -------------------------------------------------------------------------------------------------- audio windows


def audio_window(audio: Tensor, start: int, num_frames: int, window: int = WINDOW) -> Tensor:
    """The audio around every video frame of a clip; before the first and after the last audio frame those repeat.

    Args:
        audio: (F, S, C), one entry a video frame: the encoder's S hidden states.
        start: the clip's first video frame.

    Returns:
        (1, num_frames, window, S, C).
    """
    frames = torch.arange(start, start + num_frames)[:, None] + torch.arange(window) - window // 2
    return audio[frames.clamp(0, audio.shape[0] - 1)][None]


def latent_windows(windows: Tensor, temporal_factor: int = TEMPORAL_FACTOR) -> tuple[Tensor, Tensor]:
    """Windows of video frames (1, T, w, S, C) -> of latent frames: of the first, and of those after it.

    Of the frames that share a latent frame the first gives its past and centre, the last its centre and future, those
    between their centre: 3 + 2 + 3 entries for windows of 5 and 4 frames.

    Returns:
        first (1, 1, w, S, C), latter (1, (T - 1)/factor, 2·(w//2 + 1) + factor - 2, S, C).
    """
    center = windows.shape[2] // 2
    groups = windows[:, 1:].unflatten(1, (-1, temporal_factor))  # (1, t, factor, w, S, C)
    latter = (groups[:, :, 0, : center + 1], groups[:, :, 1:-1, center], groups[:, :, -1, center:])
    return windows[:, :1], torch.cat(latter, dim=2)


# --------------------------------------------------------------------------------------------------------- layers


class AudioProjection(nn.Module):
    """Windows of wav2vec2 states -> audio tokens of every latent frame."""

    def __init__(self, first_width: int, latter_width: int, hidden_dim: int, num_tokens: int, token_dim: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj1 = nn.Linear(first_width, hidden_dim)
        self.proj1_vf = nn.Linear(latter_width, hidden_dim)
        self.proj2 = nn.Linear(hidden_dim, hidden_dim)
        self.proj3 = nn.Linear(hidden_dim, num_tokens * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, first: Tensor, latter: Tensor) -> Tensor:
        """first (B, 1, 5, S, C), latter (B, t - 1, 8, S, C) -> (B, t, 32, 768) float32."""
        dtype = self.proj1.weight.dtype
        x = torch.cat((self.proj1(first.flatten(2).to(dtype)), self.proj1_vf(latter.flatten(2).to(dtype))), dim=1)
        x = self.proj3(F.relu(self.proj2(F.relu(x))))  # (B, t, 32·768)
        return self.norm(x.unflatten(-1, (self.num_tokens, -1)).float())


class AudioCrossAttention(nn.Module, AttentionModuleMixin):
    """Attention of the video tokens of each latent frame to its audio tokens. No norm of queries and keys."""

    _default_processor_cls = AttentionKernel
    _available_processors = [AttentionKernel]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, num_heads: int, token_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(token_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.set_processor(AttentionKernel())

    def forward(self, x: Tensor, audio: Tensor, own: OwnTokens) -> Tensor:
        """x (B, L, D) and the audio tokens (B, F, 32, 768) of its latent frames -> (B, L, D)."""
        query = own.group(self.q_linear(x).unflatten(-1, (self.num_heads, -1)))  # (B·F, H·W, n, d)
        key, value = self.kv_linear(audio.flatten(0, 1)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(own.ungroup(self.processor(query, key, value), len(x)))


class MultiTalkBlock(nn.Module):
    """What one block of the transformer hears."""

    def __init__(self, dim: int, num_heads: int, token_dim: int, eps: float):
        super().__init__()
        self.norm_x = nn.LayerNorm(dim, eps)
        self.audio_cross_attn = AudioCrossAttention(dim, num_heads, token_dim)

    def forward(self, x: Tensor, audio: Tensor, own: OwnTokens, dtype: torch.dtype) -> Tensor:
        """The residual (B, L, D) of x (B, L, D) float32, in the compute dtype; arguments as above."""
        return self.audio_cross_attn(self.norm_x(x).to(dtype), audio.to(dtype), own)


class MultiTalk(ModelMixin, ConfigMixin, AttentionMixin):
    """The audio half of an SVI-Talk model. It holds no state of a request: `speech` makes what a clip needs.

    Args:
        dim, num_heads, num_layers, eps: of the transformer it is heard by.
        audio_dim: values of one audio frame, S·C: 12 hidden states of 768.
        latter_entries: audio frames of a latent frame after the first.
        hidden_dim, num_tokens, token_dim: of the projection.
    """

    _repeated_blocks = ["MultiTalkBlock"]
    _keep_in_fp32_modules = ["norm"]
    _skip_layerwise_casting_patterns = ["audio_proj", "norm"]

    @register_to_config
    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        audio_dim: int = 12 * 768,
        latter_entries: int = 8,
        hidden_dim: int = 512,
        num_tokens: int = 32,
        token_dim: int = 768,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.audio_proj = AudioProjection(
            WINDOW * audio_dim, latter_entries * audio_dim, hidden_dim, num_tokens, token_dim
        )
        self.blocks = nn.ModuleList(MultiTalkBlock(dim, num_heads, token_dim, eps) for _ in range(num_layers))

    def set_compute_dtype(self, dtype: torch.dtype) -> "MultiTalk":
        """Cast the linears; norms stay float32."""
        return cast_linears(self, dtype)

    def forward(self, first: Tensor, latter: Tensor) -> Tensor:
        """The audio tokens (B, t, 32, 768) of windows of latent frames (`latent_windows`)."""
        return self.audio_proj(first, latter)

    def speech(self, audio: Tensor, start: int, num_frames: int) -> "Speech":
        """The plug-in of one clip.

        Args:
            audio: (F, S, C), the whole soundtrack's hidden states, one entry a video frame.
            start: the clip's first video frame; may be past the audio's end, where the last entry repeats.
            num_frames: of the clip, 4n + 1.
        """
        if audio[0].numel() != self.config.audio_dim:
            raise ValueError(
                f"audio states of shape {tuple(audio.shape)}; expected {self.config.audio_dim} values each"
            )
        return Speech(self, *latent_windows(audio_window(audio, start, num_frames)))


@dataclass
class Speech:
    """What one clip hears: windows of latent frames, and the audio tokens made of them at the first use.

    first: (B, 1, 5, S, C); latter: (B, t - 1, 8, S, C).
    """

    layers: MultiTalk
    first: Tensor
    latter: Tensor
    _tokens: Tensor | None = None

    def silent(self) -> "Speech":
        """The same clip with audio states of zero: what the branch without audio hears (not the same as no layers)."""
        return Speech(self.layers, torch.zeros_like(self.first), torch.zeros_like(self.latter))

    def tokens(self, device: torch.device) -> Tensor:
        """(B, t, 32, 768) float32; they are the same at every step."""
        if self._tokens is None:
            self._tokens = self.layers(self.first.to(device), self.latter.to(device))
        return self._tokens

    def __call__(self, tokens: Tensor, ctx: BlockContext) -> Slots:
        frames, per_frame = ctx.grid[0], ctx.grid[1] * ctx.grid[2]
        length, rank, processes = tokens.shape[1], 0, 1
        if ctx.sharded:
            mesh = self.layers._parallel_config.context_parallel_config._flattened_mesh
            rank, processes = mesh.get_local_rank(), mesh.size()
        if length * processes != frames * per_frame:
            raise ValueError("audio layers need samples of one size, without padding")
        audio = self.tokens(tokens.device)
        if audio.shape[1] != frames:
            raise ValueError(f"the audio is of {audio.shape[1]} latent frames, the video has {frames}")
        own = OwnTokens(rank * length, length, per_frame)
        audio = audio[:, own.frames].expand(tokens.shape[0], -1, -1, -1)

        @torch.compiler.disable
        def hear(index: int, x: Tensor) -> Tensor:
            return self.layers.blocks[index](x, audio, own, ctx.dtype).to(x.dtype)

        return Slots(middle_residuals=[lambda x, i=i: hear(i, x) for i in range(len(self.layers.blocks))])


# -------------------------------------------------------------------------------------------------------- loading


def load_multitalk(
    path: str | Path,
    transformer: WanTransformer,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    fp8: bool = False,
    hint: str = "",
) -> MultiTalk:
    """Read the released multitalk.safetensors for this transformer; `dtype`, `device`, `fp8` as for `load_transformer`.

    Raises:
        WeightsError: unreadable, no audio layers in it, or keys or shapes that do not fit the transformer.
    """
    tensors = read_tensors(path, hint=hint)
    return multitalk_from_tensors(tensors, transformer, dtype=dtype, device=device, fp8=fp8, source=path)


def multitalk_from_tensors(
    tensors: Mapping[str, Tensor],
    transformer: WanTransformer,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    fp8: bool = False,
    source: str | Path = "",
) -> MultiTalk:
    """Audio layers for this transformer from tensors under the released names, all or error."""
    tensors, scales = split_scales(tensors)
    config = transformer.config
    try:
        hidden_dim, first_width = tensors["audio_proj.proj1.weight"].shape
        latter_width = tensors["audio_proj.proj1_vf.weight"].shape[1]
        (token_dim,) = tensors["audio_proj.norm.weight"].shape
        num_tokens = tensors["audio_proj.proj3.weight"].shape[0] // token_dim
    except KeyError as error:
        raise WeightsError(
            f"{source}: no MultiTalk audio layers in it (no {error.args[0]}); "
            f"its first keys are {', '.join(list(tensors)[:3]) or 'none'}; give the released multitalk.safetensors"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{source}: audio_proj has weights of another number of axes ({error})") from error
    audio_dim, rest = divmod(first_width, WINDOW)
    if rest or latter_width % audio_dim:
        raise WeightsError(
            f"{source}: audio_proj takes {first_width} and {latter_width} values; "
            f"accepted are windows of {WINDOW} audio frames and of a whole number of them"
        )
    with torch.device("meta"):
        layers = MultiTalk(
            dim=config.dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            audio_dim=audio_dim,
            latter_entries=latter_width // audio_dim,
            hidden_dim=hidden_dim,
            num_tokens=num_tokens,
            token_dim=token_dim,
            eps=config.eps,
        )
    if fp8:
        use_float8(layers)
    try:
        assign_tensors(
            layers,
            tensors,
            dtype=dtype,
            device=device,
            keep_float32=MultiTalk._keep_in_fp32_modules,
            source=source,
            scales=scales,
        )
    except WeightsError as error:
        raise WeightsError(
            f"{error}; the released multitalk.safetensors is for Wan2.1-I2V-14B (40 blocks of width 5120), "
            f"this transformer has {config.num_layers} of width {config.dim}"
        ) from error
    return layers.requires_grad_(False).eval()
