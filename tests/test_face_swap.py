"""Face swap: its plans and masks by themselves, and infer_face_swap.py end to end on the tiny model."""

import math
import os
import struct
import subprocess
import sys
import time
import wave
from pathlib import Path

import cv2
import numpy
import pytest
import torch
from PIL import Image

import infer_face_swap
from errors import UsageError, UserError
from pipelines.face_swap import pipeline as face_swap
from pipelines.face_swap.command import make_demo_clip, resolve_face_swap
from pipelines.face_swap.pipeline import (
    Segment,
    WindowedExpert,
    frame_groups,
    plan_segments,
    swap_schedule,
)
from pipelines.job_state import JobState
from pipelines.windows import plan_windows
from preprocess.face_detection import Face
from preprocess.face_paste import (
    align,
    composite,
    fill_gaps,
    find_cuts,
    follow_face,
    match_colors,
    paste_aligned,
    soften,
)
from preprocess.ffmpeg import run_ffmpeg
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import VideoWriter, write_video
from tests.test_input_videos import encode, ffmpeg

PROJECT = Path(__file__).parent.parent
FEW = ["--num_inference_steps", "2", "--num_frames", "17"]
KEEP = "--force_background_consistency"

# ------------------------------------------------------------------------------------------------------------ plans


def test_segments_hold_every_frame_with_a_face_and_no_other():
    has_face = [bool(int(c)) for c in "0111110011000001"]
    segments = plan_segments(has_face)
    assert [(s.start, s.stop) for s in segments] == [(1, 6), (8, 10), (15, 16)]
    assert [s.latents for s in segments] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert plan_segments([False] * 5) == []


def test_a_cut_splits_a_stretch():
    segments = plan_segments([bool(int(c)) for c in "011111101111"], cuts=[0, 3, 4, 7, 9])
    assert [(s.start, s.stop) for s in segments] == [(1, 3), (3, 4), (4, 7), (8, 9), (9, 12)]
    assert [s.first_latent for s in segments] == [0, 2, 3, 5, 6]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 13, 16])
def test_frame_groups_are_the_latent_frames(count):
    groups = frame_groups(count)
    assert [i for group in groups for i in group] == list(range(count))
    latents = Segment(0, count, 0).latents
    assert len(groups) == latents.stop - latents.start


@pytest.mark.parametrize(("count", "length", "overlap"), [(5, 8, 3), (8, 8, 3), (9, 8, 3), (50, 21, 6), (7, 1, 0)])
def test_windows_cover_the_stretch_with_overlap(count, length, overlap):
    windows = plan_windows(count, length, overlap, start=10)
    assert {i for w in windows for i in range(w.start, w.stop)} == set(range(10, 10 + count))
    assert {w.stop - w.start for w in windows} == {min(count, length)}
    assert all(b.start <= a.stop - overlap for a, b in zip(windows, windows[1:], strict=False))
    assert len({w.start for w in windows}) == len(windows)


def test_windows_of_a_model_that_looks_at_single_frames_change_nothing():
    class FrameByFrame:
        def velocity(self, sample, timestep, step, num_steps, condition=None):
            return sample.sin()

    sample = torch.randn(1, 4, 23, 2, 2, generator=torch.Generator().manual_seed(0))
    expert = WindowedExpert(FrameByFrame(), [window.span for window in plan_windows(23, 6, 2)])
    torch.testing.assert_close(expert.velocity(sample, torch.ones(1), 0, 1), sample.sin())


@pytest.mark.parametrize("solver", ["euler", "euler-flow", "unipc", "dpm++"])
def test_strength_is_where_the_schedule_starts(solver):
    class settings:  # noqa: N801
        num_inference_steps, shift, timesteps = 10, 1.0, None

    settings.solver, settings.denoising_strength = solver, 0.6
    schedule = swap_schedule(settings)
    assert schedule.sigmas[0] == pytest.approx(0.6, abs=0.07)
    assert schedule.num_steps == (10 if solver == "euler" else 6)
    settings.timesteps = (1000.0, 750.0, 500.0, 250.0)
    assert schedule.sigmas[-1] == 0
    assert swap_schedule(settings).sigmas.tolist() == [0.5, 0.25, 0]
    settings.denoising_strength = 0.1
    with pytest.raises(UsageError, match="--denoising_strength 0.1"):
        swap_schedule(settings)


# ------------------------------------------------------------------------------------------------- faces and masks


