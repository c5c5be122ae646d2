"""Raw videos made ready for training: what is made of each, and what a second run leaves, makes anew, or says."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from errors import InputError, UsageError, WeightsError
from preprocess.audio import read_audio
from preprocess.face_detection import Face
from preprocess.image import read_image
from preprocess.video import probe, read_frames
from preprocess.video_writer import VideoWriter
from tests.test_face import antelopev2  # noqa: F401 (a fixture)
from tests.test_masks import with_landmarks  # noqa: F401 (a fixture)
from tests.tiny_data import pictures, write_captions, write_clip, write_sound
from training import prepare as preparing
from training.clips import read_faces
from training.config import read_config
from training.data import read_samples
from training.identity import People, alike, frames_to_look_at, write_identity
from training.layouts import list_videos
from training.prepare import main, names_of, parse_arguments, resolve
from training.prepare_clips import fitted, resampled

PROJECT = Path(__file__).parent.parent
SMALL = ("--resolutions", "64x64")


def person_of(image: np.ndarray) -> np.ndarray:
    """An embedding that is the picture's color: (512,)."""
    return np.repeat(image.reshape(-1, 3).mean(axis=0), 171)[:512].astype(np.float32) - 100


def stub_models(settings):
    """A face in the middle of every picture that is not black; who it is of is the color."""

    def detector(image):
        height, width = image.shape[:2]
        box = (width * 0.25, height * 0.25, width * 0.75, height * 0.75)
        landmarks = np.full((68, 2), width / 2) + np.random.default_rng(0).uniform(-4, 4, (68, 2))
        return [Face(box, 0.9, landmarks=landmarks, embedding=person_of(image))] if image.any() else []

    def parser(picture, box):
        return np.ones(picture.shape[:2], int)

    return SimpleNamespace(detector=detector, recognizer=detector, parser=parser)


@pytest.fixture
def with_stubs(monkeypatch, tmp_path):
    """Without networks; and what a developer has in checkpoints/ changes nothing."""
    monkeypatch.setattr(preparing, "Models", stub_models)
    monkeypatch.chdir(tmp_path)


