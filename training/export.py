"""What was trained as files that the scripts take, under the released names.

lora.safetensors             --lora_path of every script, ComfyUI too (SVI-Dance's has its pose embedder inside)
stand_in.safetensors         --stand_in_path
vace.safetensors             --vace_path, the branch without its base
vae.safetensors              --vae_path, in Diffusers' names
transformer.safetensors      --base_path, or --transformer_path of infer_audio_avatar.py with the adapter inside
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.pose_embedder import KEY
from preprocess.output import whole_file
from training.recipes.vae import VaeTrainee
from training.trainee import Trainee, lora_layers, lora_tensors


def exported_files(trainee: Trainee | VaeTrainee) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors, of all that is trained."""
    if isinstance(trainee, VaeTrainee):
        state = trainee.autoencoder.state_dict()
        return {"vae.safetensors": {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}}
    trained = {name.split(".")[0] for name, parameter in trainee.named_parameters() if parameter.requires_grad}
    transformer, files = trainee.transformer, {}
    has_lora = bool(lora_layers(transformer))
    if has_lora:
        files["lora.safetensors"] = lora_tensors(transformer)
        if "pose_embedder" in trained:
            own = trainee.pose_embedder.state_dict()
            files["lora.safetensors"] |= {f"{KEY}{name}": tensor for name, tensor in own.items()}
    if "stand_in" in trained:
        files["stand_in.safetensors"] = trainee.stand_in.weights().state_dict()
    if "vace" in trained:
        files["vace.safetensors"] = trainee.vace.state_dict()
    if "audio_adapter" in trained or ("transformer" in trained and not has_lora):
        files["transformer.safetensors"] = base_tensors(transformer)
    if "audio_adapter" in trained:
        files["transformer.safetensors"] |= trainee.audio_adapter.state_dict()
    return {name: {key: t.detach().cpu().contiguous() for key, t in tensors.items()} for name, tensors in files.items()}


def base_tensors(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """A transformer's weights under original names, without the LoRA that may lie in it."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in transformer.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def export(trainee: Trainee | VaeTrainee, folder: Path, about: Mapping[str, str]) -> list[Path]:
    """Write the files. about: what made them, in their headers.

    Raises:
        OSError: no room, or no right to write there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, tensors in exported_files(trainee).items():
        with whole_file(folder / name) as part:
            save_file(tensors, part, metadata=dict(about))
        paths.append(folder / name)
    return paths
