"""From a command to settings with LoRAs: what a --lora_config brings, whether files and scales fit. Without torch."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

from configs import known_configs, load_config, part_path
from errors import UsageError
from pipelines.command import resolve_settings
from pipelines.flags import given_by
from pipelines.lora_settings import EXPERTS, Kind, Loras, LoraSettings


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
    settings, config = resolve_settings(given, kind, lora_defaults(given.get("lora_config")))
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
    files = {f"lora_path{which}": (str(part_path(preset, f"lora{which}")),) for which in ("_high", "_low")}
    return replace(settings, **{name: path for name, path in files.items() if not getattr(settings, name)})


def lora_defaults(name: str | None) -> dict:
    """How the LoRA of a --lora_config wants to be sampled."""
    if name is None:
        return {}
    config = load_config(name)
    if not config.get("lora"):
        known = [name for name in known_configs() if load_config(name).get("lora")]
        raise UsageError(f"--lora_config {name}: not of a LoRA; known: {', '.join(known)}, or a .yaml with lora: true")
    return config["defaults"]
