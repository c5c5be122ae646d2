"""EVA02-CLIP-L/14-336's vision tower: a face -> one embedding, and what five depths of the network saw.

With the key names of the released `EVA02_CLIP_L_336_psz14_s6B.pt`, whose text half is left out.

Source: EVA-02 (arXiv 2303.11331), EVA-CLIP `eva_vit_model.py` as ConsisID ships it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, read_tensors

HEAD_DIM = 64
TRAINED_GRID = 16  # patches a side in pretraining, which positions are squeezed into
KEEP_EVERY = 4  # blocks


class EvaVisionTower(nn.Module):
    """Pre-norm transformer with SwiGLU, a second norm inside both layers of a block, and 2-D rotary positions.

    Args:
        width, num_layers, hidden_dim: of the blocks; hidden_dim is the SwiGLU's.
        embed_dim: of the embedding.
        grid: patches a side.
        head_dim, trained_grid: as in the file; it holds no trace of them.
    """

    def __init__(
        self,
        width: int = 1024,
        num_layers: int = 24,
        hidden_dim: int = 2730,
        embed_dim: int = 768,
        patch_size: int = 14,
        grid: int = 24,
        head_dim: int = HEAD_DIM,
        trained_grid: int = TRAINED_GRID,
    ):
        super().__init__()
        self.image_size = grid * patch_size
        self.grid, self.head_dim, self.trained_grid = grid, head_dim, trained_grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, stride=patch_size)})
        self.blocks = nn.ModuleList(Block(width, hidden_dim, head_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, embed_dim)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels (B, 3, S, S), normalised by CLIP's statistics -> the embedding (B, embed_dim), not normalised, and the
        hidden states (B, 1 + grid², width) that go into blocks 4, 8, 12, …
        """
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)  # (B, grid², width)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        rope = rotary_table(self.grid, self.head_dim, self.trained_grid).to(x)
        kept = []
        for index, block in enumerate(self.blocks):
            if index and index % KEEP_EVERY == 0:
                kept.append(x)
            x = block(x, rope)
        return self.head(self.norm(x)[:, 0]), kept


class Block(nn.Module):
    def __init__(self, width: int, hidden_dim: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, head_dim)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, hidden_dim)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Queries and values have a bias, keys have none."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.inner_attn_ln = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        q = F.linear(x, self.q_proj.weight, self.q_bias)
        v = F.linear(x, self.v_proj.weight, self.v_bias)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, self.k_proj(x), v))  # (B, H, N, d)
        x = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        return self.proj(self.inner_attn_ln(x.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, hidden_dim), nn.Linear(width, hidden_dim)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.w3 = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


def rotary_table(grid: int, head_dim: int, trained_grid: int) -> Tensor:
    """Cosine and sine of each patch's angles, (2, grid², head_dim): the first half turns by row, the second by column,
    each angle for two neighbours.
    """
    half = head_dim // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2).float() / half)
    angles = torch.arange(grid).float() / grid * trained_grid
    angles = (angles[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (grid, half)
    rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the patches of x (B, H, 1 + grid², d); the class token in front has no position."""
    patches = x[:, :, 1:]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([x[:, :, :1], patches * rope[0] + turned * rope[1]], dim=2)


def tower_from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    head_dim: int = HEAD_DIM,
    trained_grid: int = TRAINED_GRID,
    dtype: torch.dtype = torch.float32,
    source: str | Path = "state dict",
) -> EvaVisionTower:
    """Build the tower around a state dict of the whole CLIP.

    Raises:
        WeightsError: not EVA02-CLIP's weights; `source` names them.
    """
    # The tables of angles, one at the top and a copy in each block, are computed.
    visual = {key[7:]: tensor for key, tensor in tensors.items() if key.startswith("visual.") and ".freqs_" not in key}
    try:
        width, _, patch_size, _ = visual["patch_embed.proj.weight"].shape
        with torch.device("meta"):
            tower = EvaVisionTower(
                width=width,
                num_layers=1 + max(int(key.split(".")[1]) for key in visual if key.startswith("blocks.")),
                hidden_dim=visual["blocks.0.mlp.w1.weight"].shape[0],
                embed_dim=visual["head.weight"].shape[0],
                patch_size=patch_size,
                grid=round((visual["pos_embed"].shape[1] - 1) ** 0.5),
                head_dim=head_dim,
                trained_grid=trained_grid,
            )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{source}: not the weights of EVA02-CLIP's vision tower (no {error})") from error
    assign_tensors(tower, visual, dtype=dtype, source=source)
    return tower.eval().requires_grad_(False)


def load_eva_tower(path: str | Path, *, hint: str = "") -> EvaVisionTower:
    """Read `EVA02_CLIP_L_336_psz14_s6B.pt`, in float32.

    Raises:
        WeightsError: missing, unreadable, or another network.
    """
    return tower_from_tensors(read_tensors(path, hint=hint), source=path)
