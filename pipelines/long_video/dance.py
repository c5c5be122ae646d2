"""SVI-Dance: clips that are driven by a video of drawn poses. The maker that lets poses lead them.

Source: Stable-Video-Infinity `test_svi_dance.py`, `diffsynth/pipelines/svi_video_dance.py`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy
from torch import Tensor

from models.pose_embedder import PoseTokens
from models.wan.transformer import Plugin, WanTransformer
from pipelines.clip_plan import Clip, pose_indices
from pipelines.jobs import Job
from pipelines.long_video.pipeline import Existing, LongVideoMaker
from pipelines.memory import stage
from pipelines.wan import Wan
from preprocess.video import probe, stream_frames


class DanceMaker(LongVideoMaker):
    """Makes long videos of a person who moves as the poses do. Arguments as of `LongVideoMaker`."""

    def __init__(self, wan: Wan, text: dict[str, Tensor], picture: numpy.ndarray, existing: Existing | None = None):
        super().__init__(wan, text, picture, existing)
        self.embedder = wan.read_part("pose_embedder")
        self.num_poses = probe(self.settings.pose_path).num_frames
        with open(self.settings.pose_path, "rb") as file:
            self.pose_hash = hashlib.file_digest(file, "sha256").hexdigest()
        self.pose: PoseTokens | None = None  # of the clip that is being made

    def prepare_condition(self, clip: Clip, handed: Tensor | None, is_last: bool) -> None:
        super().prepare_condition(clip, handed, is_last)
        if self.settings.remove_pose:
            return
        settings, processes = self.settings, self.wan.processes
        # Where the video ends with the poses, the last clip may reach beyond them.
        starts_over = settings.video_frames is None
        indices = pose_indices(clip, settings.num_frames, self.num_poses, starts_over)
        poses = read_poses(settings.pose_path, indices, settings.height, settings.width)
        with stage("embedding the poses", "try a smaller size"):
            self.pose = self.embedder.to(self.wan.device).encode(poses)
        self.embedder.to("cpu")
        if processes.context_parallel:
            self.pose = self.pose.shard(processes.rank, processes.count)

    def plugins(self, index: int, transformer: WanTransformer) -> list[Plugin]:
        """The poses lead all guidance branches, as in upstream's script."""
        return [*super().plugins(index, transformer), *([] if self.pose is None else [self.pose])]

    def metadata(self, job: Job) -> dict:
        return super().metadata(job) | {"poses": self.pose_hash}  # sha256 of the file


def read_poses(path: str | Path, indices: Sequence[int], height: int, width: int) -> numpy.ndarray:
    """Chosen frames of a pose video at this size, (len(indices), H, W, 3) uint8; only these are kept in memory."""
    found = {}
    for index, frame in enumerate(stream_frames(path)):
        if index in indices:
            found[index] = fit_pose(frame, height, width)
        if index >= max(indices):
            break
    return numpy.stack([found[index] for index in indices])


def fit_pose(frame: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """Scale (h, w, 3) to fit inside, by the nearest pixel so that limbs keep their colours, and centre on black."""
    given_height, given_width = frame.shape[:2]
    scale = min(height / given_height, width / given_width)
    rows, columns = (max(1, int(side * scale)) for side in (given_height, given_width))
    row = numpy.arange(rows) * given_height // rows
    column = numpy.arange(columns) * given_width // columns
    fitted = numpy.zeros((height, width, 3), numpy.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    fitted[top : top + rows, left : left + columns] = frame[row][:, column]
    return fitted
