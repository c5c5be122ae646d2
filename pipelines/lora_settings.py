"""The settings of LoRAs: which files, for which expert, how strong, merged or live."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from configs import load_config, part_path
from pipelines.flags import CONFIG, WEIGHTS, setting
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
