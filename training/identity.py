"""The person in each prepared video: pictures of the face, their embeddings, and who looks like whom.

Training pairs a video with a face from another clip of the same person: alike enough to be one (0.5), and not so alike
that it is the same shot (Concat-ID: 0.97). Where there is no other clip, the face is from a distant frame.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy

from errors import InputError
from metrics.likeness import cosine
from preprocess.face import Parser, prepare_face
from preprocess.face_detection import Detector
from preprocess.image import write_png
from preprocess.output import whole_file
from training.layouts import IDENTITY

LEAST_ALIKE = 0.3  # different people have less: such pairs are not listed
MOST_OTHERS = 50  # of each video, the most alike
ROWS = 1024  # of the similarity matrix at a time


@dataclass(frozen=True)
class People:
    """The person in a video, by frame."""

    frames: tuple[int, ...]
    embeddings: numpy.ndarray | None  # (K, 512); None without a recogniser

    @property
    def mean(self) -> numpy.ndarray | None:
        """(512,) of length 1."""
        if self.embeddings is None:
            return None
        each = self.embeddings / numpy.linalg.norm(self.embeddings, axis=1, keepdims=True)
        total = each.sum(axis=0)
        return total / max(numpy.linalg.norm(total), 1e-12)

    def within(self) -> list[tuple[int, int, float]]:
        """(frame, later frame, similarity of the faces)."""
        if self.embeddings is None:
            return []
        pairs = [(i, j) for i in range(len(self.frames)) for j in range(i + 1, len(self.frames))]
        found = [(i, j, cosine(self.embeddings[i], self.embeddings[j])) for i, j in pairs]
        return [(self.frames[i], self.frames[j], round(value, 4)) for i, j, value in found]


def frames_to_look_at(num_frames: int, count: int) -> list[int]:
    """Frames far apart, the first and the last among them."""
    return numpy.unique(numpy.linspace(0, num_frames - 1, count).round().astype(int)).tolist()


def write_faces(folder: Path, frames: Mapping[int, numpy.ndarray], detector: Detector, parser: Parser) -> People | None:
    """The face of each of these frames, as an identity model is given it, as folder/frame_N.png; None if there is none.

    Args:
        detector: one whose faces carry embeddings tells whom they are of.
    """
    seen, embeddings = [], []
    for number, frame in frames.items():
        try:
            face = prepare_face(frame, detector, parser, name=f"frame {number}")
        except InputError:  # no face in it, or nothing left of the person
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"frame_{number}.png", face.rgb, overwrite=True)
        seen.append(number)
        embeddings.append(face.face.embedding)
    if not seen:
        return None
    has_embeddings = all(embedding is not None for embedding in embeddings)
    return People(tuple(seen), numpy.stack(embeddings) if has_embeddings else None)


def alike(people: Mapping[str, People]) -> list[tuple[str, str, float]]:
    """Pairs of videos whose people are alike, most alike first for each; a pair is there once."""
    names = [name for name, one in people.items() if one.mean is not None]
    if not names:
        return []
    means = numpy.stack([people[name].mean for name in names]).astype(numpy.float32)  # (N, 512)
    found = {}
    for start in range(0, len(names), ROWS):
        rows = means[start : start + ROWS] @ means.T  # (R, N)
        rows[numpy.arange(len(rows)), numpy.arange(start, start + len(rows))] = -2  # not with itself
        best = numpy.argsort(-rows, axis=1, kind="stable")[:, :MOST_OTHERS]
        for row, others in enumerate(best):
            for other in others[rows[row, others] >= LEAST_ALIKE]:
                pair = tuple(sorted((start + row, int(other))))
                found[pair] = round(float(rows[row, other]), 4)
    return [(names[i], names[j], value) for (i, j), value in sorted(found.items(), key=lambda one: (-one[1], one[0]))]


def write_identity(root: Path, people: Mapping[str, People]) -> int:
    """Write who looks like whom; nothing, where nobody was recognised. Returns how many pairs there are."""
    pairs = alike(people)
    within = {name: one.within() for name, one in people.items() if one.embeddings is not None}
    if not within:
        (root / IDENTITY).unlink(missing_ok=True)
        return 0
    with whole_file(root / IDENTITY) as part:
        part.write_text(json.dumps({"pairs": pairs, "within": within}, indent=0) + "\n", encoding="utf-8")
    return len(pairs)


def people_from_json(entry: Mapping | None) -> People | None:
    """What `people_to_json` made."""
    if entry is None:
        return None
    embeddings = entry["embeddings"]
    return People(tuple(entry["frames"]), None if embeddings is None else numpy.asarray(embeddings, numpy.float32))


def people_to_json(people: People | None) -> dict | None:
    if people is None:
        return None
    embeddings = None if people.embeddings is None else [[float(f"{v:.6g}") for v in row] for row in people.embeddings]
    return {"frames": list(people.frames), "embeddings": embeddings}
