"""Stand-In: its weights as a part beside the transformer, and the identity of photos. Source: arXiv 2508.07901."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from configs import download_command
from errors import UsageError, WeightsError
from models.identity.stand_in import Identity, StandIn, load_stand_in
from models.wan.checkpoint import read_tensors
from models.wan.slots import Plugin
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.conditions import image_to_video
from pipelines.networks import shape_of
from pipelines.parts import Part, Reading, meta_transformer
from pipelines.settings import Settings, is_tiny
from pipelines.wan import Wan
from pipelines.weights import EXPERTS, WeightsFile, found_or


def stand_in_parts(settings: Settings, config: dict) -> list[Part]:
    """The identity of the photos that the settings give to Stand-In; nothing without photos."""
    if not settings.stand_in_photos:
        return []
    if is_tiny(settings, config) and settings.stand_in_path is None:
        return [Part("stand_in", (), partial(_load_tiny, config), encodes=True)]
    place = Path(settings.stand_in_path or Path("checkpoints") / config.get("dest", ""))
    experts = len(config.get("experts") or (None,))
    files = []
    for expert in range(experts):
        name = "Stand-In" if experts == 1 else f"Stand-In ({EXPERTS[expert]} noise)"
        read = partial(_check, place, expert, config)
        path = found_or(place, find_stand_in, place, expert, config)
        files.append(WeightsFile(name, "--stand_in_path", path, config["name"], read=read))
    return [Part("stand_in", files, partial(_load, place, config), encodes=True)]


def find_stand_in(place: Path, expert: int, config: dict) -> Path:
    """The file of an expert: as given, or found in a folder by any of its released and converted names.

    Raises:
        UsageError: one file for two experts.
        WeightsError: none there.
    """
    has_experts = bool(config.get("experts"))
    if place.is_file():
        if has_experts:
            raise UsageError(f"--stand_in_path {place}: Wan2.2 needs two files; give the folder that holds both")
        return place
    versions = ("wan2.2", EXPERTS[expert]) if has_experts else ("wan2.1",)
    for file in sorted(place.glob("*")):
        named = file.name.lower()
        if file.suffix in (".ckpt", ".pt", ".safetensors") and all(word in named for word in versions):
            return file
    wanted = " ".join(("Stand-In", *versions))
    raise WeightsError(f"{place}: no {wanted} weights there; {download_command(config)}")


def _check(place: Path, expert: int, config: dict) -> None:
    path = find_stand_in(place, expert, config)
    StandIn.from_tensors(read_tensors(path), meta_transformer(shape_of(config)), source=str(path))


def _load(place: Path, config: dict, transformer: WanTransformer, reading: Reading) -> StandIn:
    return load_stand_in(find_stand_in(place, reading.expert, config), transformer, hint=download_command(config))


def _load_tiny(config: dict, transformer: WanTransformer, reading: Reading) -> StandIn:
    return tiny.tiny_stand_in(config, transformer, reading.expert)


# ------------------------------------------------------------------------------------------------------- the identity


class Identities:
    """The identity of a run's photos for each expert: keys and values that every forward pass may look at. They are
    computed at the first video and kept for the next, as long as the weights are those they were computed with.

    Args:
        wan: the model.
        faces: the person of each photo, (512, 512, 3) uint8 on white; empty: nobody.
    """

    def __init__(self, wan: Wan, faces: Sequence[numpy.ndarray]):
        self.wan = wan
        self.hashes = [hashlib.sha256(face.tobytes()).hexdigest() for face in faces]
        self.references: list[Tensor] = []  # latents (1, C, 1, 64, 64); never tiled, as in training
        if faces:
            with wan.vae() as vae:
                self.references = [vae.encode(image_to_video(face).to(wan.device)) for face in faces]
        self._computed: dict[int, Identity] = {}
        self._with_loras = True  # the state of the weights that they were computed with
        self._adapters: dict[int, StandIn] = {}

    def of(self, expert: int, transformer: WanTransformer) -> Callable[[int, int], list[Plugin]] | None:
        """(step, number of steps) -> the identity at the steps in which it takes part (`Expert.plugins_at`). None
        without photos.

        transformer: as `Wan.transformer` has just returned it.
        """
        if not self.references:
            return None
        if self._with_loras != self.wan.loras_are_on:
            self._with_loras = self.wan.loras_are_on
            self.clear()
        if expert not in self._computed:
            identity = self._compute(expert, transformer)
            if self.wan.num_experts > 1 and self.wan.memory != "resident":
                self.clear()  # 800 MiB a photo: the other expert's are not needed now
            self._computed[expert] = identity
        identity = self._computed[expert]
        return lambda step, num_steps: [identity] if identity.active(step, num_steps) else []

    def clear(self) -> None:
        """Forget all that was computed."""
        self._computed.clear()

    @torch.no_grad()
    def _compute(self, expert: int, transformer: WanTransformer) -> Identity:
        wan, settings = self.wan, self.wan.settings
        if expert not in self._adapters:
            stand_in = wan.read_part("stand_in", transformer, expert)
            self._adapters[expert] = stand_in.scaled(settings.identity_strength)
        token = 2 * wan.transformer_config.vae_spatial_factor
        grid = (settings.height // token, settings.width // token)
        steps = (settings.identity_start, settings.identity_end)
        identity = self._adapters[expert].encode(transformer, self.references, grid, steps)
        return identity.shard(wan.processes.rank, wan.processes.count) if wan.processes.context_parallel else identity
