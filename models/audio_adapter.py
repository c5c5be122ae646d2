"""StableAvatar's audio adapter: speech as a fourth term of the cross-attention of a Wan image-to-video transformer.

    adapter = AudioAdapter(...)                          its weights, under the released names
    adapter.plugin(features, num_frames) -> Plugin       what one request adds to a forward pass; no state on modules
    load_audio_avatar(path) -> transformer, adapter      a released file holds both

Each latent frame hears a window of the audio tokens around its time. The vocal projector turns these windows into
latents of the transformer's width: it is modulated by the transformer's own time embedding and attends to the noisy
patch tokens of the same frame ("time-step-aware"). In every block the frame's queries then attend to its latents.

The 14B layout differs in two things: the audio is projected in two stages, and a branch without audio sends zeros
through the projector, where in 1.3B zeros take the place of the projector's output.

Source: arXiv 2508.08248; StableAvatar `wan/models/vocal_projector_fantasy_1B.py` and `_14B.py`,
`wan_fantasy_transformer3d_1B.py` and `_14B.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from errors import WeightsError
from models.wan.attention import WanAttention
from models.wan.checkpoint import assign_tensors, original_names, read_tensors, split_scales, transformer_from_tensors
from models.wan.config import WanConfig
from models.wan.float8 import use_float8
from models.wan.slots import BlockContext, KeysValues, Plugin, Slots
from models.wan.transformer import WanTransformer, cast_linears, modulate

AUDIO_DIM = 768  # wav2vec2-base's last hidden state, which the released adapter takes
WIDENED = 4  # tokens that a frame hears beyond its own time, on either side


# ----------------------------------------------------------------------------------------- which frame hears what


def frame_ranges(num_tokens: int, num_frames: int, exact: bool = False) -> list[tuple[int, int]]:
    """First and last audio token of each latent frame's own time.

    The audio is spread over all frames, whatever its length. Latent frame 0 ends where frame 1 starts; its own centre
    is not used. Positions may lie outside the audio.

    Args:
        num_tokens: of the audio.
        num_frames: pixel frames, 4·latent - 3.
        exact: rational arithmetic. Released weights were trained with that of floats, whose last bit decides where a
            position falls on a whole token.
    """
    rate = Fraction(num_tokens, num_frames) if exact else num_tokens / num_frames  # tokens per frame
    half = int(rate * 4 / 2)
    ranges = []
    for frame in range(1, (num_frames - 1) // 4 + 1):
        center = int((rate * (4 * (frame - 1) + 1) + rate * (4 * frame + 1)) / 2) - 1
        ranges.append((center - half, center + half))
    start = ranges[0][0] if ranges else half  # a still picture hears the start
    return [(start - 2 * half, start), *ranges]


def audio_windows(num_tokens: int, num_frames: int, exact: bool = False, widened: int = WIDENED) -> Tensor:
    """The audio tokens that each latent frame hears, (F, m) int64; -1 where the audio has none.

    All windows have one length. What is missing, at either end of the audio, is missing on the right: a window that is
    cut on the left starts with the first token.
    """
    windows = []
    for first, last in frame_ranges(num_tokens, num_frames, exact):
        heard = list(range(max(first - widened, 0), min(last + widened, num_tokens - 1) + 1))
        windows.append(heard + [-1] * (last - first + 1 + 2 * widened - len(heard)))
    return torch.tensor(windows)


def gather_windows(audio: Tensor, windows: Tensor) -> Tensor:
    """audio (B, L, D), windows (F, m) -> (B, F, m, D), zeros where a window has no token."""
    return F.pad(audio, (0, 0, 0, 1))[:, windows.to(audio.device)]  # index -1 is the added row


@dataclass(frozen=True)
class OwnTokens:
    """The video tokens of this process, by their place in the whole video, and the latent frames they belong to.

    A sequence split over processes is cut anywhere: the first frame and the last may be parts of frames.
    """

    start: int
    length: int
    frame_tokens: int  # H·W

    @property
    def frames(self) -> slice:
        return slice(self.start // self.frame_tokens, -(-(self.start + self.length) // self.frame_tokens))

    @property
    def before(self) -> int:
        """Tokens of the first frame that are another process's."""
        return self.start - self.frames.start * self.frame_tokens

    def group(self, x: Tensor) -> Tensor:
        """(B, L, n, d) -> (B·F, H·W, n, d), zeros in place of other processes' tokens."""
        after = self.frames.stop * self.frame_tokens - (self.start + self.length)
        return F.pad(x, (0, 0, 0, 0, self.before, after)).reshape(-1, self.frame_tokens, *x.shape[2:])

    def ungroup(self, x: Tensor, batch: int) -> Tensor:
        """(B·F, H·W, D) -> (B, L, D)."""
        return x.reshape(batch, -1, x.shape[-1])[:, self.before : self.before + self.length]


