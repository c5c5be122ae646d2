"""From a command to settings: what was typed over an earlier run's record, over the config, over the defaults."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from typing import TypeVar

from configs import load_config
from errors import UsageError
from pipelines.checks import check_formats, check_settings
from pipelines.earlier_run import is_record, read_run_json, read_run_settings
from pipelines.flags import check_bounds, check_types, described, given_by, without_words, words_of
from pipelines.networks import check_networks, has_identity
from pipelines.settings import METHODS, PROJECT, Method, Settings, WanSettings, WanVersion
from preprocess.prompts import check_prompt, read_prompts

Kind = TypeVar("Kind")  # a dataclass of settings


def resolve_settings(
    given: Mapping[str, object] | Namespace,
    kind: type[WanSettings] = Settings,
    adapter_defaults: Mapping[str, object] | None = None,
) -> tuple[WanSettings, dict]:
    """Merge the sources of a Wan model's settings and check them.

    Args:
        given: what was typed, by setting (`given_by`), or parsed flags.
        kind: a task's own settings.
        adapter_defaults: those that come with an adapter the user chose: over everything but flags.

    Returns:
        the settings, and the config they rest on (`configs.load_config`).

    Raises:
        UsageError: a value out of its bounds, an unknown config, a combination that makes no sense.
        InputError: a JSON that is not one of ours.
    """
    settings, config = merge_settings(given, kind, adapter_defaults)
    return check_settings(settings, config), config


def merge_settings(
    given: Mapping[str, object] | Namespace, kind: type[Kind], adapter_defaults: Mapping[str, object] | None = None
) -> tuple[Kind, dict]:
    """The merging half of `resolve_settings`, for settings of any method. A flag that `kind` does not have, as infer.py
    has those of all methods, is refused.
    """
    given = given_by(given) if isinstance(given, Namespace) else given
    typed = without_words(WanVersion, without_words(Method, given))
    if "prompt" in typed:
        typed["prompt"] = read_prompts(typed["prompt"])
    config_name, earlier = choose_config(given, kind)
    config = load_config(config_name)
    check_config(config, kind)

    fields = {field.name for field in dataclasses.fields(kind)}
    if strange := [name for name in typed if name not in fields]:
        raise UsageError(f"--{strange[0]}: --method {kind.method} has no such setting; leave it out")
    values = {key: value for key, value in config["defaults"].items() if key in fields}
    if photo := values.pop("ip_image", None):
        values["ip_image"] = str(PROJECT / photo) if has_identity(config) else ()
    values |= earlier
    values |= adapter_defaults or {}
    if isinstance(guidance := values.get("guidance_scale"), dict):
        values["guidance_scale"] = (guidance["high"], guidance["low"])
    values |= typed | {"config": config_name}
    if not has_identity(config):
        values.setdefault("ip_image", ())
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    missing = [f"--{name}" for name in required if name not in values]
    if missing:
        raise UsageError(f"config {config_name} leaves open: {', '.join(missing)}; give them")
    values = check_types({name: value for name, value in values.items() if name in fields}, kind, "--")
    check_texts(values, kind, without=("prompt",) if "prompt" in typed else ())  # `read_prompts` has checked those
    settings = kind(**values)
    check_bounds(settings)
    check_formats(settings)
    return settings, config


def choose_config(given: Mapping[str, object], kind: type) -> tuple[str, dict]:
    """The config that a run rests on, and the other settings of an earlier run, where --config is its record.

    Raises:
        UsageError: two flags that name different ones.
    """
    wan_version = words_of(WanVersion, given).wan_version
    earlier = read_run_json(given["config"], kind) if is_record(given.get("config")) else {}
    name = earlier.pop("config", None) or given.get("config") or METHODS[kind.method]
    name = name or default_config(given)
    if wan_version is not None and name != f"stand-in-wan{wan_version}":
        raise UsageError(f"--wan_version {wan_version} and --config {name} contradict each other; give one")
    return name, earlier


def default_config(given: Mapping[str, object]) -> str:
    """The config of a run that names none."""
    if "wan_version" in given:
        return f"stand-in-wan{given['wan_version']}"
    return "stand-in-wan2.1" if "base_path" in given or "stand_in_path" in given else "tiny"


def check_config(config: dict, kind: type) -> None:
    """Whether a config is of a model that makes something by itself, by the method that the settings are of.

    Raises:
        UsageError: saying what it is instead.
    """
    name = config["name"]
    if config.get("lora"):
        raise UsageError(f"--config {name}: says how a LoRA is sampled, not which model; use --lora_config")
    if not any(key in config for key in ("variant", "transformer", "method")):
        raise UsageError(f"--config {name}: a part of other models, none that makes something by itself")
    if config.get("method", "standin") != kind.method:
        raise UsageError(f"--config {name}: not a Wan model; run it by: python infer.py --config {name}")
    if "method" not in config:
        check_networks(config)


def check_texts(values: Mapping[str, object], kind: type, without: tuple[str, ...]) -> None:
    """Whether texts that a model reads can be read.

    Raises:
        UsageError: naming the flag.
    """
    for name, (_, what) in described(kind).items():
        if what.text and name not in without:
            for text in values[name] if isinstance(values.get(name), tuple) else (values.get(name),):
                if text is not None:
                    check_prompt(text, f"--{name}", may_be_empty=not what.needed)


def method_of(args: Namespace) -> str:
    """The identity method of a run: what --method says, or the method of the config.

    Raises:
        UsageError: an unknown method or config, or the two contradict each other.
        InputError: a JSON that is not one of ours.
    """
    words_of(Method, given_by(args))
    if args.config is None:
        return args.method or "standin"
    config_name = read_run_settings(args.config).get("config") if is_record(args.config) else args.config
    method = load_config(config_name).get("method", "standin")
    if method not in METHODS:
        raise UsageError(f"--config {args.config}: method is {method[:60]!r}, known are {', '.join(METHODS)}")
    if args.method not in (None, method):
        raise UsageError(f"--method {args.method} and --config {args.config} ({method}) contradict each other")
    return method
