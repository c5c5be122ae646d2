"""The LoRAs of a run: which change which expert's weights, and whether merged or computed beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from errors import UsageError
from models.lora import Lora, attach_loras, lora_changes, merge_loras, read_lora
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from pipelines.lora_settings import Loras
from pipelines.parts import meta_transformer

Scaled = tuple[Lora, float]  # a LoRA and its scale


@dataclass(frozen=True)
class ModelLoras:
    """What changes a model's weights.

    of_experts: expert -> its LoRAs.
    live: they are computed beside the weights, not merged in; changes in full are merged all the same.
    steps: the shares of the steps from and up to which live ones work.
    """

    of_experts: Mapping[int, Sequence[Scaled]] = field(default_factory=dict)
    live: bool = False
    steps: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        """
        Raises:
            UsageError: one that cannot be switched off.
        """
        for lora in (lora for loras in self.of_experts.values() for lora, _ in loras):
            if lora.full and self.steps != (0, 1):
                raise UsageError(
                    f"--lora_start, --lora_end: {lora.source} changes {len(lora.full)} weights in full "
                    f"({next(iter(lora.full))}, …), which cannot be switched off; leave them out"
                )

    def work_at(self, step: int, num_steps: int) -> bool:
        """Whether they work at this step of so many; the ends of their range are rounded to whole steps."""
        start, end = (round(share * num_steps) for share in self.steps)
        return start <= step < end

    def are_switched(self, expert: int) -> bool:
        """Whether a transformer has layers of theirs that can be on and off."""
        return self.live and any(lora.pairs for lora, _ in self.of_experts[expert])

    def changes(self, expert: int, fp8: bool, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
        """What is merged as weights are read: into float8 alone, which small changes would not survive later."""
        loras = self.of_experts.get(expert, ()) if fp8 else ()
        if self.live:
            loras = [(replace(lora, pairs={}), scale) for lora, scale in loras]
        return lora_changes(loras, device)

    def apply(self, transformer: WanTransformer, expert: int, fp8: bool, device: torch.device) -> None:
        """Change a transformer's weights, or attach what changes them; what `changes` names is done by then."""
        loras = self.of_experts.get(expert, ())
        if not loras:
            return
        if self.live:
            attach_loras(transformer, [(replace(lora, full={}), scale) for lora, scale in loras] if fp8 else loras)
        elif not fp8:
            merge_loras(transformer, loras, device)

    def num_bytes(self, memory: str, num_layers: int, itemsize: int) -> int:
        """What live ones take on the device under a memory mode, beside the weights."""
        of_experts = [
            sum(pair.down.numel() + pair.up.numel() for lora, _ in loras for pair in lora.pairs.values())
            for loras in self.of_experts.values()
        ]
        largest = max(of_experts, default=0)
        values = {
            "resident": sum(of_experts),
            "model": largest,
            "group": 2 * largest // num_layers,
            "sequential": 0,
        }[memory]
        return values * itemsize


def read_loras(
    settings: Loras, num_experts: int, shape: WanConfig, key_of_part: Callable[[str], str | None]
) -> ModelLoras:
    """The LoRAs of these settings, each checked against a transformer without weights, so that a wrong one is refused
    before the right base is loaded.

    Args:
        shape: of the transformer.
        key_of_part: a file -> what the keys of another part's weights contain, where they lie among the LoRA's.

    Raises:
        WeightsError, InputError: `read_lora`.
        UsageError: a file that cannot be switched off.
    """
    transformer, files = meta_transformer(shape), settings.lora_files(num_experts)
    paths = dict.fromkeys(path for of_expert in files for path, _ in of_expert)
    read = {
        path: read_lora(path, transformer, settings.lora_partial, key_of_part(path), settings.unused_lora_keys)
        for path in paths
    }
    of_experts = {i: [(read[path], scale) for path, scale in of_expert] for i, of_expert in enumerate(files)}
    return ModelLoras(of_experts, settings.live_loras, settings.lora_steps)
