"""Windows over something long: what is made at one time, and what each shares with the one before. No model here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Frames `start` up to `stop`, of a video or its latents; the first `overlap` belong to the window before too."""

    start: int
    stop: int
    overlap: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


def plan_windows(length: int, window: int, overlap: int, *, cut_last: bool = False, start: int = 0) -> list[Window]:
    """Windows of one length that cover `length` frames from `start` on, each sharing at least `overlap` frames with the
    one before. What is not longer than one window is one window.

    Args:
        cut_last: end the last window where the frames end. Otherwise it is moved back until it is as long as the
            others, so that it shares more: a short one would be a worse video.
    """
    assert length > 0 and 0 <= overlap < window
    end = start + length
    windows = [Window(start, min(start + window, end))]
    while (made := windows[-1].stop) < end:
        stop = min(made - overlap + window, end)
        first = made - overlap if cut_last else stop - window
        windows.append(Window(first, stop, made - first))
    return windows
