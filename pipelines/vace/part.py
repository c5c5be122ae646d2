"""VACE's branch as a part beside the transformer, which its released files hold too."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs import download_command, load_config
from errors import WeightsError
from models.vace import VaceBranch, load_vace, load_vace_branch
from models.wan.checkpoint import weight_files
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.networks import shape_of
from pipelines.parts import Part, Reading, meta_transformer
from pipelines.settings import is_tiny
from pipelines.vace.settings import VaceControl, VaceSettings
from pipelines.weights import WeightsFile


def vace_part(settings: VaceSettings, config: dict) -> Part:
    """The branch, from --vace_path or the released model."""
    # The released model holds the base transformer, the VAE and the text encoder too.
    release = config if "vace" in config else load_config("wan2.1-vace-14B")
    build = partial(branch_of, release["vace"]["vace_layers"])
    if is_tiny(settings, config):
        return vace_branch_part(settings, config)
    path = Path(settings.vace_path or Path("checkpoints") / release.get("dest", ""))
    load_both = partial(
        load_vace,
        path,
        base_path=settings.base_path,
        expect=shape_of(config),
        vace_layers=release["vace"]["vace_layers"],
    )
    files = [WeightsFile("VACE", "--vace_path", path, release["name"], read=partial(load_both, device="meta"))]
    if settings.base_path is not None:
        with contextlib.suppress(WeightsError):  # it may hold no transformer, only the VAE or the text encoder
            weight_files(settings.base_path)
            files.append(WeightsFile("transformer", "--base_path", Path(settings.base_path), release["name"]))

    def read_both(reading: Reading) -> tuple[WanTransformer, VaceBranch]:
        return load_both(**reading.options, changes=reading.changes, hint=download_command(release))

    folder = path.parent if path.is_file() else path
    return Part("vace", files, build=build, load_both=read_both, release=release, folder=folder, encodes=True)


def vace_branch_part(settings: VaceControl, config: dict) -> Part:
    """The branch alone, from --vace_path, for whatever transformer the config has."""
    if is_tiny(settings, config) and settings.vace_path is None:
        return Part("vace", (), partial(_load_tiny, config), lambda shape: tiny.tiny_vace(config), encodes=True)
    load_branch = partial(load_vace_branch, settings.vace_path)

    def build(shape: WanConfig) -> VaceBranch:
        return load_branch(meta_transformer(shape), device="meta")

    def load(transformer: WanTransformer, reading: Reading) -> VaceBranch:
        return load_branch(transformer, **reading.options)

    read = partial(build, shape_of(config))
    files = [WeightsFile("VACE", "--vace_path", Path(settings.vace_path), config["name"], read=read)]
    return Part("vace", files, load, build, encodes=True)


def branch_of(vace_layers: Sequence[int], shape: WanConfig) -> VaceBranch:
    """A branch for a transformer of this shape."""
    same = {name: getattr(shape, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers")}
    return VaceBranch(**same, vace_layers=vace_layers)


def _load_tiny(config: dict, transformer: WanTransformer, reading: Reading) -> VaceBranch:
    return tiny.tiny_vace(config).set_compute_dtype(reading.dtype)