# ------------------------------------------------------------------------------------------------ vocal projector


class AudioProjection(nn.Module):
    """Audio features to the transformer's width, in one stage (1.3B) or two (14B)."""

    def __init__(self, audio_dim: int, dim: int, hidden_dim: int | None):
        super().__init__()
        if hidden_dim is None:
            self.proj, self.norm = nn.Linear(audio_dim, dim, bias=False), nn.LayerNorm(dim)
        else:
            self.proj_1, self.norm_1 = nn.Linear(audio_dim, hidden_dim, bias=False), nn.LayerNorm(hidden_dim)
            self.proj_2, self.norm_2 = nn.Linear(hidden_dim, dim, bias=False), nn.LayerNorm(dim)

    def forward(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, audio_dim) -> (B, L, D) float32."""
        if hasattr(self, "proj"):
            return self.norm(self.proj(features.to(dtype)).float())
        hidden = self.norm_1(self.proj_1(features.to(dtype)).float())
        return self.norm_2(self.proj_2(hidden.to(dtype)).float())


class VocalCrossAttention(WanAttention):
    """The audio latents of a frame attend to the patch tokens of that frame."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, F, m, D), tokens (B, F, H·W, D), in the compute dtype -> (B, F, m, D)."""
        q = self.split_heads(self.norm_q(self.q(x)).to(x.dtype))  # (B, F, m, n, d)
        k = self.split_heads(self.norm_k(self.k(tokens)).to(x.dtype))
        v = self.split_heads(self.v(tokens))
        q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in (q, k, v))  # (B·F, n, …, d)
        # Not the chosen backend: 14B's heads are 640 wide, and flash attention ends at 256.
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(x.shape))


class VocalBlock(nn.Module):
    """A Wan block whose self-attention is only modulation: time meets the audio here, and no token another."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float):
        super().__init__()
        self.eps = eps
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = VocalCrossAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, tokens: Tensor, modulation: Tensor) -> Tensor:
        """x (B, F, m, D) float32, tokens (B, F, H·W, D) in the compute dtype, modulation (B, 1, 6, D)."""
        modulation = (self.modulation + modulation)[:, None]  # (B, 1, 1, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(-2)  # (B, 1, 1, D) each
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift1, scale1)
        x = torch.addcmul(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x).to(tokens.dtype), tokens)
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift2, scale2)
        return torch.addcmul(x, self.ffn(y.to(tokens.dtype)).float(), gate2)


class VocalHead(nn.Module):
    """Modulated projection of the audio latents."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.final_proj = nn.Linear(dim, dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """x (B, F, m, D) float32, time (B, 1, D) -> (B, F, m, D) in the compute dtype."""
        shift, scale = ((own + time)[:, None] for own in self.modulation.unbind(1))  # (B, 1, 1, D)
        return self.final_proj(modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale).to(dtype))


class VocalProjector(nn.Module):
    """Audio features, time and noisy patch tokens -> the audio latents of each frame."""

    def __init__(
        self,
        dim: int,
        audio_dim: int,
        audio_hidden_dim: int | None,
        num_blocks: int,
        ffn_dim: int,
        num_heads: int,
        eps: float,
    ):
        super().__init__()
        self.proj_model = AudioProjection(audio_dim, dim, audio_hidden_dim)
        self.blocks = nn.ModuleList(VocalBlock(dim, ffn_dim, num_heads, eps) for _ in range(num_blocks))
        self.final_head = VocalHead(dim, eps)

    def forward(self, features: Tensor, windows: Tensor, tokens: Tensor, time: Tensor, modulation: Tensor) -> Tensor:
        """See `AudioAdapter.forward`."""
        x = gather_windows(self.proj_model(features, tokens.dtype), windows)  # (B, F, m, D) float32
        for block in self.blocks:
            x = block(x, tokens, modulation)
        return self.final_head(x, time, tokens.dtype)


# -------------------------------------------------------------------------------------------------------- adapter


class VocalKeysValues(nn.Module):
    """What a block's cross-attention has beside plain Wan's: keys and values of the audio, without a norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.k_vocal = nn.Linear(dim, dim)
        self.v_vocal = nn.Linear(dim, dim)
        for linear in (self.k_vocal, self.v_vocal):  # training starts from the plain model
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_vocal(audio), self.v_vocal(audio)


class AudioBlock(nn.Module):
    """One block's part of the adapter; the levels are those of the released names."""

    def __init__(self, dim: int):
        super().__init__()
        self.cross_attn = VocalKeysValues(dim)

    def forward(self, audio: Tensor, num_heads: int) -> KeysValues:
        """audio (…, D) -> K and V (…, n, d)."""
        key, value = self.cross_attn(audio)
        return key.unflatten(-1, (num_heads, -1)), value.unflatten(-1, (num_heads, -1))


