"""The configuration of a training run: frozen dataclasses whose fields say what they accept and who reads them.

    config = read_config("configs/train/tiny-base.yaml", sets=["train.steps=50"])
    config.train.steps                                     # 50
    Path("resolved.yaml").write_text(resolved_yaml(config))        # read back, it is equal

Whatever is wrong in a file is one line with the file, the line in it, the field, its value and what is accepted.
A field that nothing reads under the chosen recipe is refused as well, so that no setting is without effect.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from configs import load_config
from errors import UsageError
from pipelines.networks import shape_of
from training.config_fields import (
    Defaults,
    block,
    build,
    fields_of,
    option,
    refusal,
    resolved,
    value_at,
)
from training.config_file import read_given
from training.config_recipes import (
    DENOISING,
    LARGE,
    RECIPES,
    TRAINABLE,
    Avatar,
    ErrorRecycling,
    StandIn,
    Vace,
    VaeLoss,
)

# ---------------------------------------------------------------------------------------------------- the schema


@dataclass(frozen=True, kw_only=True)
class Model:
    config: str = option("the base model: a name of configs/, or a YAML file")
    expert: str | None = option(
        "which of two networks is trained", None, choices=("high", "low"), only={"recipe": DENOISING}
    )
    base_dtype: str = option(
        "how frozen weights are kept", "bf16", choices=("fp32", "bf16", "fp8"), only={"recipe": DENOISING}
    )
    init_from: str | None = option("weights that what is trained begins from", None, only={"recipe": DENOISING})
    base_path: str | None = option(
        "the base model's file or folder, where it is not in checkpoints/", None, only={"recipe": DENOISING}
    )
    vae_path: str | None = option("the VAE's file", None, only={"recipe": DENOISING})
    text_encoder_path: str | None = option("the text encoder's file", None, only={"recipe": DENOISING})
    tokenizer_path: str | None = option("the tokenizer's folder", None, only={"recipe": DENOISING})
    image_encoder_path: str | None = option("CLIP's file", None, only={"recipe": DENOISING})
    pretrained_wav2vec_path: str | None = option(
        "wav2vec2's folder", None, only={"recipe": ("avatar", "error_recycling")}
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str = option("folder, list or csv of videos")
    layout: str = option("how they lie there", "folder", choices=("folder", "stableavatar", "svi"))
    repeat: int = option("how often an epoch goes over it", 1, low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class Data:
    sources: tuple[Source, ...] = option("where the videos are")
    fps: float | None = option("frames a second that videos must have; null: as they are", 16, low=0.1, high=240)
    frames: tuple[int, ...] = option("lengths of clips, 4n+1", (81,), low=1, high=4093)
    resolutions: tuple[str, ...] = option("HEIGHTxWIDTH of clips", ("480x832",))
    fit: str = option("how a video becomes one of them", "crop", choices=("crop", "resize"))
    bad: str = option("what to do about unusable samples", "refuse", choices=("refuse", "skip"))
    holdout: float = option("share kept for the held-out loss, by content hash", 0.02, low=0, high=0.5)
    text_drop: float = option("how often a prompt is left out", 0.1, low=0, high=1, only={"recipe": DENOISING})
    cache: str | None = option("folder of encoded samples; null: .cache in the first source", None)
    cache_variants: int = option(
        "windows and crops of a video that are encoded", 1, low=1, high=100, only={"recipe": DENOISING}
    )
    workers: int = option("threads that put batches together; 0: none", 2, low=0, high=256)
    prefetch: int = option("steps that they work ahead", 4, low=1, high=1000)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each resolution."""
        return tuple(parse_size(text) for text in self.resolutions)


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    rank: int = option("rank", 32, low=1, high=4096)
    alpha: float = option("scale times rank", 32, low=1e-3, high=1e5)
    targets: tuple[str, ...] = option("layers of a block", ("q", "k", "v", "o", "ffn.0", "ffn.2"))
    init: str = option("how the first factor begins", "kaiming", choices=("kaiming", "gaussian"))
    rslora: bool = option("alpha over the root of the rank", False)


@dataclass(frozen=True, kw_only=True)
class Noise:
    shift: float = option("shift of the noise levels", 5.0, low=0.01, high=100)
    table: int = option("noise levels in the table", 1000, low=1, high=100_000)
    sampling: str = option("how levels are drawn", "uniform", choices=("uniform", "logit_normal", "stratified"))
    range: tuple[float, float] = option("share of the table's indices, from noise on", (0.0, 1.0), low=0, high=1)
    weighting: str = option("how levels weigh in the loss", "bell", choices=("bell", "none"))


