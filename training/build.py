"""From a configuration to what the loop works on: the recipe, the trainee with what is trained in it, optimiser, bank.

recipe = recipe_of(config)
trainee = load_trainee(config, device)
run = Run(config, partial(denoising_step, recipe, trainee), …, *optimizer_of(config, trainee))
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan

from configs import download_command, load_config, part_path
from models.audio_adapter import AudioAdapter, load_audio_avatar
from models.identity.stand_in import load_stand_in
from models.lora import Lora
from models.multitalk import load_multitalk
from models.pose_embedder import KEY, PoseEmbedder, load_pose_embedder
from models.vace import VaceBranch, load_vace, load_vace_branch
from models.wan.attention import PlainAttention, WanAttention
from models.wan.checkpoint import load_transformer, read_tensors
from models.wan.float8 import use_float8
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.networks import shape_of
from training.block_memory import set_checkpointing
from training.config import Config
from training.error_bank import ErrorBank
from training.noise import NoiseTable, expert_range
from training.optimizers import Masters, make_optimizer, parameter_groups
from training.recipes.avatar import AvatarRecipe
from training.recipes.base import BaseRecipe, Recipe
from training.recipes.error_recycling import ErrorRecyclingRecipe
from training.recipes.stand_in import StandInRecipe
from training.recipes.vace import VaceRecipe, new_branch
from training.recipes.vae import VaeRecipe, VaeTrainee, load_lpips
from training.sharding import ShardedMasters
from training.trainee import TrainableStandIn, Trainee, add_lora, copy_lora, select_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # that the network computes in
STAND_IN_RANK = 128  # of the released weights


# -------------------------------------------------------------------------------------------------------- recipes


def noise_table_of(config: Config) -> NoiseTable:
    """The noise levels of a run. An expert of Wan2.2 has its part of the table, unless a range was given."""
    noise = config.train.noise
    given = {"shift": noise.shift, "size": noise.table, "sampling": noise.sampling, "weighting": noise.weighting}
    first, last = noise.range
    if config.model.expert is not None and (first, last) == (0.0, 1.0):
        boundary = load_config(config.model.config)["boundary"]
        first, last = expert_range(config.model.expert, boundary, NoiseTable(**given))
    try:
        return NoiseTable(**given, first=first, last=last)
    except ValueError as error:
        config.refuse("train.noise.range", str(error))


def recipe_of(config: Config) -> Recipe | VaeRecipe:
    """The recipe with its settings.

    Raises:
        UsageError: a range without noise levels; LPIPS without its package.
    """
    if config.vae is not None:
        terms = config.vae
        perceptual = load_lpips() if terms.lpips else None
        return VaeRecipe(l1=terms.l1, edges=terms.edges, kl=terms.kl, lpips=terms.lpips, perceptual=perceptual)
    shared = {"noise": noise_table_of(config), "text_drop": config.data.text_drop}
    if (own := config.stand_in) is not None:
        return StandInRecipe(
            **shared, reference_noise=own.noise, reference_drop=own.reference_drop, face_loss=own.face_loss
        )
    if (own := config.avatar) is not None:
        return AvatarRecipe(
            **shared,
            audio_drop=own.audio_drop,
            clip_level=own.clip_level,
            clip_drop=own.clip_drop,
            motion_loss=own.motion_loss,
            motion_axis=own.motion_axis,
            masks=(own.masks.full, own.masks.face),
        )
    if (own := config.vace) is not None:
        return VaceRecipe(**shared, masked_loss=own.masked_loss)
    if (own := config.error_recycling) is not None:
        return ErrorRecyclingRecipe(
            **shared,
            variant=own.variant,
            noise_error=own.p.noise,
            image_error=own.p.image,
            video_error=own.p.video,
            clean=own.p.clean,
            clean_update=own.clean_update,
            motion=own.p.motion,
            condition_drop=own.p.condition_drop,
            grids=own.grids,
            modulate=own.modulate,
            image_frames=own.image_frames,
        )
    return BaseRecipe(**shared)


# -------------------------------------------------------------------------------------------------------- trainee


def load_trainee(config: Config, device: torch.device) -> Trainee:
    """The networks on their device, with what trains selected.

    Raises:
        WeightsError: files that are missing or of another model.
        UsageError: fp8 for weights that are all trained; LoRA targets that do not exist.
    """
    return make_trainee(config, *load_networks(config, load_config(config.model.config)), device)


def make_trainee(
    config: Config, transformer: WanTransformer, adapters: Mapping[str, torch.nn.Module], device: torch.device
) -> Trainee:
    """The networks with the run's LoRA, with what trains selected, and with its way of keeping what backward needs.

    Raises:
        UsageError: LoRA targets that do not exist.
    """
    if config.train.trainable == "lora":
        shape, before = config.train.lora, None
        if config.model.init_from is not None and config.avatar is None:
            before = Lora.from_tensors(lora_part(config.model.init_from), transformer, source=config.model.init_from)
        add_lora(
            transformer,
            rank=shape.rank,
            alpha=shape.alpha,
            targets=shape.targets,
            init=shape.init,
            rslora=shape.rslora,
            seed=config.seed,
        )
        if before is not None:
            copy_lora(before, transformer)
    trainee = Trainee(transformer, **adapters).to(device)
    recipe = recipe_of(config)
    select_trained(trainee, lambda name: recipe.trains(name, config.train.trainable))
    memory = config.memory
    if device.type == "cpu" and memory.checkpointing == "none":
        attend_plainly(transformer)
    set_checkpointing(transformer, memory.checkpointing, memory.offload == "checkpoints", memory.store_bf16)
    return trainee


def attend_plainly(transformer: WanTransformer) -> None:
    """Attention by matrix products: the faster way to train small models on a CPU."""
    for layer in transformer.modules():
        if isinstance(layer, WanAttention):
            layer.set_processor(PlainAttention())


def lora_part(path: str) -> dict[str, torch.Tensor]:
    """A LoRA's tensors; an SVI-Dance file has its pose embedder among them."""
    return {name: tensor for name, tensor in read_tensors(path).items() if KEY not in name}


