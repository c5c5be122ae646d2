"""How far a run is, and how long the rest will take: bars on a terminal, elsewhere lines in the log now and then.

    bars = ProgressBars(shown=processes.rank == 0)
    for job in bars.each(jobs):                              # "video 3 of 6: …"
        bars.plan(steps, parts=3, noun="window")             # a video's, and as far as one can tell every one's
        for number in range(3):
            bars.begin_part(number)
            with bars.steps(job.output.name) as bar: …       # bar.advance() after each step
            with bars.work("decoding", 81, "frame") as bar: …

The estimate is for all of the run, from the mean time of a step and of what lies between two parts' steps (decoding,
writing, encoding), as far as this run has seen them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger("selfsame")

FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds of work before the first line in the log, and between lines

Item = TypeVar("Item")


def readable_time(seconds: float) -> str:
    """Rounded: 40 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


class ProgressBars:
    """Of one run, over all of its videos.

    shown: False for all processes but the first.
    """

    def __init__(self, shown: bool = True):
        self.shown = shown
        self.number, self.count = 0, 1  # the video's number, and how many there are
        self.part, self.parts, self.noun = 0, 1, ""
        self.num_steps, self.done = 1, 0  # how many steps a part has, and how many are done
        self._first_step: float | None = None  # seconds; it reads weights, so that it counts until there is another
        self._seconds, self._steps = 0.0, 0  # what all parts took so far
        self._between: list[float] = []  # seconds from one part's last step to the next one's first
        self._ended: float | None = None

    def each(self, items: Sequence[Item], noun: str = "video") -> Iterator[Item]:
        """The jobs one by one; where there are several, it is said which one this is."""
        self.count = len(items)
        for self.number, item in enumerate(items):
            if self.count > 1 and self.shown:
                logger.info("%s %d of %d: %s", noun, self.number + 1, self.count, getattr(item, "output", item))
            yield item
            self._part_ended()

    def plan(self, num_steps: int, parts: int = 1, noun: str = "") -> None:
        """What a video takes: so many parts (windows, clips) of so many steps each."""
        self.num_steps, self.parts, self.noun = num_steps, parts, noun
        self.begin_part(0)

    def begin_part(self, number: int) -> None:
        self.part, self.done = number, 0

    def steps(self, label: str, unit: str = "step") -> StepBar:
        """The steps of this part."""
        return StepBar(self, self._named(label), self.num_steps, unit)

    def work(self, label: str, total: int | None, unit: str) -> Bar:
        """Something beside the steps that takes a while too."""
        return Bar(self, self._named(label), total, unit)

    def left(self) -> float | None:
        """Seconds until the whole run is finished; None before there is anything to go by."""
        if self._first_step is None:
            return None
        step = self._seconds / self._steps if self._steps else self._first_step
        between = sum(self._between) / len(self._between) if self._between else 0.0
        parts = (self.count - self.number) * self.parts - self.part
        return (parts * self.num_steps - self.done) * step + parts * between

    def took(self, seconds: float, steps: int, is_first: bool) -> None:
        """So many steps are finished; is_first: of their part."""
        self.done += steps
        if is_first or not steps:
            self._first_step = seconds / max(steps, 1)
        else:
            self._seconds += seconds
            self._steps += steps

    def steps_ended(self) -> None:
        self._ended = time.monotonic()

    def _part_ended(self) -> None:
        if self._ended is not None:
            self._between.append(time.monotonic() - self._ended)
            self._ended = None

    def _named(self, label: str) -> str:
        places = [("video", self.number, self.count), (self.noun, self.part, self.parts)]
        return ", ".join([f"{noun} {i + 1} of {count}" for noun, i, count in places if count > 1] + [label])


class Bar:
    """A bar on a terminal; elsewhere a line when it begins to take long, and then every minute."""

    def __init__(self, bars: ProgressBars, label: str, total: int | None, unit: str):
        self.bars, self.label, self.total, self.unit = bars, label, total, unit
        self.done = 0
        self._bar: tqdm | None = None
        self._next_line = 0.0

    def __enter__(self) -> Bar:
        self._bar = tqdm(
            total=self.total,
            initial=self.done,
            desc=self.label,
            unit=self.unit,
            disable=not (self.bars.shown and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self._next_line = time.monotonic() + FIRST_LINE
        return self

    def advance(self, count: int = 1) -> None:
        self.done += count
        left = self.bars.left()
        estimate = "" if left is None else f"about {readable_time(left)} left"
        if estimate and self.bars.count > 1:
            estimate += f" for all {self.bars.count} videos"
        if not self._bar.disable:
            self._bar.set_postfix_str(estimate, refresh=False)
            self._bar.update(count)
        elif self.bars.shown and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            of_all = "" if self.total is None else f" of {self.total}"
            logger.info("%s: %s %d%s%s", self.label, self.unit, self.done, of_all, estimate and f"; {estimate}")

    def __exit__(self, *exception) -> None:
        self._bar.close()


class StepBar(Bar):
    """The steps of one part."""

    def start_at(self, step: int) -> None:
        """So many are done by an earlier run, or by an attempt before this one."""
        self.done = self.bars.done = step

    def __enter__(self) -> StepBar:
        self.bars._part_ended()
        super().__enter__()
        self._last, self._is_first = time.monotonic(), True
        return self

    def advance(self, count: int = 1) -> None:
        now = time.monotonic()
        self.bars.took(now - self._last, count, self._is_first)
        self._last, self._is_first = now, False
        super().advance(count)

    def advance_to(self, done: int) -> None:
        self.advance(done - self.done)

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        if exception[0] is None:
            self.bars.steps_ended()
