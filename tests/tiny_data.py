"""Small sets of training videos, whole and broken."""

import json
import wave
from pathlib import Path

import numpy as np
import PIL.Image

from preprocess.video_writer import VideoWriter


def pictures(num_frames=9, height=48, width=64, seed=0) -> np.ndarray:
    """A gradient that moves, another for each seed: (F, H, W, 3) uint8."""
    rows, columns = np.mgrid[:height, :width]
    color = np.random.default_rng(seed).integers(40, 216, 3)
    frames = [(rows[..., None] + 3 * columns[..., None] + 5 * i + color) % 256 for i in range(num_frames)]
    return np.stack(frames).astype(np.uint8)


def write_clip(path: Path, num_frames=9, fps=16, height=48, width=64, seed=0, caption="A gradient moves", audio=None):
    """A video, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=fps, quality=9, audio_path=audio) as video:
        video.write(pictures(num_frames, height, width, seed))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_sound(path: Path, seconds=1.0, channels=1, volume=0.3, rate=16000, seed=0) -> Path:
    """A tone; of two channels each has its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * (200 + 70 * channel + seed) * times) for channel in range(channels)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.stack(tones, axis=1).__mul__(volume * 32767).astype("<i2").tobytes())
    return path


def write_avatar_clip(folder: Path, num_frames=9, fps=25, height=48, width=64, seed=0, masks=("face", "lip")) -> Path:
    """A clip folder as StableAvatar's data have it."""
    frames = pictures(num_frames, height, width, seed)
    (folder / "images").mkdir(parents=True)
    for i, frame in enumerate(frames):
        PIL.Image.fromarray(frame).save(folder / "images" / f"frame_{i}.png")
    for kind in masks:
        (folder / f"{kind}_masks").mkdir()
        for i in range(num_frames):
            mask = np.zeros((height, width), np.uint8)
            mask[8 + i : 30, 10:40] = 255
            PIL.Image.fromarray(mask).save(folder / f"{kind}_masks" / f"frame_{i}.png")
    write_sound(folder / "audio.wav", num_frames / fps, seed=seed)
    write_clip(folder / "sub_clip.mp4", num_frames, fps, height, width, seed, caption=None)
    return folder


def write_controlled_clip(path: Path, references=(), height=48, width=64, seed=0, **videos: np.ndarray) -> Path:
    """A clip of nine frames with what controls it: `control` and `mask` videos, and pictures."""
    write_clip(path, height=height, width=width, seed=seed)
    for kind, frames in videos.items():
        with VideoWriter(path.with_suffix(f".{kind}.mp4"), fps=16, quality=10) as video:
            video.write(frames)
    for number, picture in enumerate(references):
        path.with_suffix(".references").mkdir(exist_ok=True)
        PIL.Image.fromarray(picture).save(path.with_suffix(".references") / f"{number}.png")
    return path


def write_captions(root: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
