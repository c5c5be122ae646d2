"""Training on the GPU at hand against its goals: seconds a step, memory, and what each feature costs. No downloads.

    python -m benchmarks.training_speed > training.md          all checks, released shapes with random weights
    python -m benchmarks.training_speed --only lora resume     some of them, each a few minutes at most
    python -m benchmarks.training_speed --device cpu           tiny shapes: shows that it runs, its figures mean nothing

Each row is a check: what was measured, the goal, and whether it was met. Data are random latents, as a cache would give
them. What the memory does not suffice for is named and skipped.
"""

import argparse
import datetime
import logging
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import device_name, versions
from benchmarks.sections.models import fill_randomly, random_transformer
from configs import load_config
from errors import UsageError
from models.wan.vae import WanVAE
from pipelines.networks import shape_of
from pipelines.tiny import section_of
from training.build import bank_of, make_trainee, optimizer_of, recipe_of
from training.config import Config, read_config
from training.estimate import CEILING, count_parameters, memory_parts, stacks_of
from training.log import peak_of
from training.loop import Run, train_step
from training.recipes.base import Batch, denoising_step
from training.trainee import TrainableStandIn

logger = logging.getLogger("selfsame")

GIB = 2**30
RANK = 128


@dataclass(frozen=True)
class Setting:
    """A run of training with random weights and random data.

    recipe: base, stand_in or error_recycling.
    size: 14B or 1.3B.
    video: (height, width, frames) in pixels.
    sets: of the configuration.
    """

    recipe: str = "base"
    size: str = "14B"
    video: tuple[int, int, int] = (480, 832, 81)
    sets: tuple[str, ...] = ()


@dataclass
class Measured:
    """Of the steps after the first."""

    seconds: float
    peak: float  # GiB
    flop: float  # the model's, without what is computed twice
    hardware: float  # with it
    run: Run = field(repr=False)