@dataclass(frozen=True, kw_only=True)
class Clip:
    norm: float = option("largest norm of the gradient", 1.0, low=1e-6, high=1e6)
    start_ratio: float = option("times that at the first step", 1.0, low=1, high=1000)
    until: int = option("step at which the ratio has come down to 1; 0: no ratio", 0, low=0, high=LARGE)
    abnormal: bool = option("StableAvatar's tighter limit after outliers", False)


@dataclass(frozen=True, kw_only=True)
class Train:
    global_batch: int = option("samples of an optimiser step, all processes together", 1, low=1, high=2**20)
    micro_batch: int = option("samples of one forward pass", 1, low=1, high=4096)
    steps: int = option("optimiser steps", 1000, low=1, high=LARGE)
    trainable: str = option("what is trained", "lora", choices=("adapter", "lora", "full"))
    lora: LoraShape | None = block(only={"train.trainable": ("lora",)})
    noise: Noise | None = block(only={"recipe": DENOISING})
    clip: Clip | None = block()
    max_skips: int = option("updates without a finite gradient before the run stops", 10, low=0, high=LARGE)


WITH_BETAS = ("adamw", "adamw8bit", "prodigy", "schedulefree", "muon")


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: str = option("optimiser", "adamw", choices=("adamw", "adamw8bit", "adafactor", *WITH_BETAS[2:]))
    lr: float = option("learning rate", 1e-4, low=0, high=10)
    betas: tuple[float, float] = option(
        "moments' decay", (0.9, 0.999), low=0, high=0.999999, only={"optim.name": WITH_BETAS}
    )
    eps: float = option("added to the second moment's root", 1e-8, low=0, high=1, only={"optim.name": WITH_BETAS})
    weight_decay: float = option("weight decay", 0.01, low=0, high=10)
    schedule: str = option(
        "the rate after the warm-up", "constant", choices=("constant", "cosine", "linear"),
        only={"optim.name": ("adamw", "adamw8bit", "adafactor", "prodigy", "muon")},
    )  # fmt: skip
    warmup: int = option("steps in which the rate rises from 0", 100, low=0, high=LARGE)
    groups: dict[str, float] | None = option("group of parameters -> multiple of the rate", None, low=0, high=1e4)


@dataclass(frozen=True, kw_only=True)
class Ema:
    decay: float = option("decay of the mean", 0.999, low=0, high=1)
    every: int = option("optimiser steps between its updates", 1, low=1, high=LARGE)
    device: str = option("where it is kept", "cpu", choices=("cpu", "same"))


@dataclass(frozen=True, kw_only=True)
class Memory:
    checkpointing: str = option(
        "what is computed again", "full", choices=("none", "full", "attention"), only={"recipe": DENOISING}
    )
    offload: str = option(
        "what waits in the machine's memory", "none", choices=("none", "checkpoints", "blocks"),
        only={"recipe": DENOISING},
    )  # fmt: skip
    sharding: str = option(
        "zero2: masters, gradients and moments are shared out over the processes", "none", choices=("none", "zero2")
    )
    store_bf16: bool = option("what checkpointing keeps, in bfloat16", False, only={"recipe": DENOISING})
    compile: bool = option("compile the blocks", False, only={"recipe": DENOISING})


