"""How much the people in pictures look like a photo: the cosine of ArcFace embeddings, one number for every method.

    python -m metrics.likeness me.jpg out.mp4 other.png

    scorer = FaceScorer(load_recogniser(), [read_image("me.jpg")])
    scorer.score(frames)                                 # FaceScore(value=0.61, with_face=8, pictures=8)

The same person usually has 0.5 and more, different people 0 to 0.3. Turned, small and covered faces have less.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from errors import InputError
from preprocess.face_detection import Face
from preprocess.image import read_image
from preprocess.video import probe, stream_frames

logger = logging.getLogger("selfsame")

SAMPLED_FRAMES = 8


@dataclass(frozen=True)
class FaceScore:
    """The likeness of some pictures."""

    value: float  # mean cosine over the pictures with a face; of several people the least alike one's; 0 without a face
    with_face: int  # pictures in which a face was found
    pictures: int

    def as_dict(self) -> dict:
        return {"cosine": round(self.value, 4), "frames_with_face": self.with_face, "frames_looked_at": self.pictures}

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.with_face} of {self.pictures} pictures with a face)"


def cosine(a: numpy.ndarray, b: numpy.ndarray) -> float:
    """Of two embeddings, normalised or not."""
    return float(numpy.dot(a, b) / max(numpy.linalg.norm(a) * numpy.linalg.norm(b), 1e-12))


class FaceScorer:
    """Compares pictures with the people of photos.

    Args:
        recogniser: from `load_recognizer`: picture -> faces with embeddings.
        photos: (H, W, 3) uint8 RGB, one a person; the largest face counts, or the `face_index`-th from the left.
        names: what messages call the photos.

    Raises:
        InputError: a photo without a face.
    """

    def __init__(
        self,
        recognizer: Callable[[numpy.ndarray], list[Face]],
        photos: Sequence[numpy.ndarray],
        face_index: int | None = None,
        names: Sequence[str] = (),
    ):
        from preprocess.face import choose_face

        self.recognizer = recognizer
        self.people = []  # embeddings (512,)
        for number, photo in enumerate(photos):
            name = names[number] if names else "the photo"
            faces = recognizer(photo)
            if not faces:
                raise InputError(f"no face found in {name}, so there is nothing to compare with; give another photo")
            self.people.append(choose_face(faces, face_index, name).embedding)

    def score(self, pictures: Iterable[numpy.ndarray]) -> FaceScore:
        """The likeness of (H, W, 3) uint8 pictures. In each, every person is compared with the face most like them."""
        likenesses = []  # (people,) of each picture with a face
        count = 0
        for picture in pictures:
            count += 1
            if faces := self.recognizer(picture):
                likenesses.append([max(cosine(person, f.embedding) for f in faces) for person in self.people])
        value = float(numpy.mean(likenesses, axis=0).min()) if likenesses else 0.0
        return FaceScore(value, len(likenesses), count)


def sample_pictures(path: str | Path) -> Iterator[numpy.ndarray]:
    """The picture, or some frames of the video at equal distances, (H, W, 3) uint8 each."""
    if Path(path).suffix.lower() == ".mp4":
        yield from sample_frames(path)
        return
    try:
        yield read_image(path, "file")
    except InputError:
        yield from sample_frames(path)


def sample_frames(path: str | Path) -> Iterator[numpy.ndarray]:
    every = math.ceil(probe(path).num_frames / SAMPLED_FRAMES)
    return itertools.islice(stream_frames(path), 0, None, every)


def main(argv: Sequence[str] | None = None) -> None:
    import argparse

    from preprocess.face_detection import load_recognizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("file", nargs="+", help="picture or video")
    parser.add_argument("--antelopv2_path", help="folder of the face models")
    parser.add_argument("--face_index", type=int, help="which face of the photo, from the left (the largest)")
    args = parser.parse_args(argv)
    recognizer = load_recognizer(args.antelopv2_path, "a face score")
    scorer = FaceScorer(recognizer, [read_image(args.photo, "photo")], args.face_index, [args.photo])
    for file in args.file:
        print(f"{file}: {scorer.score(sample_pictures(file))}")


if __name__ == "__main__":
    from errors import exit_codes

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with exit_codes():
        main()
