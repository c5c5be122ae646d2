"""Stand-In's weights as a part beside the transformer, and when its identity takes part. Source: arXiv 2508.07901."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from configs import download_command
from errors import UsageError, WeightsError
from models.identity.stand_in import Identity, StandIn, load_stand_in
from models.wan.checkpoint import read_tensors
from models.wan.slots import Plugin
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.networks import shape_of
from pipelines.parts import Part, Reading, meta_transformer
from pipelines.settings import Settings, is_tiny
from pipelines.weights import EXPERTS, WeightsFile, found_or


def stand_in_parts(settings: Settings, config: dict) -> list[Part]:
    """The identity of the photos that the settings give to Stand-In; nothing without photos."""
    if not settings.stand_in_photos:
        return []
    if is_tiny(settings, config):
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


def within_steps(identity: Identity | None) -> Callable[[int, int], list[Plugin]] | None:
    """(step, number of steps) -> the identity at the steps in which it takes part; None without one."""
    if identity is None:
        return None
    return lambda step, num_steps: [identity] if identity.active(step, num_steps) else []


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
