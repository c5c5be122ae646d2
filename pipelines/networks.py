"""What a config says of its networks, held against what can be built and fits together. Without torch."""

import os
from pathlib import Path

from configs.values import check_fields, check_keys, nearest
from errors import UsageError
from models.wan.config import VARIANTS, WanConfig

PROJECT = Path(__file__).parent.parent
LARGEST = 2**14  # no width or length is larger; Wan 14B's widest layer has 13824
LARGEST_SEED = 2**40
LONGEST_TEXT = 512  # tokens: where prompts are cut
# What the VAE of a tiny model may say, all that diffusers' AutoencoderKLWan takes; and what each other part has to say.
VAE: dict[str, object] = {
    **dict.fromkeys(("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels"), int),
    **dict.fromkeys(("decoder_base_dim", "patch_size", "scale_factor_temporal", "scale_factor_spatial"), int | None),
    **dict.fromkeys(("attn_scales", "latents_mean", "latents_std"), list[float]),
    "dim_mult": list[int],
    "temperal_downsample": list[bool],
    "dropout": float,
    "is_residual": bool,
}
PARTS: dict[str, dict[str, object]] = {
    "text_encoder": dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads", "num_layers"), int),
    "image_encoder": dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
        int,
    ),
    "audio_encoder": {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), int),
        "conv_dim": list[int],
        **dict.fromkeys(("num_conv_pos_embeddings", "num_conv_pos_embedding_groups"), int),
    },
    "stand_in": {"rank": int},
    "vace": {"vace_layers": list[int]},
    "multitalk": dict.fromkeys(("audio_dim", "hidden_dim", "num_tokens", "token_dim"), int),
}
SPEECH_CONVOLUTIONS = 7  # wav2vec2 has so many; their strides and kernels are the released ones


def shape_of(config: dict) -> WanConfig:
    """The transformer of a config.

    Raises:
        UsageError: an unknown variant, or fields that make no transformer.
    """
    if "variant" in config:
        if config["variant"] not in VARIANTS:
            hint = nearest(config["variant"], VARIANTS) or f"; accepted are {', '.join(VARIANTS)}"
            raise UsageError(f"config {config['name']}: variant is {config['variant'][:60]!r}{hint}")
        return VARIANTS[config["variant"]]
    where = f"config {config['name']}: transformer"
    fields = check_fields(config["transformer"], WanConfig, where)
    check_sizes({name: value for name, value in fields.items() if name != "eps"}, where)
    shape = WanConfig(**fields)
    if not 0 < shape.eps < 1:
        raise UsageError(f"{where}: eps is {shape.eps:g}, accepted are numbers above 0, below 1")
    if shape.patch_size != (1, 2, 2):
        raise UsageError(f"{where}: patch_size is {list(shape.patch_size)[:5]}, accepted is [1, 2, 2]")
    if shape.dim % (2 * shape.num_heads):
        raise UsageError(f"{where}: dim {shape.dim} does not divide into {shape.num_heads} heads of an even width")
    if shape.freq_dim % 2:
        raise UsageError(f"{where}: freq_dim is {shape.freq_dim}, an even number is needed")
    if shape.out_dim not in (16, 48):
        raise UsageError(f"{where}: out_dim is {shape.out_dim}; Wan's VAEs have 16 or 48 channels")
    if shape.in_dim not in (shape.out_dim, 2 * shape.out_dim + 4):
        raise UsageError(
            f"{where}: in_dim is {shape.in_dim}, accepted are {shape.out_dim} (from text) and "
            f"{2 * shape.out_dim + 4} (from a picture)"
        )
    return shape