def face_at(x, y=10, size=20, score=0.9):
    return Face((x, y, x + size, y + size), score)


def test_one_person_is_followed():
    left, right = face_at(0), face_at(100, size=30)
    frames = [[], [right, left], [face_at(5)], [face_at(98, size=30)], [face_at(103, size=31), face_at(8)]]
    assert [f and f.box[0] for f in follow_face(frames, 0)] == [None, 0, 5, None, 8]
    assert [f and f.box[0] for f in follow_face(frames, 1)] == [None, 100, None, 98, 103]
    assert [f and f.box[0] for f in follow_face(frames)] == [None, 100, 5, 98, 103]
    assert follow_face([[face_at(0, score=0.4)]]) == [None]
    shots = [[left], [right, left], [right, left]]
    assert [f.box[0] for f in follow_face(shots)] == [0, 0, 0]
    assert [f.box[0] for f in follow_face(shots, cuts=[2])] == [0, 0, 100]
    assert [f.box[0] for f in follow_face(shots, 0, cuts=[2])] == [0, 0, 0], "the chosen one, where anybody is there"
    with pytest.raises(UsageError, match="--target_face_index 2: frame 1"):
        follow_face(frames, 2)


def test_short_gaps_are_filled_and_cuts_are_not():
    filled = fill_gaps([face_at(0), None, face_at(4), None, face_at(90), *[None] * 9, face_at(90)])
    assert filled[1].box == (2, 10, 22, 30)
    assert filled[3] is None
    assert filled[5:14] == [None] * 9
    beside_a_cut = [face_at(0), None, face_at(4), None, face_at(8)]
    assert [f is None for f in fill_gaps(beside_a_cut, cuts=[1])] == [False, True, False, False, False]
    assert [f is None for f in fill_gaps(beside_a_cut, cuts=[4])] == [False, False, False, True, False]


def test_cuts_are_found_and_movement_is_none():
    random = numpy.random.default_rng(0)
    places = [cv2.resize(random.integers(0, 256, (9, 16, 3)).astype(numpy.uint8), (640, 360)) for _ in range(3)]

    def pan(place, count, speed):
        frames = numpy.stack([numpy.roll(place, speed * i, axis=1)[:180, :320] for i in range(count)])
        return numpy.clip(frames + random.normal(0, 6, frames.shape), 0, 255).astype(numpy.uint8)

    calm = [pan(place, count, 2) for place, count in zip(places, (9, 2, 7), strict=True)]
    assert find_cuts(numpy.concatenate(calm)) == [9, 11]
    assert find_cuts(numpy.concatenate([pan(places[0], 9, 8), pan(places[1], 9, 8)])) == [9]
    assert find_cuts(pan(places[0], 12, 80)) == [], "a fast pan"
    assert find_cuts(random.integers(0, 256, (6, 60, 80, 3)).astype(numpy.uint8)) == []
    dark = pan(places[0], 6, 2) // 16
    assert find_cuts(numpy.concatenate([dark, dark * 0])) == [], "too dark to tell"
    slowly = numpy.stack([(places[0] * (1 - i / 24.0)).astype(numpy.uint8) for i in range(25)])
    assert find_cuts(slowly) == [], "a fade"
    for few in (0, 1, 2):
        assert find_cuts(calm[0][:few]) == []
    assert find_cuts(numpy.stack([places[0], places[1]])) == [1]


def test_alignment_turns_scales_and_shifts():
    source = numpy.float32([[20, 20], [44, 20], [32, 32], [24, 44], [40, 44]])
    angle, scale, shift = 0.3, 0.5, (30, 12)
    turn = scale * numpy.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = align(source, source @ turn.T + shift)
    numpy.testing.assert_allclose(matrix, numpy.column_stack([turn, shift]), atol=1e-4)
    assert align(None, source) is None
    rgba = numpy.full((64, 64, 4), 200, numpy.uint8)
    rgba[..., 3] = 255
    frame = numpy.zeros((48, 80, 3), numpy.uint8)
    pasted, mask = paste_aligned(frame, numpy.float64([[1, 0, 40], [0, 1, -10]]), rgba)  # partly outside
    assert (mask[:, 40:] == 255).all()
    assert not mask[:, :40].any()
    assert (pasted[mask == 255] == 200).all()
    outside, mask = paste_aligned(frame, numpy.float64([[1, 0, 400], [0, 1, 0]]), rgba)
    assert (outside == frame).all()
    assert not mask.any()


