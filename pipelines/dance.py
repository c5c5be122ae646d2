"""SVI-Dance: the pose video that leads a chain of clips."""

from collections.abc import Sequence
from pathlib import Path

import numpy

from pipelines.video_file import read_frames


def read_poses(path: str | Path, indices: Sequence[int], height: int, width: int) -> numpy.ndarray:
    """Chosen frames of a pose video, (len(indices), H, W, 3) uint8.

    Only these are decoded into memory; each run of consecutive frames is one pass over the file.
    """
    runs: list[range] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    frames = {run: read_frames(path, run) for run in dict.fromkeys(runs)}
    return fit_poses(numpy.concatenate([frames[run] for run in runs]), height, width)


def fit_poses(frames: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """Scale (T, h, w, 3) to fit inside, by the nearest pixel so that limbs keep their colours, and centre on black."""
    given_height, given_width = frames.shape[1:3]
    scale = min(height / given_height, width / given_width)
    rows, columns = (max(1, int(side * scale)) for side in (given_height, given_width))
    row = numpy.arange(rows) * given_height // rows
    column = numpy.arange(columns) * given_width // columns
    fitted = numpy.zeros((len(frames), height, width, 3), numpy.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    fitted[:, top : top + rows, left : left + columns] = frames[:, row][:, :, column]
    return fitted
