"""The weights of plug-ins, as values beside a transformer: any of them go together in one list.

    Wan(settings, config, processes, parts=[stand_in_part(settings, config), vace_part(settings, config)])

From that one list files are checked, hashed and named in messages, memory is estimated, and layers are read, placed,
offloaded, cast to float8 and freed with the transformer they run beside. A new plug-in is a file in models/, and a
function that makes a `Part` of its settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from models.wan.config import WanConfig
from models.wan.slots import Plugin
from models.wan.transformer import WanTransformer
from pipelines.weights import WeightsFile


@dataclass(frozen=True)
class Reading:
    """How weights are read: those of a transformer, and of the layers beside it.

    expert: 0, or 1 for Wan2.2's low-noise transformer.
    dtype: the compute dtype.
    device: where they are read to; None: the CPU, mapped from the file where that can be.
    fp8: the linears are kept in float8.
    changes: parameter's name -> what is done to its value as it is read (LoRAs that are merged).
    """

    expert: int
    dtype: torch.dtype
    device: torch.device | None = None
    fp8: bool = False
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, object]:
        """As every loader takes them; `changes` are a transformer's alone."""
        return {"dtype": self.dtype, "device": self.device, "fp8": self.fp8}


@dataclass(frozen=True)
class Part:
    """A plug-in's weights.

    name: by which `Wan.part` gives its layers.
    files: all that it is read from; empty for what a tiny model makes from a seed.
    build: its layers of a transformer's shape, to be called on the meta device: what they take in memory beside each
        transformer. None: they are no part of a forward pass, and read when they are asked for.
    load: reads them for a transformer (None where they need none).
    load_both: in place of `load` reads the transformer too, where one file holds both; `files` then name it as well.
    release, folder: the config and the place of the download that holds the rest of the model too (VAE, text encoder);
        None: the config's own.
    key_in_lora: what its keys in the file of a LoRA contain, where they lie among a LoRA's; `files` then name that one.
    plugin: what its layers add to every forward pass, where nothing but they decides it. Other parts' plug-ins are made
        by the pipeline that knows what they show or hear.
    encodes: the VAE encodes something for it before denoising.
    """

    name: str
    files: Sequence[WeightsFile]
    load: Callable[[WanTransformer | None, Reading], nn.Module] | None = None
    build: Callable[[WanConfig], ModelMixin] | None = None
    load_both: Callable[[Reading], tuple[WanTransformer, ModelMixin]] | None = None
    release: dict | None = None
    folder: Path | None = None
    key_in_lora: str | None = None
    plugin: Callable[[nn.Module], Plugin] | None = None
    encodes: bool = False


def meta_transformer(shape: WanConfig) -> WanTransformer:
    """A transformer's modules, without values."""
    with torch.device("meta"):
        return WanTransformer(**shape.as_dict())
