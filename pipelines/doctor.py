"""What this machine has and what is downloaded, for a first look and for bug reports.

    python -m pipelines.doctor
    python -m pipelines.doctor --json
    python -m pipelines.doctor --dest /data/weights         where download_models.py was told to put them

Nothing is loaded, changed or fetched; of weights the headers are read. No path outside the folder of the weights is
printed, so that no user's name is.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from configs import file_patterns, known_configs, load_config
from errors import UserError, WeightsError, exit_codes
from models.wan.attention import usable_backends
from models.wan.checkpoint import SUFFIXES, headers_only, read_tensors, weight_files
from pipelines.consis_id import needs as consis_id
from pipelines.distributed import choose_device, has_conv3d_defect
from pipelines.instant_id import pipeline as instant_id
from pipelines.memory import free_bytes
from pipelines.needs import GIB, Needs, needs_of_config
from pipelines.placement import choose_mode
from pipelines.record import source_version
from preprocess.ffmpeg import run_ffmpeg

logger = logging.getLogger("selfsame")

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "peft", "insightface")
ENCODERS = ("libx264", "aac")  # the ones that videos are written with


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--dest", type=Path, default=Path("checkpoints"), help="root of the weights (checkpoints)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict:
    """Print the report; also returned."""
    device = choose_device(args.device)
    report = {
        "software": software(),
        "device": describe_device(device),
        "attention_backends": usable_backends(device, torch.float32 if device.type == "cpu" else torch.bfloat16),
        "ffmpeg": describe_ffmpeg(),
        "onnxruntime": describe_onnxruntime(),
        "free": free_places(device, args.dest),
        "models": [describe_model(load_config(name), args.dest, device) for name in known_configs()],
    }
    report["models"] = [model for model in report["models"] if model is not None]
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else "\n".join(as_text(report)))
    return report


# ------------------------------------------------------------------------------------------------------ the machine


def software() -> dict[str, str]:
    """Versions; a package that is not there is said to be missing."""
    versions = {"selfsame": source_version()[:12], "python": platform.python_version(), "system": platform.platform()}
    return versions | {name: version_of(name) or "missing" for name in PACKAGES}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_device(device: torch.device) -> dict:
    """What models would run on, and what is known to be wrong with it."""
    found = {"name": str(device), "torch_built_for_cuda": torch.version.cuda}
    if device.type != "cuda":
        return found | {"cpu_cores": os.cpu_count()}
    properties, cudnn = torch.cuda.get_device_properties(device), torch.backends.cudnn.version()
    found |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpus": torch.cuda.device_count(),
        "driver": driver_version(),
        "cudnn": cudnn,
    }
    if has_conv3d_defect():
        found["defect"] = f"cuDNN {cudnn} may decode wrong pixels (conv3d); install what requirements.txt names"
    return found


def driver_version() -> str | None:
    """NVIDIA's, by its own tool: torch knows only what the driver can run."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def describe_ffmpeg() -> dict:
    """Its version, and which of the needed encoders it has."""
    try:
        version = run_ffmpeg("-version").stdout.decode(errors="replace").partition("\n")[0]
        encoders = run_ffmpeg("-encoders").stdout.decode(errors="replace")
    except (UserError, OSError) as error:
        return {"missing": str(error)}
    has = {name: bool(re.search(rf"^ \S+ {name}\s", encoders, re.MULTILINE)) for name in ENCODERS}
    return {"version": " ".join(version.split()[:3]), "encoders": has}


def describe_onnxruntime() -> dict:
    """Which of its two builds, and what it can run on: with both installed the last one wins without a word."""
    builds = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := version_of(name))}
    try:
        import onnxruntime
    except ImportError as error:
        return {"builds": builds, "missing": str(error)}
    return {"builds": builds, "providers": onnxruntime.get_available_providers()}


def free_places(device: torch.device, root: Path) -> dict[str, float]:
    """GiB that are free: on the device (a CPU's is the RAM), in RAM, and on the disk of the weights."""
    on_device, ram = free_bytes(device)
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    amounts = {"device": on_device, "ram": ram, "ram_total": psutil.virtual_memory().total}
    amounts["disk"] = shutil.disk_usage(existing).free
    return {name: round(count / GIB, 1) for name, count in amounts.items()}


# -------------------------------------------------------------------------------------------------------- the models