class Bench:
    """Where it runs, at which sizes; rows of what was found."""

    def __init__(self, device: torch.device, steps: int, folder: Path):
        self.device, self.steps, self.folder = device, steps, folder
        self.is_tiny = device.type == "cpu"
        self.rows: list[dict[str, str]] = []

    # ---------------------------------------------------------------------------------------------------- one run

    def config_of(self, setting: Setting) -> Config:
        sees = setting.recipe == "error_recycling"
        if self.is_tiny:
            model, (height, width, frames) = "tiny-i2v" if sees else "tiny", (64, 96, 9)
        else:
            of_size = {"14B": "wan2.1-i2v-14B-480P" if sees else "wan2.1-t2v-14B", "1.3B": "wan2.1-t2v-1.3B"}
            model, (height, width, frames) = of_size[setting.size], setting.video
        rank = 4 if self.is_tiny else RANK
        is_lora = setting.recipe != "stand_in" and "train.trainable=full" not in setting.sets
        return read_config(
            None,
            [
                f"recipe={setting.recipe}",
                f"model.config={model}",
                "data.sources=[{path: nowhere}]",
                f"data.resolutions=[{height}x{width}]",
                f"data.frames=[{frames}]",
                f"output={self.folder / 'run'}",
                "train.global_batch=1",
                "train.steps=1000",
                "optim.warmup=0",
                *([f"train.lora.rank={rank}", f"train.lora.alpha={rank}"] if is_lora else []),
                *(["error_recycling.variant=shot", "error_recycling.limit_gib=64"] if sees else []),
                *setting.sets,
            ],
        )

    def make_run(self, setting: Setting) -> Run:
        config = self.config_of(setting)
        shape = shape_of(load_config(config.model.config))
        torch.manual_seed(0)
        transformer = random_transformer(shape, self.device).set_compute_dtype(torch.bfloat16)
        adapters = {}
        if setting.recipe == "stand_in":
            adapters["stand_in"] = TrainableStandIn(shape.dim, shape.num_layers, 4 if self.is_tiny else RANK)
        trainee = make_trainee(config, transformer, adapters, self.device)
        if config.memory.compile:
            trainee.transformer.compile_repeated_blocks()
        masters, optimizer = optimizer_of(config, trainee)
        forward = partial(denoising_step, recipe_of(config), trainee)
        batches = partial(self.batches, config, shape)
        return Run(config, forward, batches, masters, optimizer, {}, bank=bank_of(config, 0, 0))

    def batches(self, config: Config, shape, step: int) -> Iterator[Batch]:
        """One random sample, as a cache would give it."""
        (height, width), frames = config.data.sizes[0], config.data.frames[0]
        h, w, f = height // shape.vae_spatial_factor, width // shape.vae_spatial_factor, (frames + 3) // 4
        generator = torch.Generator(self.device).manual_seed(step)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device)

        parts = {}
        if config.stand_in is not None:
            side = 8 if self.is_tiny else 64
            parts["reference"] = normal(1, shape.out_dim, 1, side, side)
        if config.error_recycling is not None:
            parts["condition"] = normal(1, 4 + shape.out_dim, f, h, w)
            if shape.image_dim is not None:
                parts["clip"] = normal(1, 257, shape.image_dim)
        mean, text = normal(1, shape.out_dim, f, h, w), [normal(64, shape.text_dim)]
        yield Batch([0], mean, text, None, normal(1, shape.text_dim), parts)

    def measure(self, setting: Setting, prepare: Callable[[], None] = lambda: None) -> Measured:
        """The median step. prepare: work beside each step, as encoding would be."""
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = self.make_run(setting)
        times = []
        for step in range(self.steps + 1):
            begun = self.now()
            prepare()
            train_step(run)
            run.step += 1
            if step:  # the first one reserves memory
                times.append(self.now() - begun)
        peak = torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else float("nan")
        config, tokens = run.config, self.tokens(run)
        stacks = stacks_of(config, tokens)
        return Measured(
            statistics.median(times),
            peak,
            sum(arithmetic.step(full) for arithmetic, full in stacks),
            sum(arithmetic.hardware(full, config.memory.checkpointing) for arithmetic, full in stacks),
            run,
        )

    @staticmethod
    def tokens(run: Run) -> int:
        (batch,) = run.batches(0)
        _, _, frames, height, width = batch.mean.shape
        return frames * (height // 2) * (width // 2)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def free(self) -> None:
        import gc

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------- rows

    def row(self, check: str, found: str, goal: str, met: bool | None) -> None:
        """met: None where this machine cannot tell."""
        verdict = "not measured" if met is None or self.is_tiny else "met" if met else "NOT MET"
        self.rows.append({"check": check, "found": found, "goal": goal, "": verdict})

    def speed(self, check: str, measured: Measured, goal: float, memory: float | None = None) -> None:
        """A row of seconds, shares of the peak and GiB."""
        peak, of_peak = peak_of(self.device), ""
        if peak is not None:
            model, hardware = (flop / measured.seconds / peak for flop in (measured.flop, measured.hardware))
            of_peak = f", MFU {model:.0%}, HFU {hardware:.0%}"
        fits = memory is None or measured.peak <= memory
        self.row(
            check,
            f"{measured.seconds:.3g} s{of_peak}, {measured.peak:.1f} GiB",
            f"{goal:g} s" + ("" if memory is None else f", {memory:g} GiB"),
            measured.seconds <= goal and fits,
        )


CHECKPOINTS = "memory.offload=checkpoints"


# ------------------------------------------------------------------------------------------------------ the checks


def lora(bench: Bench) -> None:
    """A 14B LoRA of rank 128 at 480x832 and 81 frames, with full checkpointing and with attention's outputs kept."""
    for kind, goal in (("full", 10), ("attention", 8.8)):
        sets = (f"memory.checkpointing={kind}", CHECKPOINTS)
        bench.speed(f"14B LoRA, checkpointing {kind}", bench.measure(Setting(sets=sets)), goal, 60)


def offload(bench: Bench) -> None:
    """What it costs that checkpoints wait in the machine's memory."""
    kept, away = (bench.measure(Setting(sets=sets)).seconds for sets in ((), (CHECKPOINTS,)))
    bench.row("checkpoints offloaded / kept", f"{away / kept:.3f}", "1.03", away <= 1.03 * kept)


def full(bench: Bench) -> None:
    """All of 1.3B."""
    for video, goal in (((480, 832, 81), 2.2), ((512, 512, 81), 1.1)):
        setting = Setting("base", "1.3B", video, ("train.trainable=full",))
        bench.speed(f"1.3B full, {video[0]}x{video[1]}", bench.measure(setting), goal, 42)


def stand_in(bench: Bench) -> None:
    """An identity's step against a LoRA's."""
    ours = bench.measure(Setting("stand_in", sets=(CHECKPOINTS,))).seconds
    theirs = bench.measure(Setting(sets=(CHECKPOINTS,))).seconds
    bench.row("Stand-In / LoRA, a step", f"{ours / theirs:.3f}", "1.05", ours <= 1.05 * theirs)


def recycling(bench: Bench) -> None:
    """Error recycling with a bank of 100 a bucket against none, and one insertion."""
    bank = ("error_recycling.per_grid=100", "error_recycling.warmup=0", CHECKPOINTS)
    off = ("error_recycling.p.clean=1", "error_recycling.clean_update=0", *bank)
    with_bank, without = (
        bench.measure(Setting("error_recycling", sets=bank)),
        bench.measure(Setting("error_recycling", sets=off)),
    )
    ratio = with_bank.seconds / without.seconds
    bench.row("error recycling on / off", f"{ratio:.3f}", "1.01", ratio <= 1.01)
    extra = 1000 * (with_bank.seconds - without.seconds)
    bench.row("what a step's reads and insertion take", f"{extra:.0f} ms", "50 ms", extra <= 50)


SETTINGS = {
    "14B LoRA": Setting(),
    "14B LoRA, offloaded": Setting(sets=(CHECKPOINTS,)),
    "14B LoRA, attention kept": Setting(sets=("memory.checkpointing=attention",)),
    "14B LoRA, bfloat16 checkpoints": Setting(sets=("memory.store_bf16=true",)),
    "14B Stand-In, 49 frames": Setting("stand_in", video=(480, 832, 49)),
    "1.3B LoRA": Setting(size="1.3B"),
    "1.3B full": Setting(size="1.3B", sets=("train.trainable=full",)),
    "1.3B full, 512x512": Setting(size="1.3B", video=(512, 512, 81), sets=("train.trainable=full",)),
}


def estimates(bench: Bench) -> None:
    """--dry_run's memory and time against what was measured, for eight settings."""
    for name, setting in SETTINGS.items():
        measured = bench.measure(setting)
        config = measured.run.config
        expected = sum(memory_parts(config, count_parameters(config), bench.tokens(measured.run)).values()) / GIB
        off = abs(expected / measured.peak - 1)
        bench.row(f"memory, {name}", f"{measured.peak:.1f} GiB, estimated {expected:.1f}", "within 10 %", off <= 0.1)
        seconds = measured.hardware / CEILING
        off = abs(seconds / measured.seconds - 1)
        shown = f"{measured.seconds:.3g} s, estimated {seconds:.3g}"
        bench.row(f"time, {name}", shown, "within 15 %", off <= 0.15)
        del measured


def cached(bench: Bench) -> None:
    """Steps on cached latents against encoding each video with the VAE first, as SVI's trainer does."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        shapes = section_of(load_config("tiny"), "vae") if bench.is_tiny else {}
        autoencoder = AutoencoderKLWan(**shapes)
    autoencoder._keep_in_fp32_modules = ()
    vae = WanVAE(fill_randomly(autoencoder, bench.device, torch.bfloat16))
    height, width, frames = (64, 96, 9) if bench.is_tiny else (480, 832, 81)
    clip = torch.zeros(1, 3, frames, height, width, device=bench.device)
    setting = Setting(sets=(CHECKPOINTS,))
    plain = bench.measure(setting).seconds
    encoding = bench.measure(setting, prepare=lambda: vae.encode(clip)).seconds
    bench.row("encoding in each step / cached", f"{encoding / plain:.3f}", "1.25", encoding >= 1.25 * plain)


def resume(bench: Bench) -> None:
    """Ten deterministic steps against five and five more from a checkpoint: equal to the bit; and what they cost."""
    from training.loop import resume as go_on
    from training.loop import save
    from training.start import make_deterministic

    setting = Setting(sets=(CHECKPOINTS,))
    plain = bench.measure(setting).seconds
    make_deterministic(True)
    try:
        states = []
        for parts in ((10,), (5, 5)):
            for count in parts:
                bench.free()
                run = bench.make_run(setting)
                if count == 5 and states:
                    go_on(run)
                first = bench.now()
                for _ in range(count):
                    train_step(run)
                    run.step += 1
                seconds = (bench.now() - first) / count
                if parts == (5, 5) and run.step == 5:
                    save(run)
                    states.append({})
                else:
                    states.append({name: value.detach().cpu().clone() for name, value in run.masters.values.items()})
                del run
        one, two = states[0], states[-1]
        same = all(torch.equal(one[name], two[name]) for name in one)
        bench.row("10 steps and 5 + 5 are equal", str(same), "True", same)
        bench.row("deterministic / plain, a step", f"{seconds / plain:.3f}", "stated", None)
    finally:
        torch.use_deterministic_algorithms(False)


def optimizers(bench: Bench) -> None:
    """Optimisers of 1.3B in full: memory and seconds beside AdamW with float32 moments."""
    base = ("train.trainable=full",)
    plain = bench.measure(Setting(size="1.3B", sets=base))
    for name in ("adafactor", "muon", "adamw8bit"):
        try:
            other = bench.measure(Setting(size="1.3B", sets=(*base, f"optim.name={name}")))
        except UsageError as error:  # a package that is not here
            bench.row(f"{name}, 1.3B full", str(error).splitlines()[0][:80], "stated", None)
            continue
        shown = f"{plain.peak - other.peak:.1f} GiB less, {other.seconds / plain.seconds:.2f} of AdamW's time"
        bench.row(f"{name}, 1.3B full", shown, "less memory", other.peak < plain.peak)


CHECKS: Mapping[str, Callable[[Bench], None]] = {
    "lora": lora,
    "offload": offload,
    "full": full,
    "stand_in": stand_in,
    "recycling": recycling,
    "estimates": estimates,
    "cached": cached,
    "resume": resume,
    "optimizers": optimizers,
}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    columns = ("check", "found", "goal", "")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row[name] for name in columns)} |" for row in rows)])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Print a table of the checks; its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="default: the accelerator that torch finds")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--steps", type=int, default=3, help="of which a figure is the median (3)")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.accelerator.is_available():
        raise SystemExit("torch finds no GPU here; --device cpu runs tiny shapes, to show that everything runs")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    device = torch.device(args.device or torch.accelerator.current_accelerator())
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.training_speed", *given])
    print(f"## Training on {device_name(device)}\n\n`{command}`")
    print(f"({datetime.date.today()}; {versions(device)})\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, args.steps, Path(folder))
        for name in args.only or CHECKS:
            try:
                CHECKS[name](bench)
            except torch.OutOfMemoryError as error:
                bench.row(name, f"not enough memory: {str(error).splitlines()[0][:80]}", "", None)
            bench.free()
    print(table(bench.rows))
    if bench.is_tiny:
        print("\nTiny shapes on a CPU: this shows that every check runs. Its figures mean nothing.")
    return bench.rows


if __name__ == "__main__":
    main()
