"""An SDXL model on the disk, a folder in Diffusers layout or one file: what of it is read, and whether it is whole.

diffusers fills what is missing with random values and a note; so names and shapes are held against the networks here,
by headers alone, before anything loads.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from configs import load_config
from errors import WeightsError
from models.wan.checkpoint import read_tensors

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
# What Stability's single files put before the names of a part.
IN_ONE_FILE = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}
# Names of older files, which diffusers and transformers still read.
OLDER_NAMES = {
    r"^text_model\.": "",
    r"(attentions\.\d+)\.query\.": r"\1.to_q.",
    r"(attentions\.\d+)\.key\.": r"\1.to_k.",
    r"(attentions\.\d+)\.value\.": r"\1.to_v.",
    r"(attentions\.\d+)\.proj_attn\.": r"\1.to_out.0.",
}


def is_half_precision(folder: Path) -> bool:
    """Whether only the float16 variant of an SDXL repository is here."""
    files = [file.name for file in folder.glob("unet/*.safetensors")]
    return bool(files) and all(".fp16." in name for name in files)


def sdxl_files(path: Path) -> list[Path]:
    """The weights files that are read."""
    if path.is_file():
        return [path]
    half = is_half_precision(path)
    return [file for file in sorted(path.glob("*/*.safetensors")) if (".fp16." in file.name) == half]


def layout_of(path: Path) -> Path:
    """The folder with a model's configurations and tokenizers: of one file those of SDXL 1.0."""
    return Path("checkpoints") / load_config("sdxl-layout")["dest"] if path.is_file() else path


def check_sdxl(path: Path) -> None:
    """Whether all of an SDXL model is here, and each part is the network that its configuration says; by headers.

    Raises:
        WeightsError: it is not; all that is wrong, in one line.
    """
    layout = layout_of(path)
    if not (layout / "model_index.json").is_file():
        if path.is_file():
            raise WeightsError(f"{path}: one file needs the layout of SDXL in {layout}")
        raise WeightsError(f"{path}: not a whole SDXL model (no model_index.json)")
    problems = []
    if path.is_file():
        problems += problems_of_file(path, layout)
    else:
        files = sdxl_files(path)
        if missing := [part for part in PARTS if not any(file.parent.name == part for file in files)]:
            problems.append(f"no weights in {', '.join(missing)}")
        for part in PARTS:
            if part not in missing:
                problems += problems_of_part(path, part, [file for file in files if file.parent.name == part])
    problems += [problem for name in TOKENIZERS for problem in problems_of_tokenizer(layout / name)]
    if problems:
        raise WeightsError(f"{path}: not a whole SDXL model ({'; '.join(problems)})")


def problems_of_part(path: Path, part: str, files: Iterable[Path]) -> list[str]:
    """What is wrong with one part of a folder."""
    try:
        tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
        return differences(part, empty_network(path, part), tensors)
    except WeightsError as error:
        return [str(error).removeprefix(f"{path}/")]


def problems_of_file(path: Path, layout: Path) -> list[str]:
    """What is wrong with one file of Stability's layout. Its text encoders are only looked for."""
    try:
        tensors = read_tensors(path)
        absent = [part for part, start in IN_ONE_FILE.items() if not any(name.startswith(start) for name in tensors)]
        if absent:
            return [f"no {', '.join(absent)} in it"]
        problems = []
        for part, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
            network = empty_network(layout, part)
            try:
                problems += differences(part, network, convert(dict(tensors), config=network.config))
            except KeyError as error:
                problems.append(f"{part}: no {error}")
        return problems
    except WeightsError as error:
        return [str(error).removeprefix(f"{path}: ")]


@functools.lru_cache(maxsize=len(PARTS))
def _network(part: str, config: str) -> nn.Module:
    values = json.loads(config)
    with torch.device("meta"):
        if part in ("unet", "vae"):
            return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(values)
        kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
        return kind(CLIPTextConfig.from_dict(values))


def empty_network(layout: Path, part: str) -> nn.Module:
    """A part as its config.json says it is, on the meta device.

    Raises:
        WeightsError: there is no such file, or it describes none.
    """
    file = layout / part / "config.json"
    try:
        return _network(part, file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{file}: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # any value of it may be wrong, and each fails elsewhere
        raise WeightsError(f"{file}: describes no {part} ({' '.join(str(error).split())[:120]})") from error


def differences(part: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """What a network needs and tensors do not have; what they have besides is left alone, as diffusers does."""
    found = {current_name(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {current_name(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in wanted if name not in found]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape and found[name] != (*shape, 1, 1)  # older linears: 1 x 1 convolutions
    ]
    kinds = {"missing": missing, "of another shape": misshapen}
    said = [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names]
    return [f"{part}: not the weights of {type(network).__name__}: {', '.join(said)}"] if said else []


def current_name(name: str) -> str:
    """A tensor's name as diffusers and transformers have it now."""
    for older, newer in OLDER_NAMES.items():
        name = re.sub(older, newer, name)
    return name


def problems_of_tokenizer(folder: Path) -> list[str]:
    """What is wrong with a CLIP tokenizer: tokenizer.json, or vocab.json and merges.txt."""
    names = ["tokenizer.json"] if not (folder / "vocab.json").exists() else ["vocab.json", "merges.txt"]
    for name in names:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            if not text or (name.endswith(".json") and not isinstance(json.loads(text), dict)):
                raise ValueError("no tokenizer")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return [f"{folder.name}/{name}: {reason.lower()}"]
    return []
