"""One YAML per released model: where its files are, which network they hold, how upstream samples from it.

A config may rest on another (`base`). From its base it takes what describes the network and its use (variant,
experts, boundary, tiny-model shapes, and `defaults` key by key), never what describes a download; the resolved base
stays reachable as `config["base"]`. Files whose name begins with an underscore are only bases.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from configs.values import check_keys, nearest, short
from errors import UsageError

FOLDER = Path(__file__).parent

LONGEST = 2**16  # bytes of a file: reading YAML takes a second for each 100 KiB

# key -> what it holds
_KEYS: dict[str, object] = {
    "base": str,  # name of another config
    "description": str,
    "repo": str,  # hub repository
    "url": str,  # or the address of a single file, with size and sha256
    "size": int,  # bytes
    "sha256": str,
    "dest": str,  # folder under checkpoints/
    "files": dict[str, str | list[str]],  # part -> file name or glob pattern(s), relative to the repository and to dest
    "approx_gib": float,  # all files together, for the list of downloads; sizes are asked from the hub
    "needs": list[str],  # other configs to download with this one
    "variant": str,  # key of models.wan.config.VARIANTS
    "tea_cache": str,  # key of models.wan.tea_cache.COEFFICIENTS, where it is not the variant
    "experts": dict[str, str],  # Wan2.2 A14B: noise level -> folder
    "boundary": float,
    "defaults": dict,
    "method": str,  # infer.py's, where it is not Stand-In
    "tiny": bool,
    "seed": int,
    "transformer": dict,  # a tiny model's: fields of models.wan.config.WanConfig
    "vae": dict,  # arguments of diffusers' AutoencoderKLWan; `pipelines.networks` checks these parts
    "text_encoder": dict,  # and fields of transformers' configs
    "image_encoder": dict,
    "audio_encoder": dict,
    "separator": dict[str, float],  # how a vocal separator's spectrum is made
    "tokenizer": str,
    "stand_in": dict,
    "lora": bool,  # no model: what a LoRA wants to be sampled with, for --lora_config
    "unused_keys": list[str],  # glob patterns of keys that a LoRA's released file carries in vain
    "multitalk": dict,  # widths of audio layers
    "svi": dict,  # how clips of a long video are conditioned (pipelines.long_video.settings.Variant)
    "vace": dict,  # the base blocks of a VACE branch's hints (vace_layers)
}
_DEFAULTS: dict[str, object] = {
    "num_inference_steps": int,
    "shift": float,
    "guidance_scale": float | dict[str, float],  # or {high: , low: } for two experts
    "audio_guidance_scale": float,  # only models that hear have one
    "num_frames": int,
    "fps": int,
    "height": int,
    "width": int,
    "solver": str,
    "boundary": float,  # where a distilled LoRA wants the experts switched
    "lora_scale_high": list[float],  # SVI's LoRA and the distilled one after it
    "lora_scale_low": list[float],
    "timesteps": list[float],  # a distilled model's own, before the shift
    "negative_prompt": str,
    "prompt": str,  # a demonstration's
    "ip_image": str,  # relative to the project
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
        UsageError: no such config, not valid YAML, an unknown key or a value of the wrong type, a name of a file to
            download that leads out of its folder.
    """
    return _load(name_or_path, above=())


def _load(name_or_path: str | Path, above: tuple[Path, ...]) -> dict:
    is_path = str(name_or_path).endswith((".yaml", ".yml"))
    file = Path(name_or_path) if is_path else FOLDER / f"{name_or_path}.yaml"
    if not os.path.isfile(file):
        known = known_configs()
        hint = nearest(str(name_or_path), known) or f"; known: {', '.join(known)}, or a .yaml file"
        raise UsageError(f"config {short_name(name_or_path)}: no such config{hint}")
    if file.resolve() in above:
        raise UsageError(f"config {file}: is its own base")
    config = check_keys(_read_yaml(file), _KEYS, where := f"config {file}")
    config["defaults"] = check_keys(config.get("defaults", {}), _DEFAULTS, f"{where}: defaults")
    _check_experts(config, where)
    _check_download(config, where)

    config["name"] = file.stem if file.parent == FOLDER else str(file)
    config["base"] = base = _load(config["base"], (*above, file.resolve())) if "base" in config else None
    if base is not None:
        config["defaults"] = base["defaults"] | config["defaults"]
        config |= {key: base[key] for key in _INHERITED if key in base and key not in config}
    if "experts" in config and "boundary" not in config:
        raise UsageError(f"{where}: experts without a boundary, below which (0 to 1) the low-noise one acts")
    return config


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, by which a small file can stand for more than fits into memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor}: aliases are not accepted, write it out")
        return super().compose_node(parent, index)


