"""README's way from raw videos to an identity adapter in use, on the tiny model and without downloads."""

import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import infer
import train
from preprocess.image import read_image
from preprocess.video import read_frames
from preprocess.video_writer import VideoWriter
from training import data, prepare
from training.clips import find_faces

PROJECT = Path(__file__).parent.parent


def write_raw(path: Path, seconds: float = 1.0, rate: int = 24, side: int = 256) -> None:
    """The face of assets/, coming nearer."""
    face = PIL.Image.fromarray(read_image(PROJECT / "assets" / "face.png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=rate, quality=9) as video:
        for i in range(int(seconds * rate)):
            edge = i / 4
            box = (edge, edge, face.width - edge, face.height - edge)
            video.write(np.asarray(face.resize((side, side), PIL.Image.BICUBIC, box))[None])


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """Those of README: prepare, train, infer."""
    text = (PROJECT / "README.md").read_text("utf-8")
    block = text[text.index("from a folder `raw` of your own videos") :].split("```")[1]
    found = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("python")]
    assert [words[0] if words[0] != "-m" else words[1] for words in found] == [
        "training.prepare",
        "train.py",
        "infer.py",
    ]
    return [words[2:] if words[0] == "-m" else words[1:] for words in found]


def test_from_raw_videos_to_an_adapter_in_use(commands, tmp_path, monkeypatch):
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(PROJECT / name)
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write_raw(Path("raw") / f"{number}.mp4")
    prepare.main(prepare.parse_arguments(commands[0]))
    faces = [find_faces(folder) for folder in sorted(Path("data/people").glob("*.faces"))]
    assert faces and all(faces)  # found in the raw frames: in clips of 64x64 pixels the cascade sees none
    data.main(data.parse_arguments(["check", "data/people", "--config", "tiny-stand_in"]))
    few = ["train.steps=4", "save.every=4", "optim.lr=0.05", "optim.warmup=0", "data.holdout=0"]
    train.main(train.parse_args([*commands[1], *(part for each in few for part in ("--set", each))]))
    size = ["--height", "64", "--width", "64", "--num_inference_steps", "2"]
    infer.main(infer.parse_args([*commands[2], *size, "--output", "with.mp4"]))
    infer.main(infer.parse_args(["--config", "tiny", *size, "--output", "without.mp4"]))
    assert np.abs(read_frames("with.mp4").astype(float) - read_frames("without.mp4")).mean() > 1
