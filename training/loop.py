"""The loop of training, the same for every recipe.

Whoever computes what, the result is that of one process with one forward pass over the global batch: draws and order
are functions of the step, losses are divided by the size of the global batch, gradients are summed in float32.
The state of a run is the weights, the optimiser, their mean, the bank and the step; nothing else is saved, or needed.
"""

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import InputError
from preprocess.output import whole_file
from preprocess.progress_bars import ProgressBars
from training.checkpoint import check_same, latest_checkpoint, save_checkpoint
from training.config import Config
from training.draws import Draws
from training.ema import Ema
from training.error_bank import BankView, ErrorBank, RecycledError, errors_to_insert
from training.gradient_limit import gradient_limit, tightened_limit
from training.log import Logger, News
from training.optimizers import Masters, averaged, learning_rate, set_learning_rate
from training.recipes.base import Batch
from training.sharding import ShardedMasters, load_state, state_of

logger = logging.getLogger("selfsame")


# (batch, draws, view of the bank) -> losses (B,) of the recipe, and the errors for the bank.
Forward = Callable[[Batch, Draws, BankView | None], tuple[Tensor, list[RecycledError]]]


@dataclass
class Run:
    """A run and its state.

    config:    of the run.
    forward:   one forward pass of the recipe.
    batches:   this process's micro-batches of a step, from 0.
    masters, optimizer: of what is trained.
    about:     what a checkpoint must agree with: "config", and hashes of "data" and "base".
    evaluate:  called with the step after every `validate.every` steps; has draws of its own and changes nothing. Gives
               numbers to be logged.
    videos:    the same, before the first step, after every `validate.videos_every` and after the last.
    flop:      arithmetic of a batch's forward and backward pass.
    loggers:   called with numbers and their step, on the first process.
    """

    config: Config
    forward: Forward
    batches: Callable[[int], Iterable[Batch]]
    masters: Masters | ShardedMasters
    optimizer: torch.optim.Optimizer
    about: Mapping[str, object]
    bank: ErrorBank | None = None
    ema: Ema | None = None
    evaluate: Callable[[int], Mapping[str, float]] | None = None
    videos: Callable[[int], Mapping[str, float]] | None = None
    flop: Callable[[Batch], int] | None = None
    loggers: Sequence[Logger] = ()
    step: int = 0  # steps that are done
    skipped: int = 0  # updates that were left out since the last good one
    done_flop: int = 0  # of the last step, on this process
    output: Path = field(init=False)

    def __post_init__(self):
        self.output = Path(self.config.output)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = next(iter(self.masters.values.values())).device


def train(run: Run) -> None:
    """From the last checkpoint, if there is one, to the last step; then a checkpoint of the end.

    Raises:
        InputError: too many steps in a row without a finite gradient.
        ResourceError: a checkpoint cannot be written.
        KeyboardInterrupt: the run was told to stop, and has saved where it is.
    """
    config = run.config
    resume(run)
    losses_log = LossesLog(run.output / "losses.jsonl", run.step) if run.rank == 0 else None
    if run.rank == 0:
        keep_lines(run.output / "validation.jsonl", lambda _, line: step_of(line) <= run.step)
    saved_at, saved_step = time.monotonic(), run.step
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if run.videos is not None and run.step == 0:
        note(run, run.videos(0))
    news = News(run.device, config.train.steps, ranks)
    with Stop() as stop, ProgressBars(run.rank == 0).work("training", config.train.steps - run.step, "step") as bar:
        while run.step < config.train.steps:
            record = train_step(run)
            if losses_log is not None:
                losses_log.write(record)
                tell(run, news.add(record, ranks * run.done_flop))
            run.step += 1
            bar.advance()
            if run.evaluate is not None and run.step % config.validate.every == 0:
                with weights_to_use(run):
                    note(run, run.evaluate(run.step))
            if run.videos is not None and run.step % (config.validate.videos_every or config.train.steps) == 0:
                note(run, run.videos(run.step))
            stopping, is_late = agreed(
                [stop.asked, time.monotonic() - saved_at > 60 * (config.save.minutes or math.inf)], run.device
            )
            if stopping or is_late or run.step % config.save.every == 0 or run.step == config.train.steps:
                save(run)
                saved_at, saved_step = time.monotonic(), run.step
            if stopping and run.step < config.train.steps:
                logger.info("stopped after step %d, which is saved", run.step)
                raise KeyboardInterrupt
    assert saved_step == run.step