def _read_yaml(file: Path) -> object:
    try:
        with open(file, "rb") as stream:
            data = stream.read(LONGEST + 1)
    except OSError as error:
        raise UsageError(f"config {file}: cannot be read ({error.strerror})") from error
    if len(data) > LONGEST:
        raise UsageError(f"config {file}: longer than {LONGEST >> 10} KiB, as no config is; see configs/*.yaml")
    too_deep = UsageError(f"config {file}: nested too deeply; no config needs more than three levels")
    if re.search(rb"([\[{]\s*){30}", data):  # which take the parser seconds
        raise too_deep
    try:
        return yaml.load(data.decode("utf-8-sig"), _PlainLoader)
    except RecursionError:
        raise too_deep from None
    except Exception as error:  # a date or number that is none is no YAMLError: ValueError, KeyError, AttributeError, …
        reason = " ".join(str(error).split())
        raise UsageError(f"config {file}: not valid YAML: {reason[:300]}") from error


def _check_experts(config: dict, where: str) -> None:
    """The two noise levels, wherever there is something for each."""
    for name, levels in (
        ("experts", config.get("experts")),
        ("guidance_scale", config["defaults"].get("guidance_scale")),
    ):
        if isinstance(levels, dict) and set(levels) != {"high", "low"}:
            raise UsageError(f"{where}: {name} has the keys {', '.join(levels) or '(none)'}; needed are high and low")
    for boundary in (config.get("boundary"), config["defaults"].get("boundary")):
        if boundary is not None and not 0 <= boundary <= 1:
            raise UsageError(f"{where}: boundary is {boundary:g}, accepted are 0 to 1")


def _check_download(config: dict, where: str) -> None:
    """Whether what is to be fetched is told in full, and lies where it belongs."""
    names = [("dest", config.get("dest")), *(("experts", name) for name in config.get("experts", {}).values())]
    names += [(f"files: {part}", name) for part in config.get("files", {}) for name in file_patterns(config, part)]
    for key, name in names:
        if name is not None and not is_inside(name):
            raise UsageError(f"{where}: {key} is {short(name)}, which leads out of the folder; give a relative path")
    source = [key for key in ("repo", "url") if key in config]
    if not source:
        return
    if len(source) == 2:
        raise UsageError(f"{where}: repo and url; give one of them")
    needed = {"dest", "files"} | ({"size", "sha256"} if "url" in config else set())
    if missing := sorted(needed - set(config)):
        raise UsageError(f"{where}: {source[0]} without {', '.join(missing)}")
    if "repo" in config and not re.fullmatch(r"[\w.-]+/[\w.-]+", config["repo"], re.ASCII):
        raise UsageError(f"{where}: repo is {short(config['repo'])}, expected OWNER/NAME")
    if "url" in config:
        if not re.match(r"https?://[^\s/]", config["url"]):
            raise UsageError(f"{where}: url is {short(config['url'])}, expected https://…")
        if len(patterns := file_patterns(config)) != 1 or "*" in patterns[0]:
            raise UsageError(f"{where}: files has {len(patterns)} patterns, the url is of one file; name it")
        if config["size"] < 0 or not re.fullmatch("[0-9a-fA-F]+", config["sha256"]):
            raise UsageError(f"{where}: size is in bytes, sha256 in hexadecimal digits")


def is_inside(name: str) -> bool:
    """Whether a path, of this system or of Windows, is relative and does not climb."""
    parts = re.split(r"[/\\]", name)
    return bool(name) and parts[0] != "" and ":" not in parts[0] and ".." not in parts


def short_name(name: object) -> str:
    return str(name) if len(str(name)) <= 200 else f"{str(name)[:200]}…"


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
