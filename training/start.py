"""A training run from its configuration to its files: data, networks, the loop, what the scripts take."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from configs import load_config
from pipelines.distributed import LONGEST_WAIT, choose_device
from pipelines.record import hash_of_weights
from training.batches import Batches, BatchMaker, build_cache, moved
from training.build import bank_of, is_tiny, load_trainee, load_vae_trainee, optimizer_of, recipe_of, transformer_path
from training.cache import Cache
from training.checkpoint import latest_checkpoint
from training.config import Config, resolved_yaml
from training.config_fields import resolved
from training.data import TrainingSet, cache_folder, read_samples
from training.draws import Draws
from training.ema import Ema
from training.encoders import encoders_of
from training.encodings import encodings_of
from training.error_bank import BankView, RecycledError
from training.estimate import flop_of
from training.export import export
from training.log import import_wandb, loggers_of
from training.loop import Run, train, wait, weights_to_use
from training.recipes.base import Batch, Recipe, denoising_step
from training.recipes.vae import VaeRecipe, vae_step
from training.validation_videos import check_samples, make_videos

logger = logging.getLogger("selfsame")

# Dropouts and curricula: all of them off while a held-out loss is taken.
DROPS = (
    *("text_drop", "audio_drop", "clip_drop", "clip_level", "reference_drop", "condition_drop"),
    *("face_loss", "masked_loss"),
)


def start(config: Config) -> list[Path]:
    """Train as the configuration says, or go on with it; the files that were made.

    Raises:
        UsageError, InputError, WeightsError, ResourceError: as each part says, in one line.
        KeyboardInterrupt: it was told to stop, and has saved where it is.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config.accumulation(ranks)
    if rank:  # the first process speaks for all
        logger.setLevel(logging.WARNING)
    with processes(ranks) as device:
        data = first_alone(lambda: read_samples(config))
        report(config, data)
        cache = None
        if config.vae is None:  # which trains on frames
            cache = Cache(cache_folder(config), encodings_of(config), encoders_of(config.model, device))
            build_cache(cache, config, data, rank, ranks)
        wait()
        make_deterministic(config.deterministic)
        with Batches(config, data, cache, device, rank, ranks) as batches:
            run, trainee = make_run(config, data, batches, device, rank)
            write_resolved(config, run.rank)
            train(run)
        about = {"recipe": config.recipe, "base": config.model.config, "steps": str(run.step), "seed": str(config.seed)}
        with weights_to_use(run):  # in all processes, where each has a part of them
            files = [] if run.rank else export(trainee, Path(config.output) / "export", about)
        if run.rank:
            return []
        logger.info("trained: %s", ", ".join(map(str, files)))
        return files


def make_run(
    config: Config, data: TrainingSet, batches: Batches, device: torch.device, rank: int
) -> tuple[Run, torch.nn.Module]:
    """The run at its start, and its trainee."""
    base, recipe = load_config(config.model.config), recipe_of(config)
    trainee = load_vae_trainee(config, device) if config.vae is not None else load_trainee(config, device)
    masters, optimizer = optimizer_of(config, trainee)
    count = sum(parameter.numel() for parameter in masters.parameters.values())
    logger.info("%s: %d parameters are trained (%s)", config.recipe, count, config.train.trainable)
    forward = forward_of(recipe, trainee)
    if config.memory.compile:
        trainee.transformer.compile_repeated_blocks()
    ema = None
    if config.ema is not None:
        ema = Ema(masters.values, config.ema.decay, config.ema.every, "cpu" if config.ema.device == "cpu" else None)
    run = Run(
        config,
        forward,
        batches,
        masters,
        optimizer,
        {"config": resolved(config), "data": data.hash, "base": base_hash(config, base)},
        bank=bank_of(config, rank, int(os.environ.get("LOCAL_RANK", 0))),
        ema=ema,
        flop=None if config.vae is not None else flop_of(config),
        loggers=loggers_of(config) if rank == 0 else (),
    )
    if data.held_out:
        run.evaluate = partial(held_out_loss, run, recipe, trainee, data, batches.maker)
    if config.vae is None and config.validate.samples:
        run.videos = partial(make_videos, run, trainee)
    return run, trainee


def forward_of(recipe: Recipe | VaeRecipe, trainee: torch.nn.Module) -> Callable:
    """One forward pass, as the loop calls it."""
    if not isinstance(recipe, VaeRecipe):
        return partial(denoising_step, recipe, trainee)

    def forward(batch: Batch, draw: Draws, view: BankView | None) -> tuple[Tensor, list[RecycledError]]:
        frames = batch.parts["frames"]
        return vae_step(recipe, trainee, frames, draw, trainee.latent_shape(frames)), []

    return forward