class AudioAdapter(ModelMixin, ConfigMixin, AttentionMixin):
    """The audio half of a checkpoint. It holds no state of a request: `plugin` makes what a request needs.

    Args:
        dim, num_layers, eps: of the transformer it is for.
        audio_dim: of the audio features.
        audio_hidden_dim: between the two stages of the audio projection (14B); None: one stage (1.3B).
        num_blocks, ffn_dim, num_heads: of the vocal projector's blocks.
    """

    _repeated_blocks = ["VocalBlock"]
    _keep_in_fp32_modules = ["modulation", "norm"]
    _skip_layerwise_casting_patterns = ["norm", "proj_model", "final_head"]

    @register_to_config
    def __init__(
        self,
        dim: int,
        num_layers: int,
        audio_dim: int = AUDIO_DIM,
        audio_hidden_dim: int | None = None,
        num_blocks: int = 2,
        ffn_dim: int | None = None,
        num_heads: int = 8,
        eps: float = 1e-6,
    ):
        super().__init__()
        ffn_dim = ffn_dim or 2 * dim
        self.vocal_projector = VocalProjector(dim, audio_dim, audio_hidden_dim, num_blocks, ffn_dim, num_heads, eps)
        self.blocks = nn.ModuleList(AudioBlock(dim) for _ in range(num_layers))

    @property
    def is_two_stage(self) -> bool:
        """The 14B layout, whose branch without audio is zero features (see the top of this file)."""
        return self.config.audio_hidden_dim is not None

    def set_compute_dtype(self, dtype: torch.dtype) -> "AudioAdapter":
        """Cast the linears; modulation and norms stay float32."""
        return cast_linears(self, dtype)

    def forward(self, features: Tensor, windows: Tensor, tokens: Tensor, time: Tensor, modulation: Tensor) -> Tensor:
        """The audio latents.

        Args:
            features: (B, L, audio_dim).
            windows: (F, m) tokens that each frame hears, from `audio_windows`.
            tokens: (B, F, H·W, D) patch tokens of these frames, before the first block, in the compute dtype.
            time, modulation: (B, 1, D) and (B, 1, 6, D) float32, the transformer's.

        Returns:
            (B, F, m, D) in the compute dtype.
        """
        return self.vocal_projector(features, windows, tokens, time, modulation)

    def plugin(
        self,
        features: Tensor,
        num_frames: int,
        *,
        hears: Sequence[bool] = (True,),
        first_frame: int | None = None,
        clip_level: bool = False,
        exact: bool = False,
    ) -> Plugin:
        """The plug-in of one request (of one window, of one guidance branch).

        Args:
            features: (1 or B, L, audio_dim), the wav2vec2 states of the clip's sound. Rows of zeros are how training
                drops the audio.
            num_frames: pixel frames that the audio is spread over; the video has these unless `first_frame` is given.
            hears: one entry a batch row, or one for all; for rows with False zeros take the place of the projector's
                output, and of the audio term remains its constant `v_vocal.bias`, as released weights expect.
            first_frame: the latent frame of the clip that the video starts with, where it is a part of the clip.
            clip_level: every token hears the whole clip, not its frame's window (a part of training).
            exact: see `frame_ranges`.
        """
        windows = audio_windows(features.shape[1], num_frames, exact)  # (F, m)

        def plugin(tokens: Tensor, ctx: BlockContext) -> Slots:
            if ctx.time.shape[1] != 1:
                raise ValueError("the audio adapter needs one timestep a sample, not one a token")
            batch, length, dim = tokens.shape
            start = 0  # the first of this process's tokens
            if ctx.sharded:
                mesh = self._parallel_config.context_parallel_config._flattened_mesh
                start = length * dist.get_rank(mesh.get_group())
                tokens = EquipartitionSharder.unshard(tokens, 1, mesh)
            own = OwnTokens(start, length, frame_tokens=ctx.grid[1] * ctx.grid[2])
            tokens = tokens.unflatten(1, (-1, own.frame_tokens)).to(ctx.dtype)  # (B, F, H·W, D)
            clip = windows if first_frame is None else windows[first_frame:][: tokens.shape[1]]
            if len(clip) != tokens.shape[1]:
                part = "" if first_frame is None else f" from latent frame {first_frame} on"
                raise ValueError(
                    f"audio spread over {num_frames} frames is for {len(clip)} latent frames{part}, "
                    f"the video has {tokens.shape[1]}"
                )
            if len(hears) not in (1, batch):
                raise ValueError(f"{len(hears)} rows are said to hear or not, the batch has {batch}")

            frames = slice(None) if clip_level else own.frames
            rows = [row for row in range(batch) if hears[row % len(hears)]]
            audio = tokens.new_zeros(batch, len(clip[frames]), clip.shape[1], dim)  # (B, F, m, D)
            if rows:
                given = features.to(tokens.device).expand(batch, -1, -1)[rows]
                audio[rows] = self(given, clip[frames], tokens[rows][:, frames], ctx.time[rows], ctx.modulation[rows])

            @torch.compiler.disable
            def term(block: AudioBlock, q: Tensor, attend: Callable) -> Tensor:
                key, value = block(audio, q.shape[2])  # (B, F, m, n, d)
                if clip_level:
                    return attend(q, key.flatten(1, 2), value.flatten(1, 2))
                return own.ungroup(attend(own.group(q), key.flatten(0, 1), value.flatten(0, 1)), batch)

            return Slots(cross_attention=[functools.partial(term, block) for block in self.blocks])

        return plugin


