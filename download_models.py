"""Download and verify released weights.

    python download_models.py                                 what there is, how large, what is here (--list)
    python download_models.py --wan_version 2.1               Wan2.1-T2V-14B, Stand-In, face detector and parser
    python download_models.py --wan_version 2.2               the same for Wan2.2-T2V-A14B
    python download_models.py --method instantid              InstantID with SDXL; or consisid; face models with both
    python download_models.py --vace                          Wan2.1 with VACE-14B, which holds the base too
    python download_models.py --only wan2.1-t2v-1.3B tiny.yaml
    python download_models.py --only wan2.2-ti2v-5B --dry_run   sizes only; without a connection those of configs/

Broken downloads go on where they stopped: run the same command again. Files that are here and whole are not fetched
again. HF_ENDPOINT names a mirror, HF_TOKEN an account, HF_HUB_OFFLINE=1 only looks at what is here.
"""

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from configs import file_patterns, known_configs, load_config
from errors import ResourceError, UsageError, exit_codes
from pipelines.flags import Parser, add_flags, check_bounds, given_by, setting
from pipelines.settings import WAN_VERSIONS

logger = logging.getLogger("selfsame")


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """What to fetch, and where to."""

    title: ClassVar[str] = "what to fetch"

    list: bool = setting("list the known models and stop; so does no flag at all", False)
    only: tuple[str, ...] = setting("models by name, or .yaml files like those in configs/", (), metavar="NAME")
    wan_version: str | None = setting(
        "all that identity-preserving text-to-video needs (with --vace: 2.1)", None, choices=WAN_VERSIONS
    )
    method: str | None = setting("all that infer.py --method needs", None, choices=("instantid", "consisid"))
    vace: bool = setting("with VACE-14B as the base (Wan2.1 only)", False)
    dest: Path = setting("root folder", Path("checkpoints"), metavar="FOLDER")
    dry_run: bool = setting("say what would be fetched, and whether the disk has room", False)


def parse_args(argv: Sequence[str] | None = None) -> DownloadSettings:
    """
    Raises:
        UsageError: an unknown flag, or a value that is not accepted.
    """
    parser = Parser(__doc__)
    add_flags(parser, DownloadSettings)
    settings = DownloadSettings(**given_by(parser.parse_args(argv)))
    check_bounds(settings)
    return settings


def free_bytes(root: Path) -> int:
    """On the disk that holds, or will hold, this folder."""
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def wanted_configs(args: DownloadSettings) -> list[dict]:
    """The configs the arguments ask for, each once, in the order of the download."""
    names = list(args.only)
    if args.method:
        method = load_config(args.method)
        names += [method["base"]["name"]] if method["base"] else []
        names.append(method["name"])
    version = args.wan_version or ("2.1" if args.vace else None)
    if version:
        if args.vace and version != "2.1":
            raise UsageError(f"--vace: there is no VACE base for --wan_version {version}; use 2.1")
        stand_in = load_config(f"stand-in-wan{version}")
        base = "wan2.1-vace-14B" if args.vace else stand_in["base"]["name"]
        names += [base, stand_in["name"]]
    names += [needed for name in names for needed in load_config(name).get("needs", ())]
    configs = [load_config(name) for name in dict.fromkeys(names)]
    for config in configs:
        if "dest" not in config:
            raise UsageError(f"--only {config['name']}: nothing to download for it")
    return configs


def state_of(config: dict, root: Path) -> str:
    """By names alone: here, partly, or -."""
    folder = root / config["dest"]
    here = [any(folder.glob(pattern)) for pattern in file_patterns(config)]
    return "here" if all(here) else "partly" if any(here) else "-"


def print_list(root: Path) -> None:
    """What can be asked for, and how."""
    lines = [f"{'name':<26}{'GiB':>7}  {'state':<9}{'folder':<44}description"]
    for config in map(load_config, known_configs()):
        if "dest" not in config:
            continue
        folder, state = root / config["dest"], state_of(config, root)
        lines.append(
            f"{config['name']:<26}{config['approx_gib']:>7.1f}  {state:<9}{folder!s:<44}{config['description']}"
        )
    lines.append("fetch with --only NAME …, or what belongs together with --wan_version, --method, --vace (--help)")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; python would say so once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def estimate(configs: list[dict], root: Path) -> None:
    """A dry run without a connection: sizes from the configs, files by their names."""
    missing = [config for config in configs if state_of(config, root) != "here"]
    for config in missing:
        logger.info("to fetch: %s, about %.2f GiB (%s)", root / config["dest"], config["approx_gib"], config["name"])
    needed = sum(config["approx_gib"] for config in missing)
    logger.info("the hub was not asked: sizes are estimates of configs/; about %.2f GiB to fetch", needed)
    free = free_bytes(root) / 2**30
    if needed > free:
        raise ResourceError(f"{root}: needs about {needed:.1f} GiB, {free:.1f} GiB free; name another disk with --dest")


def main(args: DownloadSettings) -> None:
    if args.list or not (args.only or args.method or args.wan_version or args.vace):
        return print_list(args.dest)
    configs = wanted_configs(args)

    from models.downloads import UnreachableError, check_disk, damage, download, list_files, only_download

    try:
        files = [file for config in configs for file in list_files(config, args.dest)]
    except UnreachableError:
        if not args.dry_run:
            raise
        return estimate(configs, args.dest)
    logger.info("checking %d files (%.2f GiB) in %s", len(files), sum(f.size for f in files) / 2**30, args.dest)
    missing = []
    for file in files:
        if (wrong := damage(file, file.path)) is not None:
            logger.info("to fetch: %s, %.2f GiB (%s)", file.path, file.size / 2**30, wrong)
            missing.append(file)
    needed = check_disk(missing, args.dest)
    if args.dry_run or not missing:
        logger.info("%d files to fetch, %.2f GiB", len(missing), needed / 2**30)
        return None
    with only_download(args.dest):
        for file in missing:
            download(file)
    logger.info("%d files fetched and verified, %d were here", len(missing), len(files) - len(missing))
    return None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_codes("what is fetched is kept, and the same command goes on"):
        main(parse_args())
