"""Stand-In: the identity of one or several people from one photo each, as extra keys and values of self-attention.

The photo's VAE latent goes through the video transformer's own blocks as a still frame at timestep 0, without text,
with LoRA deltas on q, k and v. Its keys and values in every block depend on nothing else, so they are computed once for
a (reference, video grid, expert) and then serve every step and both guidance branches.

Source: arXiv 2508.07901; Stand-In `models/wan_video_dit.py`, `pipelines/wan_video.py` (model_fn_wan_video).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import WeightsError
from models.wan.checkpoint import read_tensors
from models.wan.slots import BlockContext, KeysValues, Slots
from models.wan.transformer import WanTransformer

PREFIXES = ("diffusion_model.", "pipe.dit.", "dit.")
KEY = re.compile(r"blocks\.(\d+)\.self_attn\.([qkv])_loras\.(down|up)\.weight")
REFERENCE_TIME = -1  # the reference's position on the time axis: before the first frame


def load_stand_in(path: str | Path, transformer: WanTransformer, hint: str = "") -> "StandIn":
    """Read a released .ckpt or a converted .safetensors for this transformer.

    Raises:
        WeightsError: the file cannot be read, or its keys are not exactly those of this transformer's blocks.
    """
    return StandIn.from_tensors(read_tensors(path, hint=hint), transformer, source=str(path))


@dataclass(frozen=True)
class Identity:
    """Keys and values of the reference tokens, for one transformer and one video grid.

    keys_values: one (K, V) a block, each (1, people·M, n, d); K is normed and rotated.
    grid: (rows, columns) of the video in tokens; K's positions lie right outside that grid.
    steps: first and last step (share of the run, 0 to 1) at which the identity takes part.
    """

    keys_values: tuple[KeysValues, ...]
    grid: tuple[int, int]
    steps: tuple[float, float] = (0.0, 1.0)

    def __call__(self, tokens: Tensor, ctx: BlockContext) -> Slots:
        """The plug-in: what the reference adds to one forward pass of the video."""
        if ctx.grid[1:] != self.grid:
            raise ValueError(f"the identity was encoded for a grid of {self.grid} tokens, the video has {ctx.grid[1:]}")
        return Slots(self_keys_values=self.keys_values)

    def active(self, step: int, num_steps: int) -> bool:
        first, last = self.steps
        return first <= step / max(1, num_steps - 1) <= last

    def shard(self, rank: int, processes: int) -> "Identity":
        """This process's part of the keys and values, for a sequence split over processes."""
        tokens = self.keys_values[0][0].shape[1]
        if tokens % processes:
            raise ValueError(f"{tokens} reference tokens do not divide over {processes} processes")
        part = tokens // processes
        mine = slice(rank * part, (rank + 1) * part)
        return replace(self, keys_values=tuple((k[:, mine], v[:, mine]) for k, v in self.keys_values))