def write_color(path: Path, color, num_frames=20, fps=16, height=64, width=64, caption="A color", audio=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = color
    with VideoWriter(path, fps=fps, audio_path=audio) as video:
        video.write(frames)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def prepare(*arguments) -> None:
    main(parse_arguments([str(one) for one in arguments]))


def below(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and ".prepared" not in p.parts)


def stamps(root: Path) -> dict[str, int]:
    return {name: (root / name).stat().st_mtime_ns for name in below(root)}


# ------------------------------------------------------------------------------------------ pieces


def test_frames_at_another_rate_are_those_of_their_time():
    numbers = [np.full((1, 1, 3), i) for i in range(30)]

    def shown(rate, wanted, count):
        return [int(frame[0, 0, 0]) for frame in resampled(iter(numbers), rate, wanted, count)]

    assert shown(30, 30, 30) == list(range(30))
    assert shown(30, 15, 15) == list(range(1, 30, 2))  # 15 a second: the middle of a frame's time is 1/30 s in
    assert shown(15, 30, 60) == [i // 2 for i in range(60)]
    at_16 = shown(30, 16, 16)
    assert all(abs(number / 30 - i / 16) < 1 / 16 for i, number in enumerate(at_16))
    assert shown(30, 30, 32)[-3:] == [29, 29, 29]  # what is beyond the end stays


def test_the_middle_is_cut_out_and_covers_the_size():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200
    assert (fitted(picture, 40, 40) == 200).all()
    assert fitted(pictures(1, 48, 96)[0], 32, 64).shape == (32, 64, 3)
    assert np.array_equal(fitted(picture, 40, 100), picture)


def test_names_are_files_own_and_never_meet():
    videos = [SimpleNamespace(name=name) for name in ("a.mp4", "a.mov", "b/c.mp4", "b-c.mp4", "é 1.mkv", "d.mp4")]
    names = names_of(videos)
    assert len(set(names)) == 6 and names[4:] == ["é_1", "d"]
    assert names[0].startswith("a-") and names[1].startswith("a-") and names[2].startswith("b/c-")


def test_faces_are_looked_at_far_apart():
    assert frames_to_look_at(81, 4) == [0, 27, 53, 80]
    assert frames_to_look_at(3, 8) == [0, 1, 2] and frames_to_look_at(1, 4) == [0]


def test_people_are_compared_by_their_mean_faces():
    """Against angles that are known: embeddings in a plane."""

    def person(*degrees):
        angles = np.radians(degrees)
        embeddings = np.zeros((len(degrees), 512), np.float32)
        embeddings[:, 0], embeddings[:, 1] = 3 * np.cos(angles), 3 * np.sin(angles)
        return People(tuple(range(len(degrees))), embeddings)

    people = {"a": person(0, 20), "b": person(40), "c": person(100), "d": People((0,), None)}
    pairs = alike(people)
    assert [pair[:2] for pair in pairs] == [("a", "b"), ("b", "c")]
    np.testing.assert_allclose([pair[2] for pair in pairs], np.cos(np.radians([30, 60])), atol=1e-3)
    assert people["a"].within() == [(0, 1, pytest.approx(np.cos(np.radians(20)), abs=1e-3))]
    assert people["d"].within() == []


def test_many_people_are_compared_in_parts():
    rows = np.random.default_rng(0).normal(size=(30, 512)).astype(np.float32)
    people = {f"{i}": People((0,), np.concatenate([rows[i % 30][None]])) for i in range(1100)}
    pairs = alike(people)
    assert all(int(a) % 30 == int(b) % 30 for a, b, _ in pairs) and len(pairs) > 1100
    assert len({(a, b) for a, b, _ in pairs} | {(b, a) for a, b, _ in pairs}) == 2 * len(pairs)


# ------------------------------------------------------------------------------------------ a folder


def test_a_folder_that_trains(with_stubs, tmp_path):
    """Rate, size, caption, sound, faces and who is alike: what is made passes the check of the run it is for."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    sound = write_sound(tmp_path / "s.wav", 1.0)
    write_color(raw / "red.mov", (200, 30, 30), 30, 30, 96, 128, "A red wall", audio=sound)
    write_color(raw / "deep" / "dark_red.mp4", (150, 40, 40), 25, 25, 64, 64, "A dark red wall")
    write_color(raw / "blue.mp4", (30, 30, 220), 16, 16, 128, 96, None)
    write_captions(raw, {"blue.mp4": "A blue wall"})
    prepare(raw, "--out", out, *SMALL, "--masks", "face")
    names = ["blue.mp4", "deep/dark_red.mp4", "red.mp4"]
    listed = {one.name: one for one in list_videos(out, "folder")}
    assert list(listed) == names
    assert [listed[name].caption for name in names] == ["A blue wall", "A dark red wall", "A red wall"]
    for name in names:
        info = probe(out / name)
        assert (info.num_frames, info.width, info.height) == (16, 64, 64) and info.fps == pytest.approx(16)
    assert len(read_audio(listed["red.mp4"].audio)) == 16000 and listed["blue.mp4"].audio is None
    assert read_frames(out / "red.mp4")[7, 30, 30].tolist() == pytest.approx([200, 30, 30], abs=4)
    assert {file.name for file in listed["red.mp4"].faces.iterdir()} == {f"frame_{i}.png" for i in (0, 5, 10, 15)}
    mask = np.asarray(PIL.Image.open(dict(listed["red.mp4"].masks)["face"] / "frame_15.png"))
    assert mask[32, 32] == 255 and mask[2, 2] == 0
    assert listed["red.mp4"].alike[0][0] == "deep/dark_red.mp4" and listed["red.mp4"].alike[0][1] > 0.9
    assert listed["blue.mp4"].alike == ()
    assert len(listed["red.mp4"].within) == 6 and min(value for *_, value in listed["red.mp4"].within) > 0.99
    config = read_config(
        "tiny-stand_in", [f"data.sources=[{{path: {out}}}]", "data.holdout=0", "stand_in.face_loss=0.5"]
    )
    samples = read_samples(config).samples
    assert [sample.name for sample in samples] == names
    assert read_faces(samples[2])[0].shape == (512, 512, 3)


def test_long_videos_are_cut_into_clips(with_stubs, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    sound = write_sound(tmp_path / "s.wav", 2.0)
    write_clip(raw / "long.mp4", 32, 16, 64, 64, audio=sound)
    prepare(raw, "--out", out, *SMALL, "--frames", "13", "--faces", "0")
    assert [one.name for one in list_videos(out, "folder")] == ["long-000.mp4", "long-001.mp4"]
    whole = read_frames(raw / "long.mp4")
    second = read_frames(out / "long-001.mp4")
    assert len(second) == 13 and np.abs(second.astype(int) - whole[13:26]).mean() < 3
    expected = read_audio(raw / "long.mp4")[13000:26000]
    np.testing.assert_allclose(read_audio(out / "long-001.wav"), expected, atol=1e-3)


def test_stableavatars_tree(with_stubs, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "singing_out"
    sound = write_sound(tmp_path / "s.wav", 1.0)
    write_color(raw / "a.mp4", (200, 30, 30), 25, 25, 64, 64, None, audio=sound)
    write_color(raw / "sub" / "b.mp4", (30, 200, 30), 25, 25, 48, 80, None, audio=sound)
    arguments = ("--layout", "stableavatar", "--resolutions", "512x512", "480x832", "--kind", "speech")
    prepare(raw, "--out", out, *arguments)
    assert (out / "video_square_path.txt").read_text() == "square/speech/a\n"
    assert (out / "video_rec_path.txt").read_text() == "rec/speech/sub-b\n"
    clips = {one.name: one for one in list_videos(out, "stableavatar")}
    assert clips["square/speech/a"].caption == "The protagonist is talking"  # and not "singing", as the folder's name
    images = sorted((out / "rec/speech/sub-b/images").iterdir())
    assert len(images) == 25 and read_image(images[0]).shape == (480, 832, 3)
    config = read_config("tiny-avatar", [f"data.sources=[{{path: {out}, layout: stableavatar}}]", "data.holdout=0"])
    assert len(read_samples(config).samples) == 2


# ------------------------------------------------------------------------------------------ again


@pytest.fixture
def prepared(with_stubs, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for i, color in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
        write_color(raw / f"{i}.mp4", color)
    prepare(raw, "--out", out, *SMALL)
    return raw, out


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Videos of which any file is another."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {name[0] for name in names - {"identity.json"}}


def test_a_second_run_makes_nothing(prepared, monkeypatch):
    raw, out = prepared
    before = stamps(out)
    monkeypatch.setattr(preparing, "Models", lambda settings: pytest.fail("nothing is to be looked at"))
    prepare(raw, "--out", out, *SMALL)
    assert changed(before, stamps(out)) == set()


def test_what_changed_is_made_anew_and_nothing_else(prepared, caplog):
    raw, out = prepared
    before = stamps(out)
    write_color(raw / "1.mp4", (90, 90, 90), num_frames=10)
    (raw / "2.txt").write_text("Another caption")
    write_color(raw / "3.mp4", (10, 200, 200))
    prepare(raw, "--out", out, *SMALL)
    assert changed(before, stamps(out)) == {"1", "2", "3"}
    assert probe(out / "1.mp4").num_frames == 10 and (out / "2.txt").read_text() == "Another caption\n"
    assert not (out / "1.faces" / "frame_19.png").exists(), "faces of the frames that are gone are gone"
    before = stamps(out)
    (out / "0.wav").write_bytes(b"not ours")
    shutil.rmtree(out / "2.faces")
    prepare(raw, "--out", out, *SMALL)
    assert changed(before, stamps(out)) == {"0", "2"} and (out / "0.wav").read_bytes() == b"not ours"
    prepare(raw, "--out", out, *SMALL, "--fps", "8")
    assert probe(out / "0.mp4").num_frames == 10 and probe(out / "0.mp4").fps == pytest.approx(8)
    (raw / "3.mp4").unlink()
    with caplog.at_level(logging.WARNING, "selfsame"):
        prepare(raw, "--out", out, *SMALL, "--fps", "8")
    assert "files are of raw videos that are gone, 3.txt first" in caplog.text and (out / "3.mp4").is_file()


class StopError(Exception):
    pass


@pytest.mark.parametrize("moment", range(10))
def test_a_run_that_was_stopped_goes_on_and_makes_the_same(with_stubs, tmp_path, monkeypatch, moment):
    """Stopped at any rename or record: what is there then is whole, and in the end all is as of one run."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    for i, color in enumerate(((200, 30, 30), (30, 200, 30))):
        write_color(raw / f"{i}.mp4", color, num_frames=6)
    prepare(raw, "--out", tmp_path / "whole", *SMALL, "--faces", "2")
    count, real = 0, os.replace

    def stopping(source, target):
        nonlocal count
        if Path(target).is_relative_to(out) and "work" not in Path(target).parts:
            count += 1
            if count > moment:
                raise StopError
        real(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    try:
        prepare(raw, "--out", out, *SMALL, "--faces", "2")
    except StopError:
        assert count == moment + 1
    monkeypatch.setattr(os, "replace", real)
    for listed in list_videos(out, "folder") if list(out.glob("*.mp4")) else ():
        assert probe(listed.video).num_frames == 6 and len(list(listed.faces.iterdir())) == 2 and listed.caption
    prepare(raw, "--out", out, *SMALL, "--faces", "2")
    assert below(out) == below(tmp_path / "whole")
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in below(out))


def test_two_runs_on_one_folder_are_kept_apart(prepared):
    raw, out = prepared
    with preparing.alone(out), pytest.raises(UsageError, match="another run is preparing it; wait for it"):
        prepare(raw, "--out", out, *SMALL)
    prepare(raw, "--out", out, *SMALL)


# ------------------------------------------------------------------------------------------ what cannot be used


def test_one_line_for_each_video_that_cannot_be_used(with_stubs, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_color(raw / "good.mp4", (200, 30, 30))
    write_color(raw / "cut.mp4", (1, 200, 30), 60)
    (raw / "cut.mp4").write_bytes((raw / "cut.mp4").read_bytes()[:800])
    write_color(raw / "silent.mp4", (1, 1, 200), caption=None)
    write_color(raw / "black.mp4", (0, 0, 0))
    write_color(raw / "short.mp4", (9, 9, 200), num_frames=4)
    for _ in range(2):  # the same again from what is recorded
        with pytest.raises(InputError, match="4 of 5 videos cannot be used as they are"):
            prepare(raw, "--out", out, *SMALL, "--frames", "9")
        lines = capsys.readouterr().out.splitlines()
        assert [line.removeprefix(f"{raw}/").split(":")[:2] for line in lines] == [
            ["black.mp4", " no face"],
            ["cut.mp4", " damaged"],
            ["short.mp4", " too short"],
            ["silent.mp4", " no caption"],
        ]
    assert [one.name for one in list_videos(out, "folder")] == [
        "black-000.mp4",
        "black-001.mp4",
        "good-000.mp4",
        "good-001.mp4",
    ]
    with pytest.raises(InputError, match="3 of 5"):
        prepare(raw, "--out", out, *SMALL, "--frames", "9", "--caption", "A wall")
    assert (out / "silent-000.txt").read_text() == "A wall\n" and (out / "good-000.txt").read_text() == "A color\n"


def test_a_talking_clip_without_sound_cannot_be_used(with_stubs, tmp_path, capsys):
    write_color(tmp_path / "raw" / "a.mp4", (200, 30, 30), 4)
    with pytest.raises(InputError):
        prepare(tmp_path / "raw", "--out", tmp_path / "out", "--layout", "stableavatar")
    assert capsys.readouterr().out.endswith("a.mp4: no sound\n") and not (tmp_path / "out" / "square").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "speech"], "--kind: only --layout stableavatar reads it"),
        (["--layout", "stableavatar", "--caption", "x"], "--caption: StableAvatar's captions follow from --kind"),
        (["--layout", "stableavatar", "--resolutions", "64x64"], "--resolutions 64x64: StableAvatar's are 480x832"),
        (["--layout", "stableavatar", "--faces", "4"], "--faces 4: StableAvatar's data have none"),
        (["--layout", "flat"], "--layout flat: accepted are folder, stableavatar"),
        (["--resolutions", "64x65"], "--resolutions 64x65: accepted are HEIGHTxWIDTH of multiples of 16"),
        (["--masks", "none", "lip"], "--masks none lip: none goes by itself"),
        (["--fps", "0"], "--fps 0.0: accepted are 1 to 120"),
        (["--frame", "3"], "--frame: no such flag; did you mean --frames?"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message):
    with pytest.raises(UsageError) as caught:
        resolve(parse_arguments(["raw", "--out", "out", *flags]))
    assert str(caught.value).startswith(message)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        prepare(tmp_path / "gone", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="no videos there"):
        prepare(tmp_path, "--out", tmp_path / "out")
    with pytest.raises(UsageError, match="is the folder of the raw videos"):
        prepare(tmp_path, "--out", tmp_path)


# ------------------------------------------------------------------------------------------ with the real means


def test_without_downloads_it_says_what_is_missing(tmp_path, monkeypatch, caplog):
    """OpenCV's cascade finds the face of the shipped photo; lips, and who it is, need antelopev2."""
    monkeypatch.chdir(tmp_path)
    photo = read_image(PROJECT / "assets" / "face.png")
    side = min(photo.shape[:2]) // 16 * 16
    write_color(tmp_path / "raw" / "a.mp4", photo[:side, :side], 2, 16, side, side)
    with caplog.at_level(logging.WARNING, "selfsame"):
        prepare(tmp_path / "raw", "--out", tmp_path / "out", "--resolutions", f"{side}x{side}", "--faces", "1")
    face = read_image(tmp_path / "out" / "a.faces" / "frame_0.png")
    assert face.shape == (512, 512, 3) and (face[0, 0] == 255).all() and face.mean() < 250
    assert not (tmp_path / "out" / "identity.json").exists()
    assert "python download_models.py --only antelopev2" in caplog.text
    with pytest.raises(WeightsError, match="landmarks of faces need antelopev2.*--only antelopev2"):
        prepare(tmp_path / "raw", "--out", tmp_path / "out", "--masks", "lip")


def test_the_command_with_face_models(with_landmarks, tmp_path):  # noqa: F811
    """As a user runs it, on networks of antelopev2's shape: masks, faces and likeness, then nothing more to do."""
    for i in range(2):
        write_clip(tmp_path / "raw" / f"{i}.mp4", 6, height=512, width=512, seed=i)
    command = [sys.executable, "-m", "training.prepare", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    command += [
        "--resolutions",
        "512x512",
        "--masks",
        "face",
        "lip",
        "--faces",
        "2",
        "--antelopv2_path",
        with_landmarks,
    ]
    for expected in (0, 2):
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert f"2 videos: {expected} were prepared before, 0 have troubles" in result.stderr
    listed = list_videos(tmp_path / "out", "folder")
    assert [one.name for one in listed] == ["0.mp4", "1.mp4"]
    for one in listed:
        assert {kind for kind, _ in one.masks} == {"face", "lip"}
        for _, folder in one.masks:
            mask = np.asarray(PIL.Image.open(folder / "frame_5.png"))
            assert 0 < (mask == 255).mean() < 0.5
        assert [file.name for file in sorted(one.faces.iterdir())] == ["frame_0.png", "frame_5.png"]
    identity = json.loads((tmp_path / "out" / "identity.json").read_text())
    assert set(identity["within"]) == {"0.mp4", "1.mp4"}


def test_identity_goes_where_nobody_is_recognised_any_more(tmp_path):
    assert write_identity(tmp_path, {"a": People((0,), np.ones((1, 512), np.float32))}) == 0
    assert (tmp_path / "identity.json").is_file()
    write_identity(tmp_path, {"a": People((0,), None)})
    assert not (tmp_path / "identity.json").exists()