def load_networks(config: Config, base: dict) -> tuple[WanTransformer, dict[str, torch.nn.Module]]:
    """The transformer, and the adapters of the recipe beside it."""
    dtype, init_from = DTYPES[config.model.base_dtype], config.model.init_from
    is_whole = config.train.trainable == "full"
    if config.model.base_dtype == "fp8" and is_whole:
        config.refuse("model.base_dtype", "all weights train, and fp8 is for those that stay as they are; give bf16")
    if config.avatar is not None:
        transformer, adapter = load_avatar(config, base, dtype)
        return transformer, {"audio_adapter": adapter}
    if config.vace is not None:
        transformer, branch = load_vace_networks(config, base, dtype)
        return transformer, {"vace": branch}
    path = Path(init_from) if is_whole and init_from is not None else None
    transformer = load_base(config, base, dtype, path)
    if config.stand_in is not None:
        return transformer, {"stand_in": load_trainable_stand_in(config, base, transformer)}
    variant = config.error_recycling.variant if config.error_recycling is not None else None
    if variant == "talk":
        return transformer, {"multitalk": load_audio_layers(base, transformer, dtype)}
    if variant == "dance":
        return transformer, {"pose_embedder": load_pose(config, base, transformer)}
    return transformer, {}


def is_tiny(config: Config, base: dict) -> bool:
    """Whether the base is made from a seed."""
    return bool(base.get("tiny")) and config.model.base_path is None


def load_base(config: Config, base: dict, dtype: torch.dtype, path: Path | None = None) -> WanTransformer:
    """The base transformer, or the expert that is trained. path: of other weights for it."""
    expert = ("high", "low").index(config.model.expert) if config.model.expert else 0
    fp8 = config.model.base_dtype == "fp8"
    if path is None and is_tiny(config, base):
        transformer = tiny.tiny_transformer(base, expert).set_compute_dtype(dtype)
        return use_float8(transformer) if fp8 else transformer
    path, hint = path or transformer_path(config, base), download_command(release_of(base))
    return load_transformer(path, dtype=dtype, expect=shape_of(base), fp8=fp8, hint=hint)


def transformer_path(config: Config, base: dict) -> Path:
    """Where the base transformer's weights are looked for."""
    path = Path(config.model.base_path or Path("checkpoints") / release_of(base).get("dest", ""))
    expert = config.model.expert
    if (path / "model_index.json").is_file():  # a Diffusers repository
        return path / ("transformer_2" if expert == "low" else "transformer")
    return path / base["experts"][expert] if expert is not None and path.is_dir() else path


def release_of(config: dict) -> dict:
    """The config whose download holds the transformer."""
    while "transformer" not in config.get("files", {}) and config.get("base"):
        config = config["base"]
    return config


def load_avatar(config: Config, base: dict, dtype: torch.dtype) -> tuple[WanTransformer, AudioAdapter]:
    """A transformer and its adapter: of an avatar's file, or a plain image-to-video base with an adapter that begins
    silent, as every training from the start does.
    """
    path = config.model.init_from
    if path is None and {"square", "rectangle"} & base.get("files", {}).keys():
        is_square = all(height == width for height, width in config.data.sizes)
        path = part_path(base, "square" if is_square else "rectangle")
    if path is not None:
        return load_audio_avatar(path, dtype=dtype, expect=shape_of(base), hint=download_command(base))
    transformer = load_base(config, base, dtype)
    transformer.rounds_time_embedding = True
    if is_tiny(config, base):
        return transformer, tiny.tiny_audio_adapter(base).set_compute_dtype(dtype)
    shape = transformer.config
    torch.manual_seed(config.seed)  # of the adapter's own start; no later number depends on it
    return transformer, AudioAdapter(dim=shape.dim, num_layers=shape.num_layers).set_compute_dtype(dtype)


