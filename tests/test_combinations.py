"""Plug-ins that are given together all act: take one away, and the frames are others."""

from pathlib import Path

import numpy
import pytest

import infer_face_swap
import infer_with_vace
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests.frame_hash_cases import write_lora
from tests.test_batches import TINY, run
from tests.test_vace import write_clip

FACE = str(Path(__file__).parent.parent / "assets" / "face.png")


@pytest.fixture
def lora(tmp_path) -> Path:
    write_lora(tmp_path / "style.safetensors", seed=1)
    return tmp_path / "style.safetensors"


def frames_of(script, output: Path, *flags) -> numpy.ndarray:
    run(script, *flags, "--output", output)
    return read_frames(output).astype(int)


def test_several_people_control_and_a_lora(tmp_path, lora):
    """Stand-In twice, VACE and a community LoRA in one video."""
    write_clip(tmp_path / "control.mp4")
    control = ("--reference_video", tmp_path / "control.mp4", "--vace_scale", 1)
    people, style = ("--ip_image", FACE, FACE), ("--lora_path", lora)
    always = (*TINY, "--no_face_crop")
    together = frames_of(infer_with_vace, tmp_path / "all.mp4", *always, *control, *people, *style)
    record = read_metadata(tmp_path / "all.mp4")
    assert str(lora) in record["weights"] and record["settings"]["ip_image"] == [FACE, FACE]
    without = {
        "one person": (*control, "--ip_image", FACE, *style),
        "nobody": (*control, "--config", "tiny", "--identity_strength", 0, *people, *style),
        "no control": ("--vace_scale", 0, *control[:2], *people, *style),
        "no LoRA": (*control, *people),
    }
    for number, (name, flags) in enumerate(without.items()):
        frames = frames_of(infer_with_vace, tmp_path / f"{number}.mp4", *always, *flags)
        assert abs(frames - together).mean() > 0.1, name


def test_a_face_swap_with_a_lora(tmp_path, lora):
    small = ("--num_frames", 5, "--num_inference_steps", 2, "--no_composite")
    plain = frames_of(infer_face_swap, tmp_path / "plain.mp4", *small)
    styled = frames_of(infer_face_swap, tmp_path / "styled.mp4", *small, "--lora_path", lora)
    assert abs(styled - plain).mean() > 0.1
    none = frames_of(infer_face_swap, tmp_path / "none.mp4", *small, "--lora_path", lora, "--lora_scale", 0)
    assert (none == plain).all()
