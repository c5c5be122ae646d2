"""The settings of LoRAs: which files, for which expert, how strong, merged or live. Checked before torch."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from configs import known_configs, load_config, part_path
from errors import UsageError
from pipelines.command import resolve_settings
from pipelines.flags import CONFIG, WEIGHTS, given_by, setting
from pipelines.settings import Settings

MODES = ("auto", "merged", "live")
PATH = {"metavar": "FILE", "path": WEIGHTS}
SCALE = {"low": -10, "high": 10, "metavar": "S"}  # sliders are used below 0 too
EXPERTS = ("", "_high", "_low")  # how the flags end of LoRAs for every expert, and for each of Wan2.2's two
Kind = TypeVar("Kind", bound="Loras")


@dataclass(frozen=True, kw_only=True)
class Loras:
    """LoRAs of a Wan model, beside its `fp8`. A scale is one number for all paths, or one a path."""

    title: ClassVar[str] = "LoRA"

    lora_path: tuple[str, ...] = setting("of every expert; repeatable", (), **PATH)
    lora_scale: tuple[float, ...] = setting("one for all, or each", (1.0,), **SCALE)
    lora_config: str | None = setting(
        "how a distilled LoRA wants to be sampled: of configs/", None, metavar="NAME", path=CONFIG
    )
    lora_mode: str = setting("auto: merged; live with --fp8, --lora_start or --lora_end", "auto", choices=MODES)
    lora_partial: bool = setting("leave out keys that do not apply", False)
    lora_start: float = setting("share of the steps before the LoRAs set in", 0.0, low=0, high=1)
    lora_end: float = setting("share of the steps after which they are off", 1.0, low=0, high=1)

    @property
    def live_loras(self) -> bool:
        """float8 has three bits of fraction: most of a small change would be rounded away with the merged weight. And
        what is merged cannot be switched off.
        """
        return self.lora_mode == "live" or (self.lora_mode == "auto" and (self.fp8 or self.switched))

    @property
    def unused_lora_keys(self) -> tuple[str, ...]:
        """Patterns of the keys that the files of the --lora_config are known to carry in vain."""
        return tuple(load_config(self.lora_config).get("unused_keys", ())) if self.lora_config else ()

    @property
    def lora_steps(self) -> tuple[float, float]:
        """The shares of the steps from and up to which the LoRAs work."""
        return self.lora_start, self.lora_end

    @property
    def switched(self) -> bool:
        """Whether they are on for a part of the steps only."""
        return self.lora_steps != (0, 1)

    def lora_files(self, num_experts: int) -> list[list[tuple[str, float]]]:
        """(path, scale) of each expert's LoRAs: those of every expert first."""
        experts = ("_high", "_low") if num_experts > 1 else ("",)
        return [[pair for which in dict.fromkeys(("", expert)) for pair in self._scaled(which)] for expert in experts]

    def lora_release(self, path: str) -> str | None:
        """The config whose download has this file; None for a user's own."""
        for config in map(load_config, self.lora_releases):
            if any(Path(path) == part_path(config, part) for part in config.get("files", {})):
                return config["name"]
        return None

    @property
    def lora_releases(self) -> tuple[str, ...]:
        """The configs of LoRAs that the settings name."""
        return (self.lora_config,) if self.lora_config else ()

    def loras_of(self, which: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Paths and scales of one of `EXPERTS`."""
        return getattr(self, f"lora_path{which}", ()), getattr(self, f"lora_scale{which}", (1.0,))

    def _scaled(self, which: str) -> list[tuple[str, float]]:
        paths, scales = self.loras_of(which)
        return list(zip(paths, scales * len(paths) if len(scales) == 1 else scales, strict=True))


@dataclass(frozen=True, kw_only=True)
class ExpertLoras(Loras):
    """`lora_path` changes every expert, `lora_path_high` and `lora_path_low` one of Wan2.2's two."""

    title: ClassVar[str] = "LoRA"

    lora_path_high: tuple[str, ...] = setting("of Wan2.2's high-noise expert; repeatable", (), **PATH)
    lora_scale_high: tuple[float, ...] = setting("one for all, or each", (1.0,), **SCALE)
    lora_path_low: tuple[str, ...] = setting("of its low-noise expert; repeatable", (), **PATH)
    lora_scale_low: tuple[float, ...] = setting("one for all, or each", (1.0,), **SCALE)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(ExpertLoras, Settings):
    """Videos by Stand-In with LoRAs on the model."""

    script: ClassVar[str] = "infer_with_lora.py"


def resolve_lora_settings(
    given: Mapping[str, object] | Namespace, kind: type[Kind] = LoraSettings, required: bool = True
) -> tuple[Kind, dict]:
    """`resolve_settings`, with the defaults that `--lora_config` brings.

    Args:
        given: what was typed, by setting (`given_by`), or parsed flags.
        required: there is no point in the script without a LoRA.

    Raises:
        UsageError: also for scales that do not match their paths, or an expert that the model does not have.
    """
    given = given_by(given) if isinstance(given, Namespace) else given
    settings, config = resolve_settings(given, kind, brought_defaults(given.get("lora_config")))
    settings = with_preset_loras(settings, config)
    check_lora_settings(settings, config, given)
    if not any(settings.lora_files(2)):
        if required:
            raise UsageError("--lora_path: give at least one LoRA file (without any, use infer.py)")
        for name in ("lora_mode", "lora_partial", "lora_start", "lora_end"):
            if name in given:
                raise UsageError(f"--{name}: there is no --lora_path it could be for")
    return settings, config


def check_lora_settings(settings: Loras, config: dict, given: Mapping[str, object]) -> None:
    """Files, scales and mode. Raises as `resolve_lora_settings`."""
    for which in EXPERTS:
        paths, scales = settings.loras_of(which)
        if len(scales) not in (1, len(paths)):
            raise UsageError(
                f"--lora_scale{which}: {len(scales)} values for {len(paths)} --lora_path{which}; give one, or one each"
            )
        if not paths and f"lora_scale{which}" in given:
            raise UsageError(f"--lora_scale{which}: there is no --lora_path{which} it could scale")
        if which and paths and not config.get("experts"):
            raise UsageError(f"--lora_path{which}: {config['name']} is one model; use --lora_path")
    _check_steps(settings)


def _check_steps(settings: Loras) -> None:
    start, end = settings.lora_steps
    if start > end:
        raise UsageError(f"--lora_start {start:g} comes after --lora_end {end:g}")
    if settings.switched and settings.lora_mode == "merged":
        raise UsageError("--lora_start, --lora_end: merged LoRAs cannot be switched off; use --lora_mode live or auto")
    if settings.switched and settings.step_cache == "teacache":
        raise UsageError("--lora_start, --lora_end: teacache follows one model through all steps; use first_block")


def with_preset_loras(settings: Kind, config: dict) -> Kind:
    """With the files that the --lora_config has for each expert, where none is named. The tiny model does without.

    Raises:
        UsageError: the model has no experts.
    """
    preset = load_config(settings.lora_config) if settings.lora_config else {}
    if config.get("tiny") or "files" not in preset:
        return settings
    if not config.get("experts"):
        raise UsageError(
            f"--lora_config {settings.lora_config}: its LoRAs are for the two experts of Wan2.2, "
            f"{config['name']} is one model"
        )
    brought = {f"lora_path{which}": (str(part_path(preset, f"lora{which}")),) for which in ("_high", "_low")}
    return replace(settings, **{name: path for name, path in brought.items() if not getattr(settings, name)})


def brought_defaults(name: str | None) -> dict:
    """How the LoRA of a --lora_config wants to be sampled."""
    if name is None:
        return {}
    config = load_config(name)
    if not config.get("lora"):
        known = [name for name in known_configs() if load_config(name).get("lora")]
        raise UsageError(f"--lora_config {name}: not of a LoRA; known: {', '.join(known)}, or a .yaml with lora: true")
    return config["defaults"]
