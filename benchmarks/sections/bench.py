"""One run of the GPU benchmark: where it runs, at which sizes, how long it may take, and the rows that it found."""

import gc
import logging
import math
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from models.wan.config import VARIANTS, WanConfig
from pipelines.needs import Needs, estimate_needs

logger = logging.getLogger("selfsame")

GIB = 1024**3
Row = dict[str, float | str]


@dataclass(frozen=True)
class Sizes:
    """What is measured: the released shapes, or tiny ones to show on a CPU that everything runs."""

    transformers: Mapping[str, WanConfig]  # the most telling first
    latents: tuple[int, int, int] = (21, 60, 104)  # 81 frames of 480x832
    text_tokens: int = 512
    reference: int = 64  # latent cells of a side of Stand-In's photo, 512x512
    lora_rank: int = 128  # Stand-In's
    vace_blocks: Mapping[str, int] = field(default_factory=lambda: {"1.3B": 15, "14B": 8})
    audio: tuple[str, ...] = ("1.3B",)  # StableAvatar is released for this one
    audio_tokens: int = 168  # wav2vec2's, of a window of 81 frames
    vae: Mapping = field(default_factory=dict)  # arguments of AutoencoderKLWan; its defaults are Wan2.1's
    small: WanConfig = replace(VARIANTS["t2v-1.3B"], num_layers=8)  # what is compared with float32
    small_latents: tuple[int, int, int] = (5, 30, 52)
    product_side: int = 8192

    @property
    def num_frames(self) -> int:
        return 4 * self.latents[0] - 3


RELEASED = Sizes({"1.3B": VARIANTS["t2v-1.3B"], "14B": VARIANTS["t2v-14B"]})
_TINY = WanConfig(in_dim=16, dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=32, freq_dim=32)
TINY = Sizes(
    {"tiny": _TINY},
    latents=(3, 4, 4),
    text_tokens=8,
    reference=4,
    lora_rank=4,
    vace_blocks={"tiny": 1},
    audio=("tiny",),
    audio_tokens=18,
    vae={"base_dim": 8, "num_res_blocks": 1},
    small=_TINY,
    small_latents=(2, 4, 4),
    product_side=256,
)


@dataclass
class Bench:
    """What the sections share. `attempt` is how each of them gets its rows.

    Args:
        runs: of which the median is taken, after one that warms up.
        deadline: on `time.monotonic`'s clock; what is not expected to end before it is skipped.
    """

    device: torch.device
    sizes: Sizes
    runs: int
    deadline: float
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    rate: float = math.nan  # dense bf16 FLOP/s, set by `measure_rate`
    rows: list[Row] = field(default_factory=list)  # the rows of the section that runs

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    # ------------------------------------------------------------------------------------------- what there is room for

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def free_bytes(self) -> int:
        """On the device, counting what torch holds for re-use."""
        if self.device.type != "cuda":
            return psutil.virtual_memory().available
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    def lacks(self, seconds: float = 0.0, device: float = 0.0, host: float = 0.0, disk: float = 0.0) -> str | None:
        """Why something is left out that is expected to take this many seconds and bytes; None if it is not."""
        if seconds > (left := self.seconds_left()):
            return f"about {seconds:.0f} s, {max(left, 0):.0f} s left of --minutes"
        places = {
            f"on {self.device}": (device, self.free_bytes),
            "of host memory": (host, lambda: psutil.virtual_memory().available),
            f"of disk in {self.folder}": (disk, lambda: shutil.disk_usage(self.folder).free),
        }
        for place, (needed, free) in places.items():
            if needed and needed > free():
                return f"about {needed / GIB:.1f} GiB {place}, {free() / GIB:.1f} free"
        return None

    def attempt(self, name: str, run: Callable[[], Row | None], **needs: float) -> Row | None:
        """Add the row that `run` returns; where it is skipped or fails, a row that says why. `needs`: see `lacks`."""
        if reason := self.lacks(**needs):
            return self._leave_out(name, f"skipped: {reason}")
        try:
            found = run()
        except Exception as error:  # whatever it is, the other rows are worth having
            logger.debug("%s", traceback.format_exc())
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            found = self._leave_out(name, f"failed: {type(error).__name__}: {reason}")
            error.__traceback__ = None  # its frames hold tensors
            self.free()
            return found
        if found is None:
            return None
        self.rows.append({"": name, **found})
        logger.info("%s: %s", name, ", ".join(f"{k} {shown(v)}" for k, v in found.items()))
        return self.rows[-1]

    def _leave_out(self, name: str, why: str) -> None:
        self.rows.append({"": name, "note": why})
        logger.warning("%s %s", name, why)

    def free(self) -> None:
        """Give back what is no longer referred to; hooks and compiled graphs tie it into cycles."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def estimate(self, config: WanConfig, vae_itemsize: int = 4) -> Needs:
        """What `--memory auto` reckons with, for the sizes that are measured here."""
        _, rows, columns = self.sizes.latents
        size = (8 * rows, 8 * columns, self.sizes.num_frames)
        return estimate_needs(config, *size, vae_itemsize=vae_itemsize, vae=self.sizes.vae)

    # ------------------------------------------------------------------------------------------------------- measuring

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.accelerator.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, with all that it started on the device."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def medians(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each, which take turns, after one call each that warms up. Fewer runs where time is short.

        `peak` then tells the memory of these runs.
        """
        warm_up = sum(self.seconds(run) for run in candidates.values())
        self.forget_peak()
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(self.runs):
            if number and warm_up > self.seconds_left():
                break
            for name, run in candidates.items():
                seconds[name].append(self.seconds(run))
        return {name: statistics.median(times) for name, times in seconds.items()}

    def median(self, run: Callable[[], object]) -> float:
        return self.medians({"": run})[""]

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> Row:
        """Device memory at its peak since it was last forgotten, as part of a row; nothing where none is counted."""
        if self.device.type != "cuda":
            return {}
        return {"peak GiB": torch.cuda.max_memory_allocated(self.device) / GIB}

    def measure_rate(self) -> Row:
        """The limit: FLOP/s of a large bf16 product, several in a row, so that starting them costs nothing."""
        side, repeats = self.sizes.product_side, 10
        matrix = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)

        def products() -> None:
            for _ in range(repeats):
                matrix @ matrix

        products()
        seconds = statistics.median(self.seconds(products) for _ in range(5)) / repeats
        self.rate = 2 * side**3 / seconds
        return {"ms": 1000 * seconds, "TFLOP/s": self.rate / 1e12}

    def of_limit(self, flops: float, seconds: float) -> Row:
        return {"% of the limit": 100 * flops / (seconds * self.rate)}

    def expect(self, flops: float, share: float = 0.3, other: float = 0.0) -> float:
        """Seconds that a measurement may take, for `lacks`: runs and warm-up at this share of the limit, and others."""
        return (self.runs + 1) * flops / (share * self.rate) + other


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; its columns are theirs, notes last."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "note"))
    columns += ["note"] if any("note" in row for row in rows) else []
    cells = [columns, ["---"] * len(columns)]
    cells += [[shown(row.get(column, "")).replace("|", "/") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
