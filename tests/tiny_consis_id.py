"""A ConsisID release of tiny random networks, in the released layout."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, ConsisIDTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from models.identity.consis_id import ConsisIDTransformer, make_extractor, split_config
from models.identity.eva_clip import EvaVisionTower
from pipelines.consis_id.face import EVA_FILE, RETINAFACE_FILE
from preprocess.retinaface import RetinaFace
from tests.tiny_face import write_antelopev2

TEXT_DIM, VIT_DIM, EMBED_DIM = 16, 64, 24
TRANSFORMER = {
    "_class_name": "ConsisIDTransformer3DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 4,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 12,
    "use_rotary_positional_embeddings": True,
    "is_train_face": True,
    "is_kps": False,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 512 + EMBED_DIM,
    "LFE_vit_dim": VIT_DIM,
    "LFE_depth": 5,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 3,
    "LFE_num_querie": 4,
    "LFE_output_dim": 32,  # two thirds of 3 heads x 16
    "LFE_ff_mult": 2,
    "LFE_num_scale": 5,
    "local_face_scale": 1.0,
}
VERSION_15 = {"patch_size_t": 2, "ofs_embed_dim": 8, "patch_bias": False}
VAE = {
    "_class_name": "AutoencoderKLCogVideoX",
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "block_out_channels": [4, 4, 4, 4],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 96,  # of tiles twice their size: 6 x 5 latents, which the overlaps of 1/6 and 1/5 divide
    "sample_width": 80,
}
SCHEDULER = {
    "_class_name": "CogVideoXDPMScheduler",
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


def write_release(root: Path, version: str = "1.0", **changes) -> Path:
    """A release in `root`, as ConsisID-preview or ConsisID-1.5; `changes` are of the transformer's config."""
    torch.manual_seed(0)
    is_15 = version == "1.5"
    write_transformer(root / "transformer", TRANSFORMER | (VERSION_15 if is_15 else {}) | changes)
    vae = VAE | ({"invert_scale_latents": True, "scaling_factor": 0.7} if is_15 else {})
    write_part(root / "vae", "diffusion_pytorch_model", vae, AutoencoderKLCogVideoX.from_config(vae))
    config = T5Config(
        vocab_size=60, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    write_part(root / "text_encoder", "model", config.to_dict(), T5EncoderModel(config))
    write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_tokenizer(root / "tokenizer")

    tower = EvaVisionTower(width=VIT_DIM, num_layers=21, hidden_dim=96, embed_dim=EMBED_DIM, grid=2)
    folder = root / "face_encoder"
    folder.mkdir()
    clip = {f"visual.{name}": tensor for name, tensor in randomise(tower).state_dict().items()}
    torch.save(clip | {"text.positional_embedding": torch.zeros(2)}, folder / EVA_FILE)
    blind = RetinaFace().state_dict()  # all zeros: as likely a face as not, everywhere
    torch.save({f"module.{name}": torch.zeros_like(tensor) for name, tensor in blind.items()}, folder / RETINAFACE_FILE)
    write_antelopev2(folder)
    return root


def write_transformer(folder: Path, config: dict) -> None:
    """With the released names; of version 1.0 by diffusers' own class, which knows no other."""
    if "patch_size_t" not in config:
        names = {key: value for key, value in config.items() if key != "_class_name"}
        return write_part(folder, "diffusion_pytorch_model", config, ConsisIDTransformer3DModel(**names))
    face, rest = split_config(config)
    tensors = {f"local_facial_extractor.{n}": t for n, t in randomise(make_extractor(face)).state_dict().items()}
    for name, tensor in randomise(ConsisIDTransformer(face, **rest)).state_dict().items():
        block, is_face, last = name.partition(".face_attention.")
        if is_face:
            number = int(block.split(".")[1]) // face.cross_attn_interval
            name = f"perceiver_cross_attention.{number}.{last}"
        tensors[name] = tensor
    write_json(folder / "config.json", config)
    return save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def write_part(folder: Path, name: str, config: dict, model: nn.Module) -> None:
    write_json(folder / "config.json", config)
    tensors = {key: tensor.clone() for key, tensor in randomise(model).state_dict().items()}
    save_file(tensors, folder / f"{name}.safetensors")


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter drawn, norms around one: nothing is left at a value that hides a mistake."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim > 1:
            noise = noise / parameter[0].numel() ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = 0.1 * noise
        parameter.data = noise
    return model


def write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of the alphabet, with T5's first ids."""
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "a woman smiles"] * 20),
        model_writer=model,
        vocab_size=48,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
