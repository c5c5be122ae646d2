"""VACE: control videos, masks and reference images for a Wan text-to-video model, as hints added to its blocks.

A second, smaller stack of Wan blocks reads the 96-channel control context together with the video's patch tokens, as
they are before the first block. Each of its blocks gives one hint, which is added at the end of one block of the base
transformer, inside it, so that a step cache that skips the block skips the hint with it.

The hints depend on nothing that the base blocks compute, but they are computed one by one, each right before it is
added: one hint is alive at a time (all of them together are 6 GB for 14B at 720p).

Source: arXiv 2503.07598; Wan2.1 `wan/modules/vace_model.py` (VaceWanModel).
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, original_names, read_tensors, split_scales, transformer_from_tensors
from models.wan.config import WanConfig
from models.wan.float8 import use_float8
from models.wan.slots import BlockContext, BlockSlots, Plugin, PromptBlock, Slots
from models.wan.transformer import WanBlock, WanTransformer, cast_linears

logger = logging.getLogger("selfsame")

CONTEXT_CHANNELS = 96  # the released models take 16 kept + 16 to be made + 64 of the mask


class VaceBlock(WanBlock):
    """A Wan block on the control tokens, and the projection that makes its hint. The first block takes in the video."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, is_first: bool):
        super().__init__(dim, ffn_dim, num_heads, eps, has_image=False)
        if is_first:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)

    def forward(
        self, control: Tensor, ctx: BlockContext, prompt: PromptBlock | None, video: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """control (B, L, D) float32, video (B, L, D) for the first block -> control and hint, both (B, L, D)."""
        if video is not None:
            control = video + self.before_proj(control.to(ctx.dtype))
        # The video alone: no identity and no other plug-in is seen here.
        control = super().forward(control, ctx, BlockSlots(prompt=prompt))
        return control, self.after_proj(control.to(ctx.dtype))


class VaceBranch(ModelMixin, ConfigMixin, AttentionMixin):
    """The VACE half of a checkpoint. It holds no state of a request: `plugin` makes what a request needs.

    Args:
        dim, ffn_dim, num_heads, eps, patch_size: of the base transformer.
        num_layers: of the base transformer.
        vace_layers: the base blocks that get the hints, in order.
        vace_in_dim: channels of the control context.
    """

    _repeated_blocks = ["VaceBlock"]
    _keep_in_fp32_modules = ["modulation", "norm"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        vace_layers: Sequence[int],
        vace_in_dim: int = CONTEXT_CHANNELS,
        eps: float = 1e-6,
        patch_size: tuple[int, int, int] = (1, 2, 2),
    ):
        super().__init__()
        self.vace_patch_embedding = nn.Conv3d(vace_in_dim, dim, patch_size, stride=patch_size)
        self.vace_blocks = nn.ModuleList(
            VaceBlock(dim, ffn_dim, num_heads, eps, is_first=j == 0) for j in range(len(vace_layers))
        )

    def set_compute_dtype(self, dtype: torch.dtype) -> "VaceBranch":
        """Cast the linears; modulation and norms stay float32."""
        return cast_linears(self, dtype)

    def forward(self, vace_context: Sequence[Tensor], tokens: Tensor, ctx: BlockContext) -> Tensor:
        """The control tokens (B, L, D) float32 of contexts (C, F, H, W), padded or split as the video's tokens are."""
        embedded = [
            self.vace_patch_embedding(sample[None].to(tokens.device, ctx.dtype)).float() for sample in vace_context
        ]
        if (grid := tuple(embedded[0].shape[2:])) != ctx.grid:
            raise ValueError(f"the control context has a grid of {grid} tokens, the video one of {ctx.grid}")
        control = [sample.flatten(2).transpose(1, 2) for sample in embedded]  # (1, F·H·W, D) each
        if ctx.sharded:
            control = torch.cat(control)
            mesh = self._parallel_config.context_parallel_config._flattened_mesh
            return EquipartitionSharder.shard(control, 1, mesh).expand(tokens.shape[0], -1, -1)
        control = torch.cat([F.pad(sample, (0, 0, 0, tokens.shape[1] - sample.shape[1])) for sample in control])
        return control.expand(tokens.shape[0], -1, -1)

    def plugin(self, vace_context: Tensor | Sequence[Tensor], scale: float = 1.0) -> Plugin:
        """The plug-in of one request.

        Args:
            vace_context: (1 or B, 96, F, H, W), or a list of (96, F, H, W) for a ragged batch
                (`pipelines.vace.context`); it has the video's frames and size, references included.
            scale: multiplies every hint. At 0 nothing is computed: the base model, bit for bit.
        """
        contexts = list(vace_context)
        layers, num_layers = list(self.config.vace_layers), self.config.num_layers

        def plugin(tokens: Tensor, ctx: BlockContext) -> Slots:
            if scale == 0:
                return Slots()
            state = {"next": 0, "video": tokens}

            @torch.compiler.disable
            def add_hint(j: int, x: Tensor) -> Tensor:
                assert state["next"] == j, "a base block ran twice, or out of order"
                state["next"] = j + 1
                block = self.vace_blocks[j]
                prompt = None if ctx.prompt is None else ctx.prompt.block(block)
                if j == 0:
                    video = state.pop("video")
                    control = self(contexts, video, ctx)
                    control, hint = block(control, ctx, prompt, video)
                else:
                    control, hint = block(state["control"], ctx, prompt)
                if j + 1 < len(layers):
                    state["control"] = control
                else:
                    state.pop("control", None)
                return hint.to(x.dtype) * scale

            residuals: list = [None] * num_layers
            for j, layer in enumerate(layers):
                residuals[layer] = lambda x, j=j: add_hint(j, x)
            return Slots(block_residuals=residuals)

        return plugin


# ------------------------------------------------------------------------------------------------------- loading


def load_vace(
    path: str | Path,
    *,
    base_path: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
    expect: WanConfig | None = None,
    vace_layers: Sequence[int] | None = None,
    fp8: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    hint: str = "",
) -> tuple[WanTransformer, VaceBranch]:
    """Read a VACE checkpoint: released ones hold the base transformer and the branch in one set of files.

    Args:
        path: a file or folder in any layout that `read_tensors` knows.
        base_path: of the base transformer, where `path` holds the branch alone (DiffSynth-Studio's files).
        vace_layers: where no config.json beside the weights states them; None: spread evenly.
        dtype, device, num_heads, expect, fp8, changes, hint: as for `load_transformer`.

    Raises:
        WeightsError: unreadable, no VACE keys in it, keys missing or too many, or no base.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():  # a Diffusers repository
        path = path / "transformer"
    stored = original_names(read_tensors(path, hint=hint))
    base, branch = split_vace(stored)
    if not branch:
        raise WeightsError(f"--vace_path {path}: no VACE weights in it (keys vace_blocks.0.…); {hint or 'give others'}")
    if not base and base_path is None:
        raise WeightsError(f"--vace_path {path}: holds the VACE branch alone; give its text-to-video base: --base_path")
    folder = path if path.is_dir() else path.parent
    if base and base_path is not None:
        logger.info("the base transformer is the one in %s, not that of --base_path", path)
    if not base:
        path = Path(base_path)
        base = read_tensors(path / "transformer" if (path / "model_index.json").is_file() else path, hint=hint)
    transformer = transformer_from_tensors(
        base, path, dtype=dtype, device=device, num_heads=num_heads, expect=expect, fp8=fp8, changes=changes
    )
    layers = stated_layers(folder) or vace_layers
    return transformer.requires_grad_(False), branch_from_tensors(
        branch, transformer, layers, dtype=dtype, device=device, fp8=fp8, source=folder
    )


def load_vace_branch(
    path: str | Path,
    transformer: WanTransformer,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    vace_layers: Sequence[int] | None = None,
    fp8: bool = False,
    hint: str = "",
) -> VaceBranch:
    """The branch of a VACE checkpoint for a transformer that was read already; what else the files hold is passed over.

    Args and errors as of `load_vace`.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    _, branch = split_vace(original_names(read_tensors(path, hint=hint)))
    if not branch:
        raise WeightsError(f"--vace_path {path}: no VACE weights in it (keys vace_blocks.0.…); {hint or 'give others'}")
    folder = path if path.is_dir() else path.parent
    layers = stated_layers(folder) or vace_layers
    return branch_from_tensors(branch, transformer, layers, dtype=dtype, device=device, fp8=fp8, source=folder)


def split_vace(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with original names -> the base transformer's part and the VACE branch's."""
    base = {name: tensor for name, tensor in tensors.items() if not name.startswith("vace_")}
    return base, {name: tensor for name, tensor in tensors.items() if name.startswith("vace_")}


def stated_layers(folder: Path) -> list[int] | None:
    """`vace_layers` of a config.json beside the weights; None where there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vace_layers")
    except (OSError, ValueError, AttributeError):
        return None


def default_layers(num_blocks: int, num_layers: int) -> list[int]:
    """The base blocks of the hints by upstream's rule: spread evenly from the first one on.

    1.3B: 15 blocks on 30 layers, every second; 14B: 8 blocks on 40, every fifth.
    """
    step = -(-num_layers // num_blocks)
    layers = list(range(0, num_layers, step))
    if len(layers) != num_blocks:
        raise WeightsError(
            f"{num_blocks} VACE blocks do not spread evenly over {num_layers} layers; "
            "put the model's config.json, with vace_layers, beside the weights"
        )
    return layers


def branch_from_tensors(
    tensors: Mapping[str, Tensor],
    transformer: WanTransformer,
    vace_layers: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    fp8: bool = False,
    source: str | Path = "",
) -> VaceBranch:
    """A branch for this base transformer from tensors with original names (`vace_…`), all or error."""
    config = transformer.config
    tensors, scales = split_scales(tensors)
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("vace_blocks.")}
    if not numbers or "vace_patch_embedding.weight" not in tensors:
        raise WeightsError(f"{source}: an incomplete VACE branch: no vace_blocks.… or no vace_patch_embedding.weight")
    layers = list(vace_layers) if vace_layers else default_layers(max(numbers) + 1, config.num_layers)
    if (
        len(layers) != max(numbers) + 1
        or layers[0] != 0
        or max(layers) >= config.num_layers
        or layers != sorted(layers)
    ):
        raise WeightsError(
            f"{source}: {max(numbers) + 1} VACE blocks on layers {layers} of {config.num_layers}: "
            "accepted is one layer a block, in order, from 0 on"
        )
    with torch.device("meta"):
        branch = VaceBranch(
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            vace_layers=layers,
            vace_in_dim=tensors["vace_patch_embedding.weight"].shape[1],
            eps=config.eps,
            patch_size=tuple(config.patch_size),
        )
    if fp8:
        use_float8(branch)
    assign_tensors(
        branch,
        tensors,
        dtype=dtype,
        device=device,
        keep_float32=VaceBranch._keep_in_fp32_modules,
        source=source,
        scales=scales,
    )
    return branch.requires_grad_(False).eval()
