"""What StableAvatar's data loader gives of a clip folder: pixels, masks, the sound, the prompt."""

import tempfile
import wave
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from models.audio_encoder import normalize_samples
from preprocess.video_writer import VideoWriter
from training.clips import View, read_frames, read_masks, read_sound
from training.data import Sample
from training.encodings import pixels
from training.facts import measure
from training.layouts import list_videos
from training.sampler import Bucket


def write_folder(case, clip: Path) -> None:
    """The case's clip as it lies on a disk: frame_0.png, …, masks of the same names, audio.wav, sub_clip.mp4."""
    images = case.inputs["images"].numpy().astype(np.uint8)
    for folder, frames in (("images", images), ("face_masks", None), ("lip_masks", None)):
        (clip / folder).mkdir(parents=True)
        missing = case.config.get(f"missing_{folder}", ())
        for number, frame in enumerate(case.inputs[folder].numpy().astype(np.uint8) if frames is None else frames):
            if number not in missing:
                PIL.Image.fromarray(frame).save(clip / folder / f"frame_{number}.png")
    samples = case.inputs["audio"].numpy()
    with wave.open(str(clip / "audio.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.rint(samples * 32768).clip(-32768, 32767).astype("<i2").tobytes())
    with VideoWriter(clip / "sub_clip.mp4", fps=case.config["fps"]) as video:
        video.write(images)


def check_dataset_sample(case) -> None:
    config = case.config
    with tempfile.TemporaryDirectory() as root:
        write_folder(case, Path(root, config["category"], "00001"))
        (listed,) = list_videos(root, "stableavatar")
        assert listed.caption == config["text_prompt"]
        bucket = Bucket(config["height"], config["width"], config["n_sample_frames"])
        sample = Sample(listed, measure(listed), bucket, 0)
        assert sample.facts.num_frames == len(case.inputs["images"]) and abs(sample.facts.fps - config["fps"]) < 1e-3
        view = View(sample, config["start_idx"], fit="resize")
        frames, sound = read_frames(view), read_sound(view)
        masks = {kind: read_masks(view, kind) for kind in ("face", "lip")}
    video = pixels(frames)[0].transpose(0, 1)  # (T, 3, H, W)
    case.check("pixel_values", video)
    case.check("reference_image", video[0])
    case.check("clip_pixel_values", torch.from_numpy(frames[0].copy()).float())
    # The first frame is known, of the others nothing: what `encodings.first_frame` keeps the latents of.
    known = torch.ones(len(video), 1, *video.shape[2:])
    known[0] = 0
    case.check("pixel_value_masks", known)
    case.check("masked_pixel_values", video * (1 - known))
    for kind, mask in masks.items():
        case.check(f"tgt_{kind}_masks", torch.from_numpy(mask)[None])
    case.check("vocal_input_values", torch.from_numpy(normalize_samples(sound))[None])
    # A measure of motion that upstream computes and no part of training reads; so nothing of ours computes it.
    pairs = [(i, i + 8) for i in range(0, len(video) - 8, 8)] + [(0, -1)]
    cosines = [F.cosine_similarity(video[a].flatten(), video[b].flatten(), dim=0) for a, b in pairs]
    case.check("motion_id", 100 * (1 - (torch.stack(cosines) + 1).mean() / 2))


CHECKS = {"stableavatar_dataset_sample": check_dataset_sample}