def tell(run: Run, numbers: Mapping[str, float]) -> None:
    """Log numbers and their step."""
    for log in run.loggers:
        log(numbers)


def note(run: Run, found: Mapping[str, float]) -> None:
    """Write what was found out about the weights of this step into validation.jsonl, and log it."""
    if run.rank or not found:
        return
    with open(run.output / "validation.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": run.step, **found}) + "\n")
    tell(run, {"step": run.step, **{f"held_out/{name}": value for name, value in found.items()}})


def train_step(run: Run) -> dict:
    """One optimiser step. Returns what is logged of it: numbers that a resumed run repeats to the bit."""
    config, step = run.config, run.step
    train, optim = config.train, config.optim
    rate = learning_rate(step, train.steps, optim.lr, optim.schedule or "constant", warmup_of(config))
    set_learning_rate(run.optimizer, rate)
    view = None if run.bank is None else run.bank.view()  # the bank as it is before this step
    losses: dict[int, float] = {}  # by position in the global batch
    errors: list[RecycledError] = []
    run.done_flop = 0
    for batch in run.batches(step):
        draw = Draws(config.seed, step, batch.positions, train.global_batch)
        of_batch, offered = run.forward(batch, draw, view)
        (of_batch.sum() / train.global_batch).backward()
        run.masters.collect()
        run.done_flop += run.flop(batch) if run.flop is not None else 0
        losses |= zip(batch.positions, of_batch.tolist(), strict=True)
        errors += offered

    run.masters.finish()
    values, norm = list(run.masters.values.values()), run.masters.norm()
    limit = gradient_limit(step, train.clip.norm, train.clip.start_ratio, train.clip.until)
    if train.clip.abnormal:
        limit = tightened_limit(limit, norm, step, train.clip.until)
    is_good = math.isfinite(norm)
    if is_good:
        torch.nn.utils.clip_grads_with_norm_(values, limit, torch.tensor(norm))
        run.optimizer.step()
        run.masters.publish()
        if run.ema is not None:
            run.ema.update(run.masters.values, step)
        run.skipped = 0
    run.optimizer.zero_grad()
    if run.bank is not None and is_good:
        insert_errors(run, errors, step)
    everyones = losses_of_all(losses, train.global_batch, run.device)
    if not is_good:
        run.skipped += 1
        odd = [position for position, loss in enumerate(everyones) if not math.isfinite(loss)]
        logger.warning("step %d: no finite gradient (losses that are not: %s); the update is left out", step, odd)
        if run.skipped > train.max_skips:
            raise InputError(
                f"{run.skipped} steps up to {step} had no finite gradient; look for NaN in the data, or lower optim.lr"
            )
    return {"step": step, "loss": sum(everyones) / len(everyones), "norm": norm, "limit": limit, "lr": rate}


@contextlib.contextmanager
def weights_to_use(run: Run) -> Iterator[None]:
    """While weights are tried or exported: the mean of them if the run has one, and then those being trained again."""
    if run.ema is None:
        with averaged(run.optimizer, run.masters):
            yield
        return
    trained = {name: value.detach().clone() for name, value in run.masters.values.items()}
    run.masters.load(run.ema.mean)
    try:
        yield
    finally:
        run.masters.load(trained)


def warmup_of(config: Config) -> int:
    """Steps in which the rate rises; schedule-free does that itself."""
    return 0 if config.optim.name == "schedulefree" else config.optim.warmup


def insert_errors(run: Run, errors: list[RecycledError], step: int) -> None:
    settings = run.config.error_recycling

    def choose(position: int, kind: str, count: int) -> int:
        return (
            Draws(run.config.seed, step, [position], run.config.train.global_batch)
            .integers(f"slot_{kind}", count)
            .item()
        )

    run.bank.insert(errors_to_insert(errors, settings.scope, step, settings.warmup, run.device), choose)


# -------------------------------------------------------------------------------------------- several processes