# ------------------------------------------------------------------------------------------------- held-out loss


@torch.no_grad()
def held_out_loss(
    run: Run, recipe: Recipe | VaeRecipe, trainee: torch.nn.Module, data: TrainingSet, maker: BatchMaker, step: int
) -> dict[str, float]:
    """The loss of samples that are never trained on, at fixed noise and noise levels: what tells progress, where the
    loss of training tells mostly which noise was drawn. Changes nothing.
    """
    found: dict[str, list[float]] = {}
    forward = forward_of(recipe, trainee)
    plain = dataclasses.replace(recipe, **{f.name: 0.0 for f in dataclasses.fields(recipe) if f.name in DROPS})
    for number, sample in enumerate(data.held_out):
        draw = Draws(run.config.seed, -1 - number, [0], 1)  # steps of training count from 0
        batch = moved(maker.batch([sample], draw), run.device)
        if isinstance(recipe, VaeRecipe):
            found.setdefault("loss", []).append(forward(batch, draw, None)[0].item())
            continue
        for index in recipe.noise.quantiles(run.config.validate.quantiles).tolist():
            losses, _ = denoising_step(plain, trainee, batch, draw, None, torch.tensor([index]))
            found.setdefault(f"t{recipe.noise.timesteps[index]:.0f}", []).append(losses.item())
    means = {name: sum(values) / len(values) for name, values in found.items()}
    means["loss"] = sum(means.values()) / len(means)
    if run.rank == 0:
        logger.info("step %d: held-out loss %.5f", step, means["loss"])
    return means


# ------------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def processes(ranks: int) -> Iterator[torch.device]:
    """This process's device, in a group with the others if there are any."""
    device = choose_device("auto")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def first_alone(read: Callable[[], TrainingSet]) -> TrainingSet:
    """What every process reads, the first of a machine before the others: they find what it measured."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        wait()
        return read()
    found = read()
    wait()
    return found


def make_deterministic(wanted: bool) -> None:
    """Kernels that give the same bits each time, at some cost on a GPU."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


# ------------------------------------------------------------------------------------------------------- records


def report(config: Config, data: TrainingSet) -> None:
    """How many samples there are, of each size."""
    buckets: dict[str, int] = {}
    for sample in data.samples:
        buckets[str(sample.bucket)] = buckets.get(str(sample.bucket), 0) + data.repeats[sample.source]
    shown = ", ".join(f"{count} of {bucket}" for bucket, count in sorted(buckets.items()))
    logger.info("samples: %s; %d are held out, %d skipped", shown, len(data.held_out), len(data.skipped))
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        logger.info("in %d processes, %d forward passes each for a step", ranks, config.accumulation(ranks))
    if not data.held_out:
        logger.warning("no sample is held out: there will be no held-out loss (data.holdout %g)", config.data.holdout)


def base_hash(config: Config, base: dict) -> str:
    """Of the weights that the run rests on."""
    if is_tiny(config, base):
        return f"{base['name']} from seed {base['seed']}"
    return hash_of_weights(transformer_path(config, base))


def write_resolved(config: Config, rank: int) -> None:
    """The whole configuration beside the checkpoints: --config takes it."""
    if rank == 0 and latest_checkpoint(Path(config.output)) is None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")


def refuse_unbuilt(config: Config) -> None:
    """Settings that a run would not heed are refused, not ignored.

    Raises:
        UsageError: naming the setting.
    """
    memory = config.memory
    if memory.offload == "blocks":
        config.refuse("memory.offload", "blocks do not wait yet; give checkpoints, or model.base_dtype fp8")
    for name, given in (("offload", memory.offload == "checkpoints"), ("store_bf16", memory.store_bf16)):
        if given and memory.checkpointing == "none":
            config.refuse(
                f"memory.{name}", "nothing reads it where memory.checkpointing is none; give full or attention"
            )
    if memory.sharding != "none" and config.optim.name == "prodigy":
        config.refuse("memory.sharding", "prodigy finds its step size from all tensors at once; give none, or adamw")
    check_samples(config)
    if config.log.wandb is not None:
        import_wandb(config)
    if config.vae is not None and not load_config(config.model.config).get("tiny"):
        config.refuse("model.config", "the VAE recipe trains tiny models' VAEs, tiny for instance")