def check_networks(config: dict) -> None:
    """Whether the transformer of a Wan config, and the other parts of a tiny one, can be built and fit together.

    Raises:
        UsageError: naming the part and what does not fit.
    """
    where, shape = f"config {config['name']}", shape_of(config)
    if not config.get("tiny"):
        return
    needed = ["seed", "transformer", "vae", "text_encoder", "tokenizer"]
    needed += ["image_encoder"] if shape.image_dim is not None else []
    if missing := [part for part in needed if part not in config]:
        raise UsageError(f"{where}: a tiny model without {', '.join(missing)}; see configs/tiny.yaml")
    if "variant" in config:
        raise UsageError(f"{where}: a tiny model has a transformer of its own; leave variant out")
    if not 0 <= config["seed"] <= LARGEST_SEED:
        raise UsageError(f"{where}: seed is out of bounds; accepted are 0 to {LARGEST_SEED}")
    if not os.path.isfile(PROJECT / config["tokenizer"] / "tokenizer.json"):
        raise UsageError(f"{where}: tokenizer: no tokenizer.json in {config['tokenizer'][:200]}")
    for part, accepted in PARTS.items():
        if part in config:
            values = check_keys(config[part], accepted, f"{where}: {part}")
            if missing := [name for name in accepted if name not in values]:
                raise UsageError(f"{where}: {part} without {', '.join(missing)}; see configs/tiny*.yaml")
            if part != "vace":
                check_sizes(values, f"{where}: {part}")
    check_sizes(check_keys(config["vae"], VAE, f"{where}: vae"), f"{where}: vae")
    if shape.text_len < LONGEST_TEXT:
        raise UsageError(f"{where}: transformer: text_len is {shape.text_len}, {LONGEST_TEXT} is the least")
    check_fit(config, shape, where)


def check_sizes(values: dict, where: str) -> None:
    """Whether all whole numbers are sizes of something: 1 to `LARGEST`."""
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= LARGEST:
                raise UsageError(f"{where}: {name} is out of bounds; accepted are 1 to {LARGEST}")


def check_fit(config: dict, shape: WanConfig, where: str) -> None:
    """Whether the parts of a tiny model fit together."""
    same = [("vae: z_dim", config["vae"].get("z_dim"), "transformer: out_dim", shape.out_dim)]
    same.append(("text_encoder: d_model", config["text_encoder"]["d_model"], "transformer: text_dim", shape.text_dim))
    heads = []
    if picture := config.get("image_encoder"):
        heads.append(("image_encoder", picture["hidden_size"], picture["num_attention_heads"]))
        if shape.image_dim is not None:
            width = picture["hidden_size"]
            same.append(("image_encoder: hidden_size", width, "transformer: image_dim", shape.image_dim))
        if picture["image_size"] % picture["patch_size"]:
            raise UsageError(f"{where}: image_encoder: image_size is no multiple of patch_size")
        tokens = 2 * (1 + (picture["image_size"] // picture["patch_size"]) ** 2)
        if shape.image_tokens is not None:
            same.append(("transformer: image_tokens", shape.image_tokens, "two pictures of image_encoder", tokens))
    if sound := config.get("audio_encoder"):
        heads.append(("audio_encoder", sound["hidden_size"], sound["num_attention_heads"]))
        same.append(("audio_encoder: conv_dim", len(sound["conv_dim"]), "the layers of wav2vec2", SPEECH_CONVOLUTIONS))
        if sound["hidden_size"] % sound["num_conv_pos_embedding_groups"]:
            raise UsageError(f"{where}: audio_encoder: hidden_size is no multiple of num_conv_pos_embedding_groups")
        if heard := config.get("multitalk"):
            states = sound["num_hidden_layers"] * sound["hidden_size"]
            same.append(("multitalk: audio_dim", heard["audio_dim"], "audio_encoder's layers x hidden_size", states))
    for name, value, other, expected in same:
        if value != expected:
            raise UsageError(f"{where}: {name} is {value}, but {other} is {expected}")
    for part, width, number in heads:
        if width % number:
            raise UsageError(f"{where}: {part}: {width} does not divide into {number} heads")
    layers = config.get("vace", {}).get("vace_layers", [0])
    if layers != sorted(set(layers)) or not layers or not 0 <= layers[0] <= layers[-1] < shape.num_layers:
        raise UsageError(f"{where}: vace_layers: numbers of blocks are accepted, 0 to {shape.num_layers - 1}, rising")


def family_of(config: dict) -> str:
    """What a config's model starts from: "t2v", "i2v", "flf2v", "fun" (image-to-video of VideoX-Fun), "ti2v"."""
    if "variant" in config:
        return config["variant"].split("-")[0]
    shape = shape_of(config)
    if shape.image_tokens is not None:
        return "flf2v"
    if shape.in_dim != shape.out_dim:
        return "i2v"
    return "ti2v" if shape.vae_spatial_factor == 16 else "t2v"


def has_identity(config: dict) -> bool:
    """Whether the config comes with Stand-In weights; there are none for models that start from a picture."""
    is_there = "stand_in" in config or "stand_in" in config.get("files", {})
    return is_there and family_of(config) == "t2v"
