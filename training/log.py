"""What a run says of itself: metrics.jsonl, TensorBoard's files, Weights & Biases, and a line in the log a minute.

losses.jsonl (`training.loop`) has only what a resumed run repeats to the bit; times and memory are here.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch

from preprocess.progress_bars import readable_time
from training.config import Config, resolved_yaml

logger = logging.getLogger("selfsame")

LINE_EVERY = 60  # seconds
# bfloat16 without sparsity, FLOP a second, as the makers state it; the first name that is in the device's counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
}

# Called with "step" and numbers by their names.
Logger = Callable[[Mapping[str, float]], None]


def loggers_of(config: Config) -> list[Logger]:
    """What the first process writes to, beside losses.jsonl.

    Raises:
        UsageError: a package that is asked for by name and not installed.
    """
    found = [metrics_file(Path(config.output) / "metrics.jsonl")]
    if config.log.tensorboard and (writer := tensorboard(config)) is not None:
        found.append(writer)
    if config.log.wandb is not None:
        found.append(weights_and_biases(config))
    return found


def metrics_file(path: Path) -> Logger:
    """A line for each call; steps that a resumed run does again are there twice, with the times they took."""

    def log(numbers: Mapping[str, float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(numbers)) + "\n")

    return log


def tensorboard(config: Config) -> Logger | None:
    """A writer of TensorBoard's files; None, with a word, where the package is missing: they are on by default."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("log.tensorboard: the package is not installed (pip install tensorboard); metrics.jsonl has all")
        return None
    writer = SummaryWriter(str(Path(config.output) / "tensorboard"))
    writer.add_text("config", f"```yaml\n{resolved_yaml(config)}```")

    def log(numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            if name != "step":
                writer.add_scalar(name, value, numbers["step"])
        writer.flush()

    return log


def weights_and_biases(config: Config) -> Logger:
    """A run of the project that log.wandb names, the same one after a resume."""
    wandb = import_wandb(config)
    from training.config_fields import resolved

    name = Path(config.output).name
    run = wandb.init(project=config.log.wandb, name=name, id=name, resume="allow", config=resolved(config))

    def log(numbers: Mapping[str, float]) -> None:
        run.log({key: value for key, value in numbers.items() if key != "step"}, step=int(numbers["step"]))

    return log


def import_wandb(config: Config) -> ModuleType:
    """
    Raises:
        UsageError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        config.refuse("log.wandb", "needs its package: pip install wandb, or give null")
    return wandb


def peak_of(device: torch.device) -> float | None:
    """FLOP a second that the device could do; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


class News:
    """How a run goes: the numbers of a step, and a line in the log every now and then.

    Args:
        device: of this process.
        steps: of the whole run.
        ranks: processes, which share a step's arithmetic.
    """

    def __init__(self, device: torch.device, steps: int, ranks: int = 1):
        self.device, self.steps, self.ranks = device, steps, ranks
        self.peak = peak_of(device)
        self.last = time.monotonic()
        self.begin()

    def begin(self) -> None:
        self.since, self.losses, self.flop = time.monotonic(), [], 0

    def add(self, record: Mapping[str, float], flop: int) -> dict[str, float]:
        """A step's record with what it took: seconds, GiB at most, share of the device's peak where that is known.

        flop: of the step, over all processes.
        """
        now = time.monotonic()
        numbers = {**record, "seconds": round(now - self.last, 4)} | self.machine(flop, now - self.last)
        self.last = now
        self.losses.append(record["loss"])
        self.flop += flop
        if now - self.since >= LINE_EVERY:
            logger.info("%s", self.line(record, now))
            self.begin()
        return numbers

    def machine(self, flop: int, seconds: float) -> dict[str, float]:
        """What the device did in so many seconds."""
        found = {}
        if self.device.type == "cuda":
            found["gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        if self.peak is not None:
            found["of_peak"] = round(flop / self.ranks / seconds / self.peak, 4)
        return found

    def line(self, record: Mapping[str, float], now: float) -> str:
        """The mean loss since the last line, how fast it goes, and how long the rest takes."""
        seconds = (now - self.since) / len(self.losses)
        about = self.machine(self.flop, now - self.since)
        shown = [
            f"step {record['step'] + 1}: loss {sum(self.losses) / len(self.losses):.4f} (mean of {len(self.losses)})",
            f"gradient {record['norm']:.3g}, limit {record['limit']:.3g}, rate {record['lr']:.3g}",
            f"{seconds:.3g} s a step",
            *([f"{about['of_peak']:.0%} of the card's peak"] if "of_peak" in about else []),
            *([f"{about['gib']} GiB"] if "gib" in about else []),
            f"{readable_time(seconds * (self.steps - record['step'] - 1))} to go",
        ]
        return ", ".join(shown)
