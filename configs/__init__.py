"""One YAML per released model: where its files are, which network they hold, how upstream samples from it.

A config may rest on another (`base`). From its base it takes what describes the network and its use (variant,
experts, boundary, tiny-model shapes, and `defaults` key by key), never what describes a download; the resolved base
stays reachable as `config["base"]`. Files whose name begins with an underscore are only bases.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from errors import UsageError

FOLDER = Path(__file__).parent

# key -> accepted types
_KEYS: dict[str, tuple[type, ...]] = {
    "base": (str,),  # name of another config
    "description": (str,),
    "repo": (str,),  # hub repository
    "url": (str,),  # or the address of a single file, with size and sha256
    "size": (int,),  # bytes
    "sha256": (str,),
    "dest": (str,),  # folder under checkpoints/
    "files": (dict,),  # part -> file name or glob pattern(s), relative to the repository and to dest
    "approx_gib": (int, float),  # of all files, for the list of downloads; sizes are asked from the hub
    "needs": (list,),  # other configs to download with this one
    "variant": (str,),  # key of models.wan.config.VARIANTS
    "tea_cache": (str,),  # key of models.wan.tea_cache.COEFFICIENTS, where it is not the variant
    "experts": (dict,),  # Wan2.2 A14B: noise level -> folder
    "boundary": (int, float),
    "defaults": (dict,),
    "method": (str,),  # of infer.py, where it is not Stand-In
    "tiny": (bool,),
    "seed": (int,),
    "transformer": (dict,),
    "vae": (dict,),
    "text_encoder": (dict,),
    "image_encoder": (dict,),
    "audio_encoder": (dict,),
    "separator": (dict,),  # how a vocal separator's spectrum is made
    "tokenizer": (str,),
    "stand_in": (dict,),
    "lora": (bool,),  # no model: what a LoRA wants to be sampled with, for --lora_config
    "unused_keys": (list,),  # glob patterns of keys that a LoRA's released file carries in vain
    "multitalk": (dict,),  # widths of audio layers
    "svi": (dict,),  # how clips of a long video are conditioned (pipelines.long_video_settings.Variant)
    "vace": (dict,),  # the base blocks of a VACE branch's hints (vace_layers)
}
_DEFAULTS: dict[str, tuple[type, ...]] = {
    "num_inference_steps": (int,),
    "shift": (int, float),
    "guidance_scale": (int, float, dict),  # or {high: , low: } for two experts
    "audio_guidance_scale": (int, float),  # of models that hear
    "num_frames": (int,),
    "fps": (int,),
    "height": (int,),
    "width": (int,),
    "solver": (str,),
    "boundary": (int, float),  # where a distilled LoRA wants the experts switched
    "lora_scale_high": (list,),  # of SVI's LoRA and the distilled one after it
    "lora_scale_low": (list,),
    "timesteps": (list,),  # a distilled model's own, before the shift
    "negative_prompt": (str,),
    "prompt": (str,),  # of a demonstration
    "ip_image": (str,),  # relative to the project
}
_INHERITED = (
    "method",
    "variant",
    "tea_cache",
    "experts",
    "boundary",
    "tiny",
    "transformer",
    "vae",
    "text_encoder",
    "image_encoder",
    "audio_encoder",
    "tokenizer",
    "stand_in",
    "multitalk",
    "svi",
    "vace",
)


def known_configs() -> list[str]:
    """The names `load_config` knows, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml") if not file.stem.startswith("_"))


def load_config(name_or_path: str | Path) -> dict:
    """Read a config by name (`wan2.1-t2v-14B`) or by the path of a YAML file, checked and with its base resolved.

    The result has the file's keys, plus `name` (what to load it by); `base` is the base's resolved dict or None.

    Raises:
        UsageError: no such config, not valid YAML, an unknown key or a value of the wrong type.
    """
    return _load(name_or_path, above=())


def _load(name_or_path: str | Path, above: tuple[Path, ...]) -> dict:
    is_path = str(name_or_path).endswith((".yaml", ".yml"))
    file = Path(name_or_path) if is_path else FOLDER / f"{name_or_path}.yaml"
    if not file.is_file():
        raise UsageError(f"config {name_or_path}: no such config; known: {', '.join(known_configs())}, or a .yaml file")
    if file.resolve() in above:
        raise UsageError(f"config {file}: is its own base")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config {file}: not valid YAML: {' '.join(str(error).split())}") from error
    _check(config, _KEYS, f"config {file}")
    _check(config.setdefault("defaults", {}), _DEFAULTS, f"config {file}: defaults")

    config["name"] = file.stem if file.parent == FOLDER else str(file)
    config["base"] = base = _load(config["base"], (*above, file.resolve())) if "base" in config else None
    if base is not None:
        config["defaults"] = base["defaults"] | config["defaults"]
        config |= {key: base[key] for key in _INHERITED if key in base and key not in config}
    return config


def _check(values: object, accepted: dict[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected keys and values, found {type(values).__name__}")
    if unknown := [str(key) for key in values if key not in accepted]:
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(accepted)}")
    for key, value in values.items():
        is_right = isinstance(value, accepted[key]) and (bool in accepted[key] or not isinstance(value, bool))
        if not is_right:
            names = " or ".join(kind.__name__ for kind in accepted[key])
            raise UsageError(f"{where}: {key} is {value!r}, expected {names}")


def file_patterns(config: dict, part: str | None = None) -> list[str]:
    """The glob patterns of one part, or of all parts."""
    parts = [part] if part else list(config.get("files", {}))
    found = [config["files"][name] for name in parts]
    return [pattern for entry in found for pattern in ([entry] if isinstance(entry, str) else entry)]


def part_path(config: dict, part: str, root: str | Path = "checkpoints") -> Path:
    """Where a part lies after the download: its file, or the folder of its files when a pattern names several."""
    folder = Path(root) / config["dest"]
    patterns = file_patterns(config, part)
    if len(patterns) == 1 and "*" not in patterns[0]:
        return folder / patterns[0]
    parents = {PurePosixPath(pattern).parent for pattern in patterns}
    return folder / parents.pop() if len(parents) == 1 else folder


def download_command(config: dict | Sequence[dict], root: str | Path = "checkpoints") -> str:
    """What to do about missing files of a config, or of several; ends an error message."""
    names = " ".join(each["name"] for each in ([config] if isinstance(config, dict) else config))
    elsewhere = "" if Path(root) == Path("checkpoints") else f" --dest {root}"
    return f"run: python download_models.py --only {names}{elsewhere}"