def losses_of_all(own: Mapping[int, float], global_batch: int, device: torch.device) -> list[float]:
    """The losses of the global batch, by position."""
    losses = torch.zeros(global_batch, dtype=torch.float32, device=device)
    losses[list(own)] = torch.tensor(list(own.values()), device=device)
    if dist.is_initialized():
        dist.all_reduce(losses)
    return losses.tolist()


def agreed(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag, if any process has it: all then do the same."""
    if not dist.is_initialized():
        return flags
    any_of = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(any_of, dist.ReduceOp.MAX)
    return [bool(flag) for flag in any_of.tolist()]


def wait() -> None:
    """For all processes."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------- saving, resuming


def bank_folder(run: Run) -> str:
    """One for all processes, or one for each."""
    return "bank" if run.config.error_recycling.scope == "global" else f"bank-{run.rank}"


def save(run: Run) -> None:
    """Write a checkpoint of the present state."""

    def write(folder: Path) -> None:
        masters, suffix = run.masters, run.masters.suffix
        if run.rank == 0 or suffix:
            weights = {name: value.detach().contiguous() for name, value in masters.values.items()}
            save_file(weights, folder / f"weights{suffix}.safetensors")
            torch.save(state_of(run.optimizer, masters.values), folder / f"optimizer{suffix}.pt")
            if run.ema is not None:
                save_file(run.ema.mean, folder / f"ema{suffix}.safetensors")
        if run.bank is not None and (run.rank == 0 or run.config.error_recycling.scope == "per_rank"):
            run.bank.save(folder / bank_folder(run))

    keep = run.config.save
    save_checkpoint(
        run.output,
        run.step,
        write,
        {**run.about, "skipped": run.skipped},
        keep=keep.keep,
        keep_every=keep.keep_every,
        is_first=run.rank == 0,
        wait=wait,
    )


def resume(run: Run) -> None:
    """Go on from the run's last checkpoint, if it has one.

    Raises:
        UsageError: it is of another run.
        WeightsError: it is damaged.
    """
    checkpoint = latest_checkpoint(run.output)
    if checkpoint is None:
        return
    check_same(checkpoint, run.about)
    run.masters.load(tensors_in(checkpoint.folder, "weights"))
    states = sorted(checkpoint.folder.glob("optimizer*.pt"))
    saved = [torch.load(file, map_location=run.device, weights_only=True) for file in states]
    load_state(run.optimizer, run.masters.values, saved)
    if run.ema is not None:
        run.ema.load(tensors_in(checkpoint.folder, "ema"))
    if run.bank is not None:
        run.bank.restore(checkpoint.folder / bank_folder(run))
    wait()
    run.step, run.skipped = checkpoint.step, checkpoint.manifest["skipped"]
    logger.info("going on after step %d, from %s", run.step, checkpoint.folder)


def tensors_in(folder: Path, name: str) -> dict[str, Tensor]:
    """Of all files of that name, one or as many as there were processes."""
    files = sorted(folder.glob(f"{name}*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def keep_lines(path: Path, is_kept: Callable[[int, str], bool]) -> None:
    """Leave out lines of a log that a resumed run writes again. The file is replaced at once: a run that is killed here
    has all of it or what is kept.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for number, line in enumerate(lines) if is_kept(number, line)]
    if len(kept) < len(lines):
        with whole_file(path) as part:
            part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def step_of(line: str) -> int:
    """Of a line of a log; one that was cut off by a kill is of no step that was done."""
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return 2**62


class LossesLog:
    """losses.jsonl: a line a step, with nothing in it that a resumed run would not repeat.

    step: that is next; lines of it and after it, of a run that was killed, are cut off.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(path, lambda number, line: number < step)
        self.path = path

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Stop:
    """While it is entered, SIGTERM, SIGUSR1 and the first Ctrl-C ask the loop to save and stop; a second Ctrl-C stops
    at once.
    """

    asked = False

    def __enter__(self) -> "Stop":
        names = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]  # Windows lacks one
        self.before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
        for number in self.before:
            signal.signal(number, self.ask)
        return self

    def ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        logger.info("stopping after this step, which will be saved")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