@dataclass(frozen=True, kw_only=True)
class Save:
    every: int = option("steps between checkpoints", 500, low=1, high=LARGE)
    minutes: float | None = option("minutes between them at most", 30, low=0.1, high=1e6)
    keep: int = option("how many of the last ones stay", 3, low=1, high=10**6)
    keep_every: int | None = option("those of each so many steps stay too", None, low=1, high=LARGE)


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    prompt: str = option("its prompt")
    reference: str | None = option("the person's photo", None)
    audio: str | None = option("what is said", None)
    image: str | None = option("the first frame", None)
    control: str | None = option("a video that controls it, or its poses", None)
    seed: int = option("its seed", 0, low=0, high=2**63 - 1)
    num_inference_steps: int | None = option("its steps; null: as many as the model's", None, low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class Validate:
    every: int = option("steps between held-out losses", 250, low=1, high=LARGE)
    quantiles: int = option("noise levels of the held-out loss", 9, low=1, high=1000, only={"recipe": DENOISING})
    samples: tuple[ValidationSample, ...] = option("videos that are made", (), only={"recipe": DENOISING})
    videos_every: int | None = option(
        "steps between them; null: at the start and the end alone", None, low=1, high=LARGE, only={"recipe": DENOISING}
    )
    metrics: tuple[str, ...] = option(
        "measures of these videos", (), choices=("face_similarity",), only={"recipe": DENOISING}
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    tensorboard: bool = option("write TensorBoard's files", True)
    wandb: str | None = option("project at Weights & Biases; null: none", None)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a training run. Blocks that the recipe does not read are None."""

    recipe: str = option("what is trained", choices=RECIPES)
    output: str = option("folder of checkpoints and logs")
    seed: int = option("seed of every draw", 0, low=0, high=2**63 - 1)
    model: Model = block()
    data: Data = block()
    train: Train = block()
    optim: Optim = block()
    ema: Ema | None = block(optional=True)
    memory: Memory = block()
    save: Save = block()
    validate: Validate = block()
    log: Log = block()
    deterministic: bool = option("kernels that give the same bits each time", False)
    stand_in: StandIn | None = block(only={"recipe": ("stand_in",)})
    avatar: Avatar | None = block(only={"recipe": ("avatar",)})
    vace: Vace | None = block(only={"recipe": ("vace",)})
    error_recycling: ErrorRecycling | None = block(only={"recipe": ("error_recycling",)})
    vae: VaeLoss | None = block(only={"recipe": ("vae",)})

    places: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Refuse a field by its dotted name, with where it was given.

        Raises:
            UsageError: always.
        """
        raise refusal(name, value_at(self, name), why, self.places)

    def accumulation(self, ranks: int) -> int:
        """Forward passes of each process in an optimiser step.

        Raises:
            UsageError: the global batch cannot be shared out evenly.
        """
        at_once = self.train.micro_batch * ranks
        if self.train.global_batch % at_once:
            nearby = -(-self.train.global_batch // at_once) * at_once
            self.refuse(
                "train.global_batch",
                f"must be a multiple of train.micro_batch x processes = {self.train.micro_batch} x {ranks}; "
                f"give {nearby} for instance",
            )
        return self.train.global_batch // at_once


# What is good under some choices: applied in this order to fields that are not given. Sources: DiffSynth-Studio's
# scripts (base), Stand-In#55 (batch and steps; its learning rate is our guess), StableAvatar's scripts with eps for
# float32, SVI's scripts (svi.md 6.3).
DEFAULTS: Defaults = (
    *(({"recipe": (recipe,)}, {"train.trainable": choices[0]}) for recipe, choices in TRAINABLE.items()),
    ({"train.trainable": ("full",)}, {"train.noise.weighting": "none", "optim.lr": 1e-5}),
    ({"recipe": ("stand_in",)}, {"train.global_batch": 48, "train.steps": 3000}),
    ({"recipe": ("avatar",)}, {
        "data.fps": 25, "data.resolutions": ("512x512",), "data.text_drop": 0.0, "optim.lr": 2e-5,
        "optim.weight_decay": 0.03, "train.clip.norm": 0.05, "train.clip.start_ratio": 5.0, "train.clip.until": 1000,
        "train.clip.abnormal": True, "train.noise.weighting": "none",
    }),
    ({"recipe": ("avatar",), "train.trainable": ("lora",)}, {"train.lora.rank": 128, "train.lora.alpha": 64}),
    ({"recipe": ("error_recycling",)}, {
        "data.fps": None, "data.text_drop": 0.0, "train.lora.rank": 128, "train.lora.alpha": 128,
    }),
    ({"error_recycling.variant": ("film",)}, {"error_recycling.p.clean": 0.5}),
    # Pro's training is not published: one other implementation's shares of first and next clips, and one latent.
    ({"error_recycling.variant": ("pro",)}, {"error_recycling.p.motion": 0.75, "error_recycling.image_frames": 1}),
    ({"error_recycling.variant": ("dance",)}, {
        "error_recycling.image_frames": 1, "data.resolutions": ("832x480",),
    }),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading


def read_config(path: str | Path | None, sets: Sequence[str] = (), recipe: str | None = None) -> Config:
    """The configuration in a YAML file, with single fields set over it.

    Args:
        path: a YAML file, or a name of configs/train/; None: everything comes from `sets`.
        sets: "train.steps=50", as --set is given.
        recipe: what the file has to be of, or need not say itself.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    config = build(Config, read_given(path, sets, fields_of(Config), recipe), DEFAULTS)
    check_together(config)
    return config


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML; `read_config` makes an equal one of it."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


# ---------------------------------------------------------------------------------------------------- what must fit


def parse_size(text: str) -> tuple[int, int]:
    """ "480x832" -> (480, 832), height and width.

    Raises:
        ValueError: not such a text, or sides that latents of two by two tokens cannot have.
    """
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not match or any(side % 16 for side in size) or not min(size):
        raise ValueError("accepted are HEIGHTxWIDTH of multiples of 16, 480x832 for instance")
    return size


def check_together(config: Config) -> None:
    """What a field cannot tell alone.

    Raises:
        UsageError: fields that do not fit together, or a base model that this recipe cannot train.
    """
    train, data = config.train, config.data
    for number in data.frames:
        if number % 4 != 1:
            nearest = 4 * round((number - 1) / 4) + 1
            config.refuse("data.frames", f"{number} is not 4n+1; the nearest is {nearest}")
    try:
        sizes = data.sizes
    except ValueError as error:
        config.refuse("data.resolutions", str(error))
    if len(set(sizes)) < len(sizes) or len(set(data.frames)) < len(data.frames):
        config.refuse("data.resolutions" if len(set(sizes)) < len(sizes) else "data.frames", "one is there twice")
    for name in ("data.sources", "data.frames", "data.resolutions"):
        if not value_at(config, name):
            config.refuse(name, "at least one is needed")
    if train.trainable not in TRAINABLE[config.recipe]:
        accepted = ", ".join(TRAINABLE[config.recipe])
        config.refuse("train.trainable", f"recipe {config.recipe} trains {accepted}")
    config.accumulation(1)
    for name in ("train.noise.range", "stand_in.similarity"):
        if (pair := value_at(config, name)) is not None and not pair[0] < pair[1]:
            config.refuse(name, "the first number must be below the second")
    if config.avatar is not None:
        shares = dataclasses.astuple(config.avatar.masks)
        if not math.isclose(sum(shares), 1, abs_tol=1e-6):
            config.refuse("avatar.masks.full", f"full, face and lip must add up to 1, they are {sum(shares):g}")
    if train.clip.start_ratio != 1 and not train.clip.until:
        config.refuse("train.clip.start_ratio", "nothing reads it where train.clip.until is 0; give a step")
    if config.validate.metrics and not config.validate.samples:
        config.refuse("validate.metrics", "nothing reads it without validate.samples; give a prompt there")
    if config.validate.videos_every and not config.validate.samples:
        config.refuse("validate.videos_every", "nothing reads it without validate.samples; give a prompt there")
    check_model(config)


def check_model(config: Config) -> None:
    """Whether the base model is one that exists, and its experts and latents fit.

    Raises:
        UsageError: they do not.
    """
    try:
        base = load_config(config.model.config)
    except UsageError as error:
        config.refuse("model.config", str(error).removeprefix(f"config {config.model.config}: "))
    if base.get("variant") is None and not base.get("tiny"):
        config.refuse("model.config", "is no base model; give one that infer.py can load, wan2.1-t2v-1.3B for instance")
    experts = len(base.get("experts") or ())
    if experts == 2 and config.model.expert is None and config.recipe != "vae":
        config.refuse("model.expert", f"{config.model.config} has two experts, each is trained by itself: high or low")
    if experts != 2 and config.model.expert is not None:
        config.refuse("model.expert", f"{config.model.config} has one network; leave it out")
    shape = shape_of(base)
    sees_pictures = shape.in_dim > shape.out_dim
    if config.recipe in ("avatar", "error_recycling") and not sees_pictures:
        config.refuse("model.config", f"recipe {config.recipe} trains image-to-video models, this one begins from text")
    variant = config.error_recycling.variant if config.error_recycling is not None else None
    if variant == "pro" and experts != 2:
        config.refuse("error_recycling.variant", "is of Wan2.2's two experts; give model.config wan2.2-i2v-A14B")
    if config.recipe in ("stand_in", "vace") and sees_pictures:
        why = f"recipe {config.recipe} trains text-to-video models, this one begins from a picture"
        config.refuse("model.config", why)
    if config.recipe == "vace" and "vace" not in base:
        config.refuse("model.config", "says nothing of a VACE branch; give wan2.1-vace-1.3B, wan2.1-vace-14B or tiny")
    if config.recipe == "vace" and shape.out_dim != 16:
        config.refuse("model.config", "VACE's context is of 16 latent channels, this model has others")
    check_paths(config, is_tiny=bool(base.get("tiny")), sees_clip=shape.image_dim is not None)
    multiple = 2 * shape.vae_spatial_factor
    for size in config.data.sizes:
        if any(side % multiple for side in size):
            config.refuse("data.resolutions", f"{config.model.config} wants multiples of {multiple}")


def check_paths(config: Config, is_tiny: bool, sees_clip: bool) -> None:
    """
    Raises:
        UsageError: a file that the model would not read.
    """
    model = config.model
    for field in dataclasses.fields(model):
        is_file = field.name.endswith("_path") and field.name != "base_path"
        if is_file and getattr(model, field.name) is not None and is_tiny and model.base_path is None:
            config.refuse(f"model.{field.name}", "a tiny model is made from its seed; give model.base_path too")
    if model.image_encoder_path is not None and not sees_clip:
        config.refuse("model.image_encoder_path", f"{model.config} has no CLIP; leave it out")
    recycling = config.error_recycling
    if model.pretrained_wav2vec_path is not None and recycling is not None and recycling.variant != "talk":
        config.refuse("model.pretrained_wav2vec_path", "of error_recycling only variant talk hears; leave it out")