class StandIn:
    """The q, k and v LoRAs of every block, in float32.

    They stay where they were loaded (600 MiB for 14B) and follow their block to its device when it runs: they are
    needed once a video, not once a step.
    """

    def __init__(self, down: list[dict[str, Tensor]], up: list[dict[str, Tensor]], strength: float = 1.0):
        self.down, self.up, self.strength = down, up, strength

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], transformer: WanTransformer, source: str = "Stand-In weights"
    ) -> "StandIn":
        """Check the keys against the transformer's blocks; the rank is the file's own."""
        dim, layers = transformer.config.dim, transformer.config.num_layers
        found: dict[tuple[int, str, str], Tensor] = {}
        unexpected = []
        for key, tensor in tensors.items():
            prefix = next((p for p in PREFIXES if key.startswith(p)), "")
            match = KEY.fullmatch(key.removeprefix(prefix))
            if match is None:
                unexpected.append(key)
            else:
                found[int(match[1]), match[2], match[3]] = tensor.float()
        wanted = {(i, p, d) for i in range(layers) for p in "qkv" for d in ("down", "up")}
        missing, extra = sorted(wanted - set(found)), sorted(set(found) - wanted)
        if not found:
            raise WeightsError(
                f"{source} holds no Stand-In weights (keys blocks.N.self_attn.q_loras.down.weight …); "
                f"its first keys are {', '.join(list(tensors)[:3]) or 'none'}"
            )
        width = found[min(found)].shape[-1] if min(found)[2] == "down" else found[min(found)].shape[0]
        if missing or extra or unexpected or width != dim:
            blocks = len({i for i, _, _ in found})
            raise WeightsError(
                f"{source} does not fit this transformer: it has {blocks} blocks of width {width}, the transformer "
                f"{layers} of width {dim}; {len(missing)} keys missing, {len(extra) + len(unexpected)} unexpected"
                + (f", first {unexpected[0]}" if unexpected else "")
                + ". Released Stand-In weights are for the 14B models only."
            )
        rank = found[0, "q", "down"].shape[0]
        for (i, projection, direction), tensor in found.items():
            expected = (rank, dim) if direction == "down" else (dim, rank)
            if tuple(tensor.shape) != expected:
                name = f"blocks.{i}.self_attn.{projection}_loras.{direction}.weight"
                raise WeightsError(f"{source}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
        down, up = ([{p: found[i, p, direction] for p in "qkv"} for i in range(layers)] for direction in ("down", "up"))
        return cls(down, up)

    @property
    def rank(self) -> int:
        return self.down[0]["q"].shape[0]

    def scaled(self, strength: float) -> "StandIn":
        """The same weights with their deltas multiplied: 1 is as trained, 0 the plain reference tokens."""
        return StandIn(self.down, self.up, strength)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under the released names."""
        return {
            f"blocks.{i}.self_attn.{p}_loras.{name}.weight": side[i][p]
            for i in range(len(self.down))
            for p in "qkv"
            for name, side in (("down", self.down), ("up", self.up))
        }

    def _delta(self, index: int):
        down, up, strength = self.down[index], self.up[index], self.strength

        def delta(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            full = x.float()  # the reference computes its LoRA in float32, whatever the base computes in
            return tuple(
                (F.linear(F.linear(full, down[p].to(x.device)), up[p].to(x.device)) * strength).to(x.dtype)
                for p in "qkv"
            )

        return delta

    def encode(
        self,
        transformer: WanTransformer,
        references: Sequence[Tensor],
        grid: tuple[int, int],
        steps: tuple[float, float] = (0.0, 1.0),
    ) -> Identity:
        """Compute every block's keys and values of the reference photos.

        Each photo attends to itself alone. Photo k sits at rows H + k·h and columns W + k·h of the token plane, outside
        the video's H x W, h being the photo's rows (upstream's dev/multi adds rows on both axes).

        Args:
            transformer: the expert that will denoise the video.
            references: latents (1, C, 1, h, w) of the photos, normalised, all of one size.
            grid: rows and columns of the video, in tokens.
            steps: see `Identity`.
        """
        sizes = {tuple(reference.shape) for reference in references}
        if len(sizes) != 1:
            raise ValueError(f"reference latents differ in size: {sorted(sizes)}")
        rows = references[0].shape[-2] // transformer.config.patch_size[1]
        collected: list[list[KeysValues]] = [[] for _ in transformer.blocks]
        slots = Slots(
            self_qkv_deltas=[self._delta(i) for i in range(len(self.down))],
            on_self_keys_values=lambda index, key, value: collected[index].append((key, value)),
        )
        with torch.compiler.set_stance("force_eager"):  # one pass a video: not worth a compilation
            for number, reference in enumerate(references):
                shift = number * rows
                transformer(
                    reference,
                    torch.zeros(1),
                    prompt=None,
                    plugins=[lambda tokens, ctx: slots],
                    position_offset=(REFERENCE_TIME, grid[0] + shift, grid[1] + shift),
                    tokens_only=True,
                    whole_sequence=True,  # it is short
                )
        keys_values = tuple(
            (torch.cat([k for k, _ in people], dim=1), torch.cat([v for _, v in people], dim=1)) for people in collected
        )
        return Identity(keys_values, grid, steps)