# -------------------------------------------------------------------------------------------------------- loading


def load_audio_avatar(
    path: str | Path,
    *,
    adapter_path: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
    expect: WanConfig | None = None,
    fp8: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    hint: str = "",
) -> tuple[WanTransformer, AudioAdapter]:
    """Read StableAvatar weights: a released file holds the whole transformer and the adapter.

    Args:
        path: `transformer3d-square.pt`, `transformer3d-rec-vec.pt`, or any layout that `read_tensors` knows.
        adapter_path: a file whose adapter is taken in place of that in `path`, which may then be a plain Wan
            image-to-video transformer (fine-tuning saves the audio weights beside a LoRA).
        dtype, device, num_heads, expect, fp8, changes, hint: as for `load_transformer`.

    Raises:
        WeightsError: unreadable, no adapter in it, keys missing or too many.
    """
    path = Path(path)
    base, vocal = split_adapter(original_names(read_tensors(path, hint=hint)))
    source = path
    if adapter_path is not None:
        source = Path(adapter_path)
        _, vocal = split_adapter(original_names(read_tensors(source, hint=hint)))
    if not vocal:
        raise WeightsError(
            f"{source}: no audio adapter in it (keys vocal_projector.…): plain Wan weights? "
            + (hint or "give StableAvatar's transformer3d-square.pt or transformer3d-rec-vec.pt")
        )
    transformer = transformer_from_tensors(
        base, path, dtype=dtype, device=device, num_heads=num_heads, expect=expect, fp8=fp8, changes=changes
    )
    transformer.rounds_time_embedding = True
    adapter = adapter_from_tensors(vocal, transformer, dtype=dtype, device=device, fp8=fp8, source=source)
    return transformer.requires_grad_(False), adapter


def split_adapter(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with original names -> the transformer's part and the adapter's."""
    vocal = {name: t for name, t in tensors.items() if name.startswith("vocal_projector.") or "_vocal." in name}
    return {name: tensor for name, tensor in tensors.items() if name not in vocal}, vocal


def adapter_from_tensors(
    tensors: Mapping[str, Tensor],
    transformer: WanTransformer,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    fp8: bool = False,
    source: str | Path = "",
) -> AudioAdapter:
    """An adapter for this transformer from tensors with original names, all or error. They tell its layout."""
    tensors, scales = split_scales(tensors)
    projection = "vocal_projector.proj_model"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    is_two_stage = any(name.startswith((f"{projection}.proj_", f"{projection}.norm_")) for name in shapes)
    # Where a name is missing any size serves: the error below names it.
    hidden_dim, audio_dim = shapes.get(f"{projection}.proj_1.weight", (2048, AUDIO_DIM))
    if not is_two_stage:
        hidden_dim, (_, audio_dim) = None, shapes.get(f"{projection}.proj.weight", (None, AUDIO_DIM))
    numbers = [int(name.split(".")[2]) for name in shapes if name.startswith("vocal_projector.blocks.")]
    config = transformer.config
    with torch.device("meta"):
        adapter = AudioAdapter(
            dim=config.dim,
            num_layers=config.num_layers,
            audio_dim=audio_dim,
            audio_hidden_dim=hidden_dim,
            num_blocks=max(numbers, default=0) + 1,
            ffn_dim=shapes.get("vocal_projector.blocks.0.ffn.0.weight", (None,))[0],
            eps=config.eps,
        )
    if fp8:
        use_float8(adapter)
    assign_tensors(
        adapter,
        tensors,
        dtype=dtype,
        device=device,
        keep_float32=AudioAdapter._keep_in_fp32_modules,
        source=source,
        scales=scales,
    )
    return adapter.requires_grad_(False).eval()
