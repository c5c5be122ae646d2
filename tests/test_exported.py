"""What train.py exports, in the script that takes it: the video is another, and without the file it is what it was."""

import importlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import train
from preprocess.video import read_frames
from tests.tiny_data import pictures, write_avatar_clip, write_clip, write_controlled_clip

SIZE = {"height": 64, "width": 64}
SMALL = ["--num_frames", 9, "--height", 64, "--width", 64, "--num_inference_steps", 2]
FACE = ["--config", "tiny", *SMALL, "--no_face_crop"]
# recipe, what of it is set, the file, and the command that takes it: script, flag, other flags.
CASES = {
    "lora": ("base", [], "lora", "infer_with_lora", "--lora_path", FACE),
    "picture": (
        *("base", ["model.config=tiny-i2v"], "lora", "infer_with_lora", "--lora_path"),
        ["--config", "tiny-i2v", *SMALL, "--image", "assets/face.png", "--prompt", "a face"],
    ),
    "base": ("base", ["train.trainable=full", "train.lora=null"], "transformer", "infer", "--base_path", FACE),
    "stand_in": ("stand_in", [], "stand_in", "infer", "--stand_in_path", FACE),
    "avatar": (
        *("avatar", [], "transformer", "infer_audio_avatar", "--transformer_path"),
        ["--config", "tiny-avatar", *SMALL[2:]],
    ),
    "vace": ("vace", [], "vace", "infer_with_vace", "--vace_path", ["--config", "tiny", *SMALL]),
    "error_recycling": (
        *("error_recycling", [], "lora", "infer_long_video", "--lora_path"),
        ["--config", "tiny-i2v", *SMALL, "--num_clips", 2],
    ),
    "vae": ("vae", [], "vae", "infer", "--vae_path", FACE),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """A folder of videos for each recipe."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("videos", "people", "talking", "svi", "control")}
    rows = ["Filename,Video Description"]
    for i in range(2):
        for name in ("videos", "people"):
            write_clip(roots[name] / f"{i}.mp4", **SIZE, seed=i, caption=f"Gradient number {i}")
        (roots["people"] / f"{i}.faces").mkdir()
        face = np.random.default_rng(i).integers(0, 256, (512, 512, 3)).astype(np.uint8)
        PIL.Image.fromarray(face).save(roots["people"] / f"{i}.faces" / "frame_0.png")
        write_avatar_clip(roots["talking"] / "speech" / str(i), 9, 25, **SIZE, seed=i)
        write_clip(roots["svi"] / "clips" / f"{i}.mp4", **SIZE, seed=i, caption=None)
        rows.append(f"{i}.mp4,Gradient number {i}")
        write_controlled_clip(roots["control"] / f"{i}.mp4", **SIZE, seed=i, control=255 - pictures(9, 64, 64, i))
    (roots["svi"] / "clips" / "clips.csv").write_text("\n".join(rows))
    kinds = {"stand_in": "people", "avatar": "talking", "error_recycling": "svi", "vace": "control"}
    return {recipe: roots[kinds.get(recipe, "videos")] for recipe in {case[0] for case in CASES.values()}}


def trained(recipe: str, folder: Path, output: Path, *sets: str) -> list[Path]:
    layout = {"avatar": "stableavatar", "error_recycling": "svi"}.get(recipe, "folder")
    given = [
        f"data.sources=[{{path: {folder}, layout: {layout}}}]",
        *(f"output={output}", "train.steps=4", "save.every=4", "optim.warmup=0", "optim.lr=0.05", "data.holdout=0"),
        *(() if recipe == "vae" else ("memory.checkpointing=none",)),
        *sets,
    ]
    command = ["--config", f"tiny-{recipe}", *(part for each in given for part in ("--set", each))]
    return train.main(train.parse_args(command))


def frames_of(script: str, output: Path, *flags: object) -> np.ndarray:
    module = importlib.import_module(script)
    module.main(module.parse_args([*map(str, flags), "--output", str(output)]))
    return read_frames(output).astype(float)


@pytest.mark.parametrize("name", CASES)
def test_the_file_changes_the_video_and_is_all_that_changes_it(data, tmp_path, name):
    recipe, sets, file, script, flag, flags = CASES[name]
    plain = "infer" if script == "infer_with_lora" else script
    before = frames_of(plain, tmp_path / "before.mp4", *flags)
    files = {path.stem: path for path in trained(recipe, data[recipe], tmp_path / "run", *sets)}
    with_it = frames_of(script, tmp_path / "with.mp4", *flags, flag, files[file])
    after = frames_of(plain, tmp_path / "after.mp4", *flags)
    assert np.abs(with_it - before).mean() > 0.01 * 255
    assert (after == before).all()