def test_composite_touches_nothing_outside_the_mask_and_matches_colors():
    random = numpy.random.default_rng(0)
    original = random.integers(60, 200, (96, 96, 3)).astype(numpy.uint8)
    mask = numpy.zeros((96, 96), numpy.uint8)
    mask[40:56, 40:56] = 255
    soft = soften(mask)
    assert (soft[mask > 0] > 127).all()
    assert soft[48, 32] > 0, "not widened by one latent cell"
    assert not soft[48, :15].any()
    darker = (original * 0.6).astype(numpy.uint8)
    mixed = composite(original, darker, soft)
    assert (mixed[soft == 0] == original[soft == 0]).all()
    region = soft > 127
    matched = match_colors(darker, original, region)
    before, after = (abs(p[region].mean() - original[region].mean()) for p in (darker, matched))
    assert after < 0.4 * before
    assert match_colors(darker, original, numpy.zeros((96, 96), bool)) is darker


# ------------------------------------------------------------------------------------------------------ end to end


def write_tone(path: Path, seconds: float, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        samples = (int(9000 * math.sin(2 * math.pi * 440 * i / rate)) for i in range(round(seconds * rate)))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return path


def sound(path) -> numpy.ndarray:
    return numpy.frombuffer(run_ffmpeg("-i", path, "-f", "s16le", "-ac", "1", "-ar", "16000", "pipe:1").stdout, "<i2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """14 frames of 152x150 at 25 fps with a tone: no side is a multiple of 16, the length not 4n+1."""
    folder = tmp_path_factory.mktemp("clip")
    frames = read_frames(make_demo_clip(folder / "demo.mp4", side=152))[:, :150]
    write_video(folder / "clip.mp4", [frames], fps=25, audio_path=write_tone(folder / "tone.wav", 14 / 25))
    return folder / "clip.mp4"


@pytest.fixture
def written(monkeypatch):
    """The frames as they go to the encoder."""
    pieces = []
    write = VideoWriter.write

    def record(self, frames):
        pieces.append(numpy.array(frames))
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", record)

    def take() -> numpy.ndarray:
        frames = numpy.concatenate(pieces)
        pieces.clear()
        return frames

    return take


def swap(output, video, *flags):
    arguments = [*FEW, "--input_video", video, "--output", output, *flags]
    assert infer_face_swap.main(infer_face_swap.parse_args([str(a) for a in arguments])) == [output]


def test_background_is_the_inputs_bit_for_bit_and_all_else_of_the_file_too(tmp_path, clip, written, monkeypatch):
    makers = []
    monkeypatch.setattr(face_swap.FaceSwapMaker, "make", recording(face_swap.FaceSwapMaker.make, makers))
    swap(tmp_path / "out.mp4", clip, KEEP)
    frames, original = written(), read_frames(clip)
    assert frames.shape == original.shape == (14, 150, 152, 3)
    masks = makers[0].masks
    assert len(masks) == 5
    for group, mask in zip(frame_groups(14), masks, strict=True):
        inside = mask[:150, :152] > 0
        assert 0.2 < inside.mean() < 0.95
        for i in group:
            assert (frames[i][~inside] == original[i][~inside]).all()
            assert (frames[i][inside] != original[i][inside]).any(axis=-1).mean() > 0.5, "the face was not replaced"

    made, given = probe(tmp_path / "out.mp4"), probe(clip)
    assert (made.num_frames, made.fps, made.width, made.height) == (14, 25, given.width, given.height)
    assert made.duration == given.duration
    assert abs(len(sound(tmp_path / "out.mp4")) - len(sound(clip))) <= 1024  # one AAC packet
    assert abs(numpy.corrcoef(sound(tmp_path / "out.mp4")[2000:7000], sound(clip)[2000:7000])[0, 1]) > 0.95
    assert read_metadata(tmp_path / "out.mp4")["segments"] == [[0, 14]]

    # Once more, by its own record: the same frames.
    infer_face_swap.main(
        infer_face_swap.parse_args(["--config", str(tmp_path / "out.json"), "--output", str(tmp_path / "json.mp4")])
    )
    assert (written() == frames).all()


def recording(method, makers):
    def wrapped(self, *args):
        makers.append(self)
        return method(self, *args)

    return wrapped


def test_shots_without_a_face_pass_and_flags_matter(tmp_path, clip, written):
    original = read_frames(clip)
    scene = numpy.concatenate([numpy.full_like(original[:11], (90, 140, 60)), original[:6]])
    write_video(tmp_path / "in.mp4", [scene], fps=12)
    written()
    swap(tmp_path / "out.mp4", tmp_path / "in.mp4", "--no_composite")
    frames, scene = written(), read_frames(tmp_path / "in.mp4")
    assert (frames[:11] == scene[:11]).all()
    changed = (frames[11:] != scene[11:]).any(axis=-1).mean()
    assert changed > 0.9, "the whole picture is drawn anew"
    assert not probe(tmp_path / "out.mp4").has_audio
    for number, flags in enumerate([("--denoising_strength", 0.3), (KEEP, "--solver", "unipc")]):
        swap(tmp_path / f"{number}.mp4", tmp_path / "in.mp4", *flags)
        other = written()
        assert (other[:11] == scene[:11]).all()
        assert (other[11:] != frames[11:]).mean() > 0.05, flags


def test_the_models_face_is_put_into_the_inputs_picture(tmp_path, clip, written, monkeypatch):
    """By default: what --no_composite writes, put together by hand with the mask and the colours of the input."""
    makers = []
    monkeypatch.setattr(face_swap.FaceSwapMaker, "make", recording(face_swap.FaceSwapMaker.make, makers))
    write_video(tmp_path / "silent.mp4", [read_frames(clip)[:5]], fps=25)
    tone = "aevalsrc=if(gt(t\\,0.2)\\,0.5*sin(2764*t)\\,0):s=16000:d=0.4"  # sets in with the picture, 0.2 s late
    late = ["-itsoffset", "0.2", "-i", tmp_path / "silent.mp4", "-f", "lavfi", "-i", tone]
    ffmpeg(*late, "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", tmp_path / "short.mp4")
    written()
    swap(tmp_path / "drawn.mp4", tmp_path / "short.mp4", "--no_composite")
    drawn, original = written(), read_frames(tmp_path / "short.mp4")
    swap(tmp_path / "out.mp4", tmp_path / "short.mp4")
    frames = written()
    masks = [makers[1].masks[0], *[makers[1].masks[1]] * 4]
    for frame, input_frame, raw, mask in zip(frames, original, drawn, masks, strict=True):
        mask = mask[:150, :152]
        assert (frame == composite(input_frame, raw, mask)).all()
        assert (frame[mask == 0] == input_frame[mask == 0]).all()
        face = mask == 255
        distances = [abs(picture[face].mean(axis=0) - input_frame[face].mean(axis=0)).max() for picture in (frame, raw)]
        assert distances[0] < 0.75 * distances[1], "the colours were not matched"
    assert (drawn != original).any(axis=-1).mean() > 0.9
    assert (abs(sound(tmp_path / "out.mp4")[:3200].reshape(-1, 200)).max(axis=1) > 8000)[1:].all(), "out of step"


def test_windows_never_span_a_cut(tmp_path, clip, written, monkeypatch):
    """What a shot becomes does not depend on what comes after the cut."""
    makers = []
    monkeypatch.setattr(face_swap.FaceSwapMaker, "make", recording(face_swap.FaceSwapMaker.make, makers))
    first, second = read_frames(clip)[:3], read_frames(clip)[8:10, :, ::-1]
    results = []
    for number, other in enumerate([second, second[..., ::-1] // 2]):
        scene = numpy.concatenate([first, other])
        encode(tmp_path / f"{number}.mp4", scene, "-c:v", "libx264rgb", "-qp", "0", pix_fmt="rgb24")
        assert (read_frames(tmp_path / f"{number}.mp4") == scene).all()
        swap(tmp_path / f"out{number}.mp4", tmp_path / f"{number}.mp4")
        results.append(written())
        assert read_metadata(tmp_path / f"out{number}.mp4")["segments"] == [[0, 3], [3, 5]]
        assert makers[-1].windows == [slice(0, 2), slice(2, 4)]
    assert (results[0][:3] == results[1][:3]).all()
    assert (results[0][:3] != first).any()
    assert (results[0][3:] != results[1][3:]).any()


def test_windows_interrupted_and_resumed_give_the_same(tmp_path, clip, written, monkeypatch):
    """Seven frames are three latent frames, more than a window of five frames holds."""
    write_video(tmp_path / "short.mp4", [read_frames(clip)[:7]], fps=25)
    clip = tmp_path / "short.mp4"
    flags = (KEEP, "--num_frames", 5)
    written()
    swap(tmp_path / "whole.mp4", clip, *flags)
    whole = written()
    assert len(whole) == 7

    def interrupt(self, step, save=JobState.save):
        save(self, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(JobState, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        swap(tmp_path / "out.mp4", clip, *flags)
    monkeypatch.setattr(JobState, "save", lambda self, step: None)
    assert not (tmp_path / "out.mp4").exists()
    swap(tmp_path / "out.mp4", clip, *flags)
    assert (written() == whole).all()
    with pytest.raises(UsageError, match="--step_cache teacache: this video takes"):
        swap(tmp_path / "cached.mp4", clip, "--num_frames", 5, "--step_cache", "teacache")


def test_the_chosen_of_two_people_is_replaced(tmp_path, clip, written):
    person = read_frames(clip)[:1]
    write_video(tmp_path / "two.mp4", [numpy.concatenate([person, person], axis=2)], fps=10)
    written()
    original = read_frames(tmp_path / "two.mp4")
    for index, half in ((0, slice(0, 152)), (1, slice(152, 304))):
        swap(tmp_path / f"{index}.mp4", tmp_path / "two.mp4", KEEP, "--target_face_index", index)
        changed = (written() != original).any(axis=-1)[0]
        assert changed[:, half].sum() > 0.9 * changed.sum() > 0
    with pytest.raises(UsageError, match="--target_face_index 2: frame 0"):
        swap(tmp_path / "none.mp4", tmp_path / "two.mp4", "--target_face_index", 2)


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--denoising_strength", "0"], 2, "--denoising_strength 0"),
        (["--denoising_strength", "nan"], 2, "--denoising_strength nan"),
        (["--denoising_strength", "1.5"], 2, "above 0, to 1"),
        (["--target_face_index", "-1"], 2, "--target_face_index -1"),
        (["--height", "64"], 2, "--height"),
        (["--no_composite", KEEP], 2, "--no_composite with --force_background_consistency"),
        (["--ip_image", "assets/face.png", "assets/face.png"], 2, "one photo"),
        (["--input_video", "missing.mp4"], 3, "missing.mp4"),
        (["--input_video", "README.md"], 3, "README.md"),
        (["--wan_version", "2.1", "--ip_image", "assets/face.png", "--prompt", "x"], 2, "--input_video"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, exit_code, words):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UserError) as error:
        infer_face_swap.main(infer_face_swap.parse_args(["--output", str(tmp_path / "out.mp4"), *flags]))
    assert error.value.exit_code == exit_code
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_fps_of_upstream_changes_nothing_and_a_line_says_so(tmp_path, clip, caplog):
    """Upstream plays the input's frames at --fps, out of step with their sound."""
    flags = ["--input_video", str(clip), "--fps", "8"]
    settings, *_ = resolve_face_swap(infer_face_swap.parse_args(flags))
    assert settings.fps == probe(clip).fps != 8
    [line] = [line for line in caplog.messages if "--fps" in line]
    assert "--fps 8 has no effect" in line and "upstream plays" in line


def test_bad_videos(tmp_path, clip):
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    write_video(tmp_path / "wall.mp4", [numpy.full((5, 64, 64, 3), 120, numpy.uint8)], fps=16)
    Image.new("RGB", (200, 200), (120, 130, 140)).save(tmp_path / "wall.png")
    for flags, words in [
        (["--input_video", tmp_path / "cut.mp4"], "cut.mp4"),
        (["--input_video", tmp_path / "wall.mp4"], "no face found in its 5 frames"),
        (["--ip_image", tmp_path / "wall.png"], "no face found"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            swap(tmp_path / "out.mp4", clip, *flags)
        assert error.value.exit_code == 3
    assert not (tmp_path / "out.mp4").exists()


def test_plain_command_and_fast_help(tmp_path):
    def run(*flags, **options):
        command = [sys.executable, str(PROJECT / "infer_face_swap.py"), *flags]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False, **options
        )

    result = run("--num_inference_steps", "1")
    assert result.returncode == 0, result.stderr
    assert "UNTRAINED" in result.stderr
    output = Path(result.stdout.strip())
    assert output == tmp_path / "outputs" / "output.mp4"
    assert probe(output).num_frames == probe(tmp_path / "outputs" / "demo_clip.mp4").num_frames

    start = time.monotonic()
    result = run("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    assert time.monotonic() - start < 1
    assert "torch" not in result.stderr
