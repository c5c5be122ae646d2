"""Whether every recipe learns: each overfits a few tiny clips, and its loss at fixed noise falls to a third.

    python -m benchmarks.training_overfit                         all recipes, a table (two cores: some minutes)
    python -m benchmarks.training_overfit base vae --steps 400

The loss is that of the training clips at noise levels and noise that training never draws. A base that is random itself
is a hard one to adapt: what an adapter can reach on it is less than on a trained one, and the table says what it was.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy
import PIL.Image
import torch

from preprocess.video_writer import VideoWriter
from training.batches import Batches, build_cache
from training.build import recipe_of
from training.cache import Cache
from training.config import Config, read_config
from training.config_recipes import RECIPES
from training.data import cache_folder, read_samples
from training.encoders import encoders_of
from training.encodings import encodings_of
from training.loop import train, weights_to_use
from training.start import held_out_loss, make_run

CLIPS, FRAMES, SIDE = 2, 9, 64
GOAL = 1 / 3
LAYOUTS = {"avatar": "stableavatar", "error_recycling": "svi"}
# What is set beside the tiny configuration, so that there is something to learn and enough that learns.
SETS = {
    "base": ["train.trainable=full", "train.lora=null", "optim.lr=3e-3"],
    "vae": ["optim.lr=3e-3", "data.frames=[5]"],
    "stand_in": [],
    "avatar": ["train.trainable=full", "optim.lr=3e-3"],
    "vace": ["optim.lr=3e-3"],
    "error_recycling": ["train.lora.rank=32", "train.lora.alpha=32"],
}


def write_videos(root: Path, recipe: str) -> None:
    """A few clips of moving stripes, in the recipe's layout, with all that it reads."""
    rows, columns = numpy.mgrid[:SIDE, :SIDE]
    table = ["Filename,Video Description"]
    for clip in range(CLIPS):
        color = numpy.random.default_rng(clip).integers(40, 216, 3)
        picture = rows[..., None] * (clip + 1) + 4 * columns[..., None] + color
        frames = numpy.stack([(picture + 6 * i) % 256 for i in range(FRAMES)]).astype(numpy.uint8)
        name = f"{clip}.mp4"
        if recipe == "avatar":
            folder = root / "speech" / str(clip)
            for kind in ("images", "face_masks", "lip_masks"):
                (folder / kind).mkdir(parents=True)
                for i, frame in enumerate(frames):
                    picture = frame if kind == "images" else numpy.full((SIDE, SIDE), 255, numpy.uint8)
                    PIL.Image.fromarray(picture).save(folder / kind / f"frame_{i}.png")
            write_tone(folder / "audio.wav", 300 + 200 * clip)
            continue
        folder = root / "clips" if recipe == "error_recycling" else root
        write_video(folder / name, frames)
        table.append(f"{name},Stripes number {clip}")
        (folder / name).with_suffix(".txt").write_text(f"Stripes number {clip}", encoding="utf-8")
        if recipe == "vace":
            write_video(folder / f"{clip}.control.mp4", 255 - frames)
        if recipe == "stand_in":
            (root / f"{clip}.faces").mkdir()
            face = numpy.random.default_rng(clip).integers(0, 256, (512, 512, 3)).astype(numpy.uint8)
            PIL.Image.fromarray(face).save(root / f"{clip}.faces" / "frame_0.png")
    if recipe == "error_recycling":
        (root / "clips" / "clips.csv").write_text("\n".join(table), encoding="utf-8")


def write_video(path: Path, frames: numpy.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=16, quality=10) as video:
        video.write(frames)


def write_tone(path: Path, pitch: float) -> None:
    import wave

    samples = 0.3 * 32767 * numpy.sin(2 * numpy.pi * pitch * numpy.arange(16000 * FRAMES // 25) / 16000)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.astype("<i2").tobytes())


def configuration(recipe: str, root: Path, steps: int) -> Config:
    given = [
        f"data.sources=[{{path: {root}, layout: {LAYOUTS.get(recipe, 'folder')}}}]",
        f"output={root / 'run'}",
        f"train.steps={steps}",
        f"save.every={steps}",
        "data.holdout=0",
        *(() if recipe == "vae" else ("memory.checkpointing=none", "data.text_drop=0", "validate.quantiles=5")),
        *SETS[recipe],
    ]
    return read_config(f"tiny-{recipe}", given)


def overfit(recipe: str, steps: int) -> tuple[float, float, float]:
    """(loss at the start, loss at the end, seconds)."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_videos(root, recipe)
        config, device = configuration(recipe, root, steps), torch.device("cpu")
        data, cache = read_samples(config), None
        if config.vae is None:
            cache = Cache(cache_folder(config), encodings_of(config), encoders_of(config.model, device))
            build_cache(cache, config, data)
        known = dataclasses.replace(data, held_out=data.samples)
        with Batches(config, data, cache, device) as batches:
            run, trainee = make_run(config, data, batches, device, 0)
            losses, begun = [], time.monotonic()
            for step in (0, steps):
                if step:
                    train(run)
                with weights_to_use(run):
                    found = held_out_loss(run, recipe_of(config), trainee, known, batches.maker, step)
                losses.append(found["loss"])
    return losses[0], losses[1], time.monotonic() - begun


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []], default=[], metavar="RECIPE")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    logging.getLogger("selfsame").setLevel(logging.ERROR)
    print(f"{'recipe':<18}{'start':>9}{'end':>9}{'ratio':>8}{'seconds':>9}")
    for recipe in args.recipes or RECIPES:
        start, end, seconds = overfit(recipe, args.steps)
        verdict = "" if end < GOAL * start else "   more than a third"
        print(f"{recipe:<18}{start:>9.4f}{end:>9.4f}{end / start:>8.3f}{seconds:>9.1f}{verdict}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
