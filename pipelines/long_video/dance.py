"""Clips that are driven by a video of drawn poses (SVI-Dance): what leads a whole video, and what leads a clip.

Source: Stable-Video-Infinity `test_svi_dance.py`, `diffsynth/pipelines/svi_video_dance.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from models.pose_embedder import PoseEmbedder, PoseTokens
from pipelines.clip_plan import Clip, pose_indices
from pipelines.memory import stage
from pipelines.wan import Wan
from preprocess.video import probe, stream_frames


@dataclass(frozen=True)
class Poses:
    """What leads a whole video.

    embedder: on the CPU between clips.
    sha256: of the pose video's file.
    """

    embedder: PoseEmbedder
    num_frames: int
    sha256: str


def open_poses(wan: Wan) -> Poses:
    """Read the embedder, and look at the pose video of the settings."""
    path = wan.settings.pose_path
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Poses(wan.read_part("pose_embedder"), probe(path).num_frames, sha256)


def pose_plugins(wan: Wan, poses: Poses, clip: Clip) -> list[PoseTokens]:
    """What leads a clip, in all guidance branches, as in upstream's script; nothing where --remove_pose says so."""
    settings, processes = wan.settings, wan.processes
    if settings.remove_pose:
        return []
    # Where the video ends with the poses, the last clip may reach beyond them.
    starts_over = settings.video_frames is None or settings.audio_path is not None
    indices = pose_indices(clip, settings.num_frames, poses.num_frames, starts_over)
    frames = read_poses(settings.pose_path, indices, settings.height, settings.width)
    with stage("embedding the poses", "try a smaller size"):
        tokens = poses.embedder.to(wan.device).encode(frames)
    poses.embedder.to("cpu")
    return [tokens.shard(processes.rank, processes.count) if processes.context_parallel else tokens]


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