def load_vace_networks(config: Config, base: dict, dtype: torch.dtype) -> tuple[WanTransformer, VaceBranch]:
    """A base and its branch: the released one where one file holds both, or that of model.init_from; a tiny model's is
    new, and begins without an effect.
    """
    layers, init_from = base["vace"]["vace_layers"], config.model.init_from
    options = {"dtype": dtype, "hint": download_command(release_of(base)), "fp8": config.model.base_dtype == "fp8"}
    if not is_tiny(config, base) and init_from is None:
        path = transformer_path(config, base)
        return load_vace(path, expect=shape_of(base), vace_layers=layers, **options)
    transformer = load_base(config, base, dtype)
    if init_from is not None:
        return transformer, load_vace_branch(init_from, transformer, vace_layers=layers, **options)
    return transformer, new_branch(transformer, layers, config.seed)


def load_trainable_stand_in(config: Config, base: dict, transformer: WanTransformer) -> TrainableStandIn:
    """Stand-In's LoRAs, fresh or from released or earlier weights."""
    if config.model.init_from is not None:
        return TrainableStandIn.of(load_stand_in(config.model.init_from, transformer))
    rank = base["stand_in"]["rank"] if is_tiny(config, base) else STAND_IN_RANK
    return TrainableStandIn(transformer.config.dim, transformer.config.num_layers, rank, config.seed)


def load_audio_layers(base: dict, transformer: WanTransformer, dtype: torch.dtype) -> torch.nn.Module:
    """MultiTalk's layers, which Talk hears by and does not train."""
    if base.get("tiny"):
        return tiny.tiny_multitalk(base).set_compute_dtype(dtype)
    release = load_config("multitalk")
    return load_multitalk(part_path(release, "multitalk"), transformer, dtype=dtype, hint=download_command(release))


def load_pose(config: Config, base: dict, transformer: WanTransformer) -> PoseEmbedder:
    """Dance's pose embedder: from the file that the LoRA begins from, else fresh."""
    if config.model.init_from is not None:
        return load_pose_embedder(config.model.init_from, transformer.config.dim)
    if is_tiny(config, base):
        return tiny.tiny_pose_embedder(base)
    torch.manual_seed(config.seed)
    return PoseEmbedder(transformer.config.dim)


def load_vae_trainee(config: Config, device: torch.device) -> VaeTrainee:
    """The VAE of a tiny model, all of it trained."""
    base = load_config(config.model.config)
    autoencoder = tiny.fill_from_seed(AutoencoderKLWan(**base["vae"]), base["seed"] + 1)
    trainee = VaeTrainee(autoencoder, DTYPES[config.vae.compute_dtype]).to(device)
    select_trained(trainee, lambda name: True)
    return trainee


# ------------------------------------------------------------------------------------------------ optimiser, bank


def optimizer_of(config: Config, trainee: torch.nn.Module) -> tuple[Masters | ShardedMasters, torch.optim.Optimizer]:
    """The float32 masters of what is trained, and what moves them.

    Raises:
        UsageError: a package that is not installed; a group without parameters.
    """
    optim = config.optim
    sharded = config.memory.sharding == "zero2" and dist.is_initialized() and dist.get_world_size() > 1
    masters = (ShardedMasters if sharded else Masters)(trainee.named_parameters())
    groups = parameter_groups(masters.values, optim.lr, optim.weight_decay, optim.groups, masters.parameters)
    options = {"betas": optim.betas, "eps": optim.eps} if optim.betas is not None else {}
    return masters, make_optimizer(optim.name, groups, warmup=optim.warmup, **options)


def bank_of(config: Config, rank: int, local_rank: int) -> ErrorBank | None:
    """The error bank of a run that recycles errors. With one bank for all, each machine has a copy, which its first
    process writes; machines may share a disk, so that each has a folder of its own.
    """
    own = config.error_recycling
    if own is None:
        return None
    per_rank, machine = own.scope == "per_rank", os.environ.get("GROUP_RANK", "0")  # torchrun's number of the machine
    return ErrorBank(
        Path(config.output) / (f"bank-{rank}" if per_rank else "bank" if machine == "0" else f"bank.machine{machine}"),
        grids=own.grids,
        per_grid=own.per_grid,
        replace=own.replace,
        storage=own.storage,
        dtype=own.dtype,
        pool=own.pool,
        limit_gib=own.limit_gib,
        writes=per_rank or local_rank == 0,
    )
