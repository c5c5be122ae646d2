"""A small run of training for tests: SVI's recipe with a bank and a LoRA, or Stand-In, on a dataset made from a seed.

torchrun … tests/training_run.py OUTPUT set=value …     several processes, as the tests of one compare with
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests import tiny
from training.config import read_config
from training.ema import Ema
from training.error_bank import ErrorBank
from training.loop import Run, train
from training.optimizers import Masters, make_optimizer, parameter_groups
from training.recipes.base import Batch, denoising_step
from training.recipes.error_recycling import ErrorRecyclingRecipe
from training.sampler import Bucket, Order, micro_batches
from training.sharding import ShardedMasters
from training.trainee import Trainee, add_lora, select_trained

SAMPLES, TEXT_DIM = 7, tiny.CONFIG["transformer"]["text_dim"]
BUCKET = Bucket(64, 96, 9)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_run(output: Path, *sets: str) -> Run:
    """A run of error recycling; `sets` as --set of train.py."""
    given = {
        "recipe": "error_recycling",
        "model.config": "tiny-i2v",
        "error_recycling.variant": "shot",
        "error_recycling.per_grid": 2,
        "error_recycling.grids": 4,
        "error_recycling.replace": "random",
        "error_recycling.p.noise": 0.5,
        "train.global_batch": 4,
        "train.micro_batch": 1,
        "train.steps": 6,
        "train.lora.rank": 2,
        "optim.warmup": 2,
        "optim.lr": 0.01,
        "optim.eps": 1e-4,  # Adam makes steps of rounding errors where gradients are near its epsilon
        "ema.decay": 0.5,
        "save.every": 2,
        "output": str(output),
    }
    source = "data.sources=[{path: data, layout: svi}]"
    config = read_config(None, [source, *(f"{name}={value}" for name, value in given.items()), *sets])
    settings = config.error_recycling
    model = tiny.transformer(in_dim=36)
    shape = config.train.lora
    add_lora(model, rank=shape.rank, alpha=shape.alpha, targets=shape.targets, seed=config.seed)
    trainee = Trainee(model)
    recipe = ErrorRecyclingRecipe(noise_error=settings.p.noise, grids=settings.grids, clean=settings.p.clean)
    select_trained(trainee, lambda name: recipe.trains(name, "lora"))
    sharded = config.memory.sharding == "zero2" and dist.is_initialized()
    masters = (ShardedMasters if sharded else Masters)(trainee.named_parameters())
    groups = parameter_groups(masters.values, config.optim.lr, config.optim.weight_decay)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    order = Order({BUCKET: range(SAMPLES)}, config.train.global_batch, config.seed)

    def batches(step: int) -> Iterator[Batch]:
        for micro in micro_batches(order.batch(step), config.train.micro_batch, rank, ranks):
            yield Batch(
                micro.positions,
                torch.cat([tiny.latents(100 + number) for number in micro.ids]),
                [randn(200 + number, 4, TEXT_DIM) for number in micro.ids],
                parts={"condition": torch.cat([tiny.latents(300 + number, channels=20) for number in micro.ids])},
            )

    folder = output / "bank"
    bank = ErrorBank(
        folder, grids=settings.grids, per_grid=settings.per_grid, replace=settings.replace, writes=rank == 0
    )
    return Run(
        config,
        partial(denoising_step, recipe, trainee),
        batches,
        masters,
        make_optimizer(config.optim.name, groups, betas=config.optim.betas, eps=config.optim.eps),
        {"config": {"seed": config.seed, "train": {"steps": config.train.steps}}, "data": "one"},
        bank=bank,
        ema=Ema(masters.values, config.ema.decay),
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(make_run(Path(sys.argv[1]), *sys.argv[2:]))
    dist.destroy_process_group()