def describe_model(config: dict, root: Path, device: torch.device) -> dict | None:
    """Whether a config's files are here and whole, and how it would run here; None for what has no files."""
    if "dest" not in config:
        return None
    state, problems = state_of(config, root)
    needs = needs_of(config, device)
    mode = None
    if needs is not None and "variant" in config:
        placement = choose_mode(needs, *free_bytes(device), device=device.type)
        mode = placement.name if placement.fits else f"{placement.name} (does not fit)"
    elif needs is not None:  # diffusers' pipelines, which auto puts neither into float8 nor into tiles
        whole, tiles = (
            choose_mode(needs, *free_bytes(device), device=device.type, fp8=False, tiled=tiled)
            for tiled in (False, True)
        )
        otherwise = f"{tiles.name} (with --tiled)" if tiles.fits else f"{whole.name} (does not fit)"
        mode = whole.name if whole.fits else otherwise
    return {"name": config["name"], "state": state, "problems": problems, "memory": mode}


def needs_of(config: dict, device: torch.device) -> Needs | None:
    """What a model's own estimate says of one video or picture of its own size; None for parts of other models."""
    if "variant" in config:
        return needs_of_config(config)
    on_cpu = device.type == "cpu"
    if config.get("method") == "consisid":
        size = [config["defaults"][name] for name in ("height", "width", "num_frames")]
        return consis_id.estimate_needs(consis_id.RELEASED, *size, torch.float32 if on_cpu else torch.bfloat16)
    return instant_id.needs_of_release(4 if on_cpu else 2) if config.get("method") == "instantid" else None


def state_of(config: dict, root: Path) -> tuple[str, list[str]]:
    """-, partly, damaged, or whole as far as sizes and headers tell; and what is wrong with it."""
    folder = root / config["dest"]
    found = {pattern: sorted(folder.glob(pattern)) for pattern in file_patterns(config)}
    files = [file for matching in found.values() for file in matching if file.suffix != ".part"]
    if not files:
        return "-", []
    missing = [pattern for pattern in found if not any(file in files for file in found[pattern])]
    problems = [without_names(str(error), folder) for error in broken(files)]
    if missing:
        return "partly", [*(f"{pattern}: missing" for pattern in missing), *problems]
    return ("damaged" if problems else "whole"), problems


def broken(files: Iterable[Path]) -> Iterable[WeightsError]:
    """What is wrong with files, by their headers; shards are counted by their index."""
    for index in (file for file in files if file.name.endswith(".index.json")):
        try:
            weight_files(index.parent)
        except WeightsError as error:
            yield error
    for file in files:
        try:
            if file.suffix in SUFFIXES:
                with headers_only():
                    read_tensors(file, nested=("image_proj", "ip_adapter"))
            elif not file.is_file() or file.stat().st_size == 0:
                yield WeightsError(f"{file}: {'empty' if file.is_file() else 'a link to nothing'}")
            elif is_lfs_pointer(file):
                yield WeightsError(f"{file}: a git-lfs pointer; run git lfs pull")
        except WeightsError as error:
            yield error


def is_lfs_pointer(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(19) == b"version https://git"


def without_names(message: str, folder: Path) -> str:
    """A message for others to read: paths are those within the folder of the weights."""
    for place in (f"{folder}/", f"{folder.absolute()}/"):
        message = message.replace(place, "")
    return message.replace(str(Path.home()), "~")


# ---------------------------------------------------------------------------------------------------------- the text


def as_text(report: dict) -> list[str]:
    """The report in lines of at most some hundred characters."""
    device, free, ffmpeg, onnx = (report[name] for name in ("device", "free", "ffmpeg", "onnxruntime"))
    versions = " ".join(f"{name} {version}" for name, version in report["software"].items())
    encoders = ", ".join(f"{name} {'yes' if there else 'NO'}" for name, there in ffmpeg.get("encoders", {}).items())
    builds = ", ".join(f"{name} {version}" for name, version in onnx["builds"].items()) or "not installed"
    lines = [
        f"versions    {versions}",
        f"device      {', '.join(f'{name} {value}' for name, value in device.items() if name != 'defect')}",
        *([f"DEFECT      {device['defect']}"] if "defect" in device else []),
        f"attention   {', '.join(report['attention_backends'])}",
        f"ffmpeg      {ffmpeg.get('missing') or ffmpeg['version'] + ': ' + encoders}",
        f"onnxruntime {builds}: {onnx.get('missing') or ', '.join(onnx['providers'])}",
        f"free        {', '.join(f'{name} {amount} GiB' for name, amount in free.items())}",
        "",
        f"{'model':<28}{'files':<9}memory mode for one video (picture) of the model's own size",
    ]
    for model in report["models"]:
        lines.append(f"{model['name']:<28}{model['state']:<9}{model['memory'] or ''}".rstrip())
        lines += [f"    {problem}" for problem in model["problems"]]
    return lines


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with exit_codes():
        main(parse_args())
