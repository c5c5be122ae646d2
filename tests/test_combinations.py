"""Plug-ins that are given together all act: take one away, and the frames are others."""

from pathlib import Path

import numpy
import pytest

import infer_face_swap
import infer_long_video
import infer_with_vace
from errors import UsageError
from pipelines.long_video import pipeline as long_video
from pipelines.vace.context import cover_frames
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests.frame_hash_cases import write_lora
from tests.test_batches import TINY, run
from tests.test_talk_dance_videos import write_sound
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


CLIPS = ("--height", 32, "--width", 48, "--num_frames", 9, "--num_inference_steps", 2, "--no_drift_report")


@pytest.fixture
def control(tmp_path) -> Path:
    """Twelve frames: two clips of a long video share one frame, so they end inside the second."""
    return write_clip(tmp_path / "control.mp4", frames=12)


def test_control_speech_and_poses_in_one_long_video(tmp_path, control):
    sound = write_sound(tmp_path / "speech.wav", 0.5)
    leads = {
        "control": ("--reference_video", control),
        "poses": ("--pose_path", control),
        "speech": ("--audio_path", sound),
    }
    always = (*CLIPS, "--config", "tiny-i2v", "--variant", "talk", "--num_clips", 2)
    together = frames_of(infer_long_video, tmp_path / "all.mp4", *always, *sum(leads.values(), ()))
    assert read_metadata(tmp_path / "all.mp4")["inputs"].keys() >= {"reference_video", "pose_path", "audio_path"}
    for name in ("control", "poses"):
        others = sum((flags for lead, flags in leads.items() if lead != name), ())
        frames = frames_of(infer_long_video, tmp_path / f"no-{name}.mp4", *always, *others)
        assert frames.shape == together.shape
        for clip in (slice(0, 9), slice(9, None)):
            assert abs(frames - together)[clip].mean() > 0.1, (name, clip)
    silent = (*sum(leads.values(), ()), "--audio_guidance_scale", 0, "--guidance_scale", 0)
    assert abs(frames_of(infer_long_video, tmp_path / "silent.mp4", *always, *silent) - together).mean() > 0.1


def test_a_clip_is_given_the_control_of_its_own_moments(tmp_path, control, monkeypatch):
    given, encode = [], long_video.encode_control

    def recorded(wan, bars, seen, window):
        given.append((seen.frames, window.length))
        return encode(wan, bars, seen, window)

    monkeypatch.setattr(long_video, "encode_control", recorded)
    with_control = ("--reference_video", control)
    frames_of(infer_long_video, tmp_path / "out.mp4", *CLIPS, *with_control)
    shown = [cover_frames(frame[None], 32, 48).numpy()[0] for frame in read_frames(control)]
    assert len(read_frames(tmp_path / "out.mp4")) == 12, "as long as the control"
    clips = [range(9), range(8, 12)]  # Shot hands one frame on
    assert [length for _, length in given] == [9, 9]
    for (frames, _), moments in zip(given, clips, strict=True):
        assert (frames == numpy.stack([shown[i] for i in moments])).all()
    three = ("--num_clips", 3)
    longer = frames_of(infer_long_video, tmp_path / "longer.mp4", *CLIPS, *with_control, *three)
    assert len(given[-1][0]) == 0, "the last clip begins where the control has ended"
    plain = frames_of(infer_long_video, tmp_path / "plain.mp4", *CLIPS, *three)
    weak = frames_of(infer_long_video, tmp_path / "weak.mp4", *CLIPS, *with_control, *three, "--vace_scale", 0)
    assert (weak == plain).all() and abs(longer - plain).mean() > 0.1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--vace_scale", 1), "--vace_scale: needs --reference_video"),
        (("--reference_video", "x.mp4", "--config", "tiny-i2v-a14b", "--variant", "2.0"), "tiny-i2v-a14b has two"),
        (("--reference_video", "x.mp4", "--variant", "shot"), "VACE was released for text-to-video models"),
    ],
)
def test_a_base_without_a_branch_is_refused_by_name(tmp_path, flags, reason):
    picture = ("--ref_image_path", FACE, "--prompt", "x")
    with pytest.raises(UsageError, match=reason):
        run(infer_long_video, *CLIPS, *picture, *flags, "--output", tmp_path / "out.mp4")
