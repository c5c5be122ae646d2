"""The training videos: what layouts list, what the check finds, what a run is given."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train
from errors import InputError
from tests.tiny_data import write_avatar_clip, write_captions, write_clip, write_sound
from training import data
from training.config import Source, read_config
from training.data import Wanted, bucket_of, is_held_out, read_samples, verdicts
from training.facts import Facts, measure
from training.layouts import guess_layout, list_videos
from training.sampler import Bucket

PROJECT = Path(__file__).parent.parent
SMALL = Wanted(fps=16, sizes=((64, 64),), frames=(9,))


def reasons(root, layout="folder", wanted=SMALL) -> dict[str, tuple[str, ...]]:
    """Name -> what is wrong."""
    found = verdicts(Source(path=str(root), layout=layout), wanted, Path(root) / ".cache")
    return {verdict.listed.name: verdict.reasons for verdict in found}


def config_for(*paths, sets=(), **sources):
    listed = json.dumps([{"path": str(path)} | sources for path in paths])
    return read_config("tiny-base", [f"data.sources={listed}", "data.holdout=0", *sets])


def run_check(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "training.data", "check", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------ layouts


def test_a_folder_of_videos_and_texts(tmp_path):
    write_clip(tmp_path / "a.mp4", caption=" A woman\nwalks ")
    write_clip(tmp_path / "deep" / "b.mp4", caption=None)
    write_clip(tmp_path / ".work" / "c.mp4")
    write_captions(tmp_path, {"deep/b.mp4": "A man runs", "gone.mp4": "Nobody"})
    for folder in ("a.faces", "a.face_masks"):
        (tmp_path / folder).mkdir()
    write_sound(tmp_path / "a.wav")
    (tmp_path / "identity.json").write_text(
        json.dumps({"pairs": [["a.mp4", "deep/b.mp4", 0.7]], "within": {"a.mp4": [[0, 8, 0.9]]}})
    )
    a, b, gone = list_videos(tmp_path, "folder")
    assert (a.name, a.caption, a.audio, a.faces) == (
        "a.mp4",
        "A woman\nwalks",
        tmp_path / "a.wav",
        tmp_path / "a.faces",
    )
    assert a.masks == (("face", tmp_path / "a.face_masks"),) and a.alike == (("deep/b.mp4", 0.7),)
    assert a.within == ((0, 8, 0.9),)
    assert (b.name, b.caption, b.audio, b.alike) == ("deep/b.mp4", "A man runs", None, (("a.mp4", 0.7),))
    assert gone.trouble == "missing: metadata.jsonl names it"


@pytest.mark.parametrize("listed", [True, False])
def test_stableavatars_tree(tmp_path, listed):
    """Captions follow from the path, as upstream's; lists name folders relative to themselves or not."""
    clips = ("square/speech/00001", "square/singing/00002", "vec/dancing/00001", "rec/other/00003")
    for clip in clips:
        (tmp_path / clip / "images").mkdir(parents=True)
    (tmp_path / clips[0] / "face_masks").mkdir()
    (tmp_path / clips[0] / "audio.wav").write_bytes(b"x")
    if listed:
        (tmp_path / "video_square_path.txt").write_text(f"{clips[0]}\n\n{tmp_path / clips[1]}\n")
        (tmp_path / "video_vec_path.txt").write_text(f"{clips[2]}\n{clips[0]}\n")
        (tmp_path / "video_rec_path.txt").write_text(f"{clips[3]}\nrec/gone/1\n")
    found = {one.video.parent.relative_to(tmp_path).as_posix(): one for one in list_videos(tmp_path, "stableavatar")}
    assert [found[clip].caption for clip in clips] == [
        "The protagonist is talking",
        "The protagonist is singing",
        "The protagonist is simultaneously dancing and singing",
        "",
    ]
    assert found[clips[3]].trouble.startswith("no caption: it follows from the path")
    assert found[clips[0]].masks == (("face", tmp_path / clips[0] / "face_masks"),)
    assert found[clips[0]].audio == tmp_path / clips[0] / "audio.wav" and found[clips[1]].audio is None
    assert len(found) == 4 + listed and (
        not listed or found["rec/gone"].trouble.startswith("missing: video_rec_path.txt")
    )
    assert guess_layout(tmp_path) == "stableavatar"


def test_svis_csv_and_folders(tmp_path):
    """The columns of MixKit's csv; a video that it does not describe is of its category."""
    folder = tmp_path / "cats"
    for name in ("one.mp4", "two.mp4"):
        write_clip(folder / name, caption=None)
    (folder / "cats.csv").write_text(
        "Video Title,Video Description,Video URL,Download URL,Filename\n"
        'A,"A cat, asleep",u,d,one.mp4\nB,x,u,d,gone.mp4\n'
    )
    write_clip(tmp_path / "dancer" / "video.mp4", caption=None)
    write_clip(tmp_path / "dancer" / "dwpose.mp4", caption=None)
    (tmp_path / "talker").mkdir()
    (tmp_path / "talker" / "frame_data.pkl").write_bytes(b"x")
    found = {one.name: one for one in list_videos(tmp_path, "svi")}
    assert found["cats/one.mp4"].caption == "A cat, asleep"
    assert found["cats/two.mp4"].caption == "A video from cats category"
    assert found["cats/gone.mp4"].trouble == "missing: cats.csv names it"
    assert found["dancer"].pose == tmp_path / "dancer" / "dwpose.mp4"
    assert found["talker/frame_data.pkl"].trouble.startswith("pickle: ")
    assert guess_layout(tmp_path) == guess_layout(folder) == "svi" and guess_layout(tmp_path / "dancer") == "svi"
    alone = [one.name for one in list_videos(folder / "cats.csv", "svi")]
    assert alone == [one.name for one in list_videos(folder, "svi")] == ["gone.mp4", "one.mp4", "two.mp4"]


def test_what_is_no_list_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder or file"):
        list_videos(tmp_path / "gone", "folder")
    with pytest.raises(InputError, match=r"no videos in the layout folder there \(NAME.mp4 with NAME.txt"):
        list_videos(tmp_path, "folder")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "x"}\n{"file_name": 3}\n')
    with pytest.raises(InputError, match="metadata.jsonl, line 2: expected"):
        list_videos(tmp_path, "folder")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "cats.csv").write_text("Name,Text\na,b\n")
    with pytest.raises(InputError, match="needs the columns Filename and Video Description, it has Name, Text"):
        list_videos(tmp_path, "svi")


# ------------------------------------------------------------------------------------------ what is measured


def test_facts_of_a_video(tmp_path):
    sound = write_sound(tmp_path / "s.wav", 2, channels=2)
    video = write_clip(tmp_path / "set" / "a.mp4", 20, 25, 48, 64, audio=sound)
    found = measure(list_videos(video.parent, "folder")[0])
    assert (found.num_frames, found.width, found.height, found.channels) == (20, 64, 48, 2)
    assert found.fps == pytest.approx(25) and found.seconds == pytest.approx(0.8, abs=0.1) and not found.trouble


def test_facts_of_a_clip_folder(tmp_path):
    """Frames are counted by their numbers, the rate is sub_clip.mp4's, else it follows from the sound."""
    clip = write_avatar_clip(tmp_path / "speech" / "1", num_frames=12, fps=30)
    (clip / "lip_masks" / "frame_7.png").unlink()
    (clip / "lip_masks" / "frame_3.png").write_bytes(b"")
    found = measure(list_videos(tmp_path, "stableavatar")[0])
    assert (found.num_frames, found.width, found.height, found.channels) == (12, 64, 48, 1)
    assert found.fps == pytest.approx(30)
    assert found.missing_masks == (("lip", ("lip_masks/frame_3.png", 2)),)
    (clip / "sub_clip.mp4").unlink()
    assert measure(list_videos(tmp_path, "stableavatar")[0]).fps == pytest.approx(12 / 0.4)


def test_content_is_the_videos_alone(tmp_path):
    a = write_clip(tmp_path / "a.mp4", seed=1)
    shutil.copy(a, tmp_path / "b.mp4")
    (tmp_path / "b.txt").write_text("another caption")
    write_clip(tmp_path / "c.mp4", seed=2)
    write_sound(tmp_path / "b.wav")
    a, b, c = (measure(one) for one in list_videos(tmp_path, "folder"))
    assert a.content == b.content != c.content and a.beside != b.beside


def test_holdout_is_a_share_by_content():
    contents = [f"{i:064x}" for i in range(0, 16**64, 16**64 // 1000)]
    assert sum(is_held_out(content, 0.02) for content in contents) in (20, 21)
    assert not any(is_held_out(content, 0.0) for content in contents)
    assert {c for c in contents if is_held_out(c, 0.1)} <= {c for c in contents if is_held_out(c, 0.2)}


def test_the_bucket_is_the_nearest_in_shape_and_the_longest_that_fits():
    wanted = Wanted(sizes=((480, 832), (832, 480), (512, 512), (256, 256)), frames=(17, 49, 81))

    def bucket(width, height, frames):
        return bucket_of(Facts(width=width, height=height, num_frames=frames), wanted)

    assert bucket(1920, 1080, 100) == Bucket(480, 832, 81)
    assert bucket(1080, 1920, 80) == Bucket(832, 480, 49)
    assert bucket(300, 290, 17) == Bucket(512, 512, 17)


# ------------------------------------------------------------------------------------------ what is wrong


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    """A good sample, and one of each way to be broken; name -> the reason's kind."""
    root = tmp_path_factory.mktemp("broken")
    write_clip(root / "good.mp4", seed=1)
    truncate(write_clip(root / "cut.mp4", 40, seed=2), 0.6)
    (root / "empty.mp4").write_bytes(b"")
    (root / "empty.txt").write_text("A caption")
    (root / "text.mp4").write_text("this is no video")
    (root / "text.txt").write_text("A caption")
    write_clip(root / "nocaption.mp4", caption=None, seed=3)
    write_clip(root / "blank.mp4", caption=" \n ", seed=4)
    write_clip(root / "binary.mp4", seed=5)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    write_clip(root / "short.mp4", 8, seed=6)
    write_clip(root / "fast.mp4", 20, fps=30, seed=7)
    write_clip(root / "fast_and_short.mp4", 5, fps=30, seed=8)
    kinds = {
        "good.mp4": (),
        "cut.mp4": ("damaged",),
        "empty.mp4": ("damaged",),
        "text.mp4": ("damaged",),
        "nocaption.mp4": ("no caption",),
        "blank.mp4": ("empty caption",),
        "binary.mp4": ("damaged caption",),
        "short.mp4": ("too short",),
        "fast.mp4": ("wrong rate",),
        "fast_and_short.mp4": ("too short", "wrong rate"),
    }
    return root, kinds


def kinds_of(found: dict) -> dict[str, tuple[str, ...]]:
    return {name: tuple(reason.partition(":")[0] for reason in why) for name, why in found.items()}


def test_every_broken_video_is_listed_with_all_its_reasons(broken_folder):
    root, kinds = broken_folder
    found = reasons(root)
    assert kinds_of(found) == kinds
    assert found["empty.mp4"] == ("damaged: empty.mp4 has 0 bytes",)
    assert found["fast_and_short.mp4"] == (
        "too short: 5 frames, 9 are wanted",
        "wrong rate: 30 frames a second, 16 are wanted",
    )
    assert kinds_of(reasons(root, wanted=replace(SMALL, fps=None)))["fast.mp4"] == ()


def test_sound_is_looked_at_where_it_is_wanted(tmp_path):
    for name, seconds, channels, volume in (
        ("mono", 1, 1, 0.3),
        ("stereo", 1, 2, 0.3),
        ("still", 1, 1, 0),
        ("brief", 0.2, 1, 1),
    ):
        write_clip(tmp_path / f"{name}.mp4", 16, seed=hash(name) % 100)
        write_sound(tmp_path / f"{name}.wav", seconds, channels, volume)
    write_clip(tmp_path / "none.mp4", 16, seed=101)
    write_clip(tmp_path / "damaged.mp4", 16, seed=102)
    (tmp_path / "damaged.wav").write_text("no sound")
    any_sound = kinds_of(reasons(tmp_path, wanted=replace(SMALL, frames=(16,), audio="any")))
    assert any_sound == {
        "mono.mp4": (), "stereo.mp4": (), "still.mp4": ("silent sound",), "brief.mp4": ("short sound",),
        "none.mp4": ("no sound",), "damaged.mp4": ("damaged",),
    }  # fmt: skip
    stereo = kinds_of(reasons(tmp_path, wanted=replace(SMALL, frames=(16,), audio="stereo")))
    assert stereo["mono.mp4"] == ("mono sound",) and stereo["stereo.mp4"] == ()
    assert kinds_of(reasons(tmp_path))["none.mp4"] == ()


def test_a_clip_folder_with_gaps(tmp_path):
    whole, gaps, bare, cut = (write_avatar_clip(tmp_path / "speech" / name, seed=i) for i, name in enumerate("wgbc"))
    (gaps / "face_masks" / "frame_4.png").unlink()
    shutil.rmtree(bare / "lip_masks")
    truncate(cut / "images" / "frame_5.png", 0.5)
    wanted = Wanted(fps=25, sizes=((64, 64),), frames=(9,), audio="any", masks=("face", "lip"))
    found = reasons(tmp_path, "stableavatar", wanted)
    assert found["speech/w"] == ()
    assert found["speech/g"] == ("missing face masks: 1 of 9, face_masks/frame_4.png first",)
    assert found["speech/b"] == ("no lip masks: make them with `python -m preprocess.masks`",)
    assert found["speech/c"][0].startswith("damaged: images/frame_5.png cannot be decoded")
    assert kinds_of(reasons(tmp_path, "stableavatar", replace(wanted, masks=()))) == {
        "speech/w": (), "speech/g": (), "speech/b": (), "speech/c": ("damaged",)
    }  # fmt: skip


class Trap:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_opened(tmp_path):
    trap = tmp_path / "sprung"
    for name in ("talker/frame_data.pkl", "talker/audio_embedding.pkl"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(Trap(trap)))
    result = run_check(tmp_path / "set", "--layout", "svi")
    assert result.returncode == 3 and not trap.exists()
    for name in ("frame_data.pkl", "audio_embedding.pkl"):
        assert f"{name}: pickle: it could run code and is never opened" in result.stdout
    pickle.loads((tmp_path / "set" / "talker" / "frame_data.pkl").read_bytes())
    assert trap.exists(), "the trap must work for the test to mean anything"


# ------------------------------------------------------------------------------------------ the command


def test_the_check_lists_all_ends_with_a_table_and_exits_with_3(broken_folder):
    root, kinds = broken_folder
    result = run_check(root, "--fps", 16, "--frames", 9, "--resolutions", "64x64")
    assert result.returncode == 3 and "Traceback" not in result.stderr
    for name, why in kinds.items():
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"{root / name}: ")]
        assert len(lines) == bool(why) and all(kind in line for kind in why for line in lines)
    assert "       1  64x64x9\n" in result.stdout and "       3  unusable: damaged\n" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: 9 of 10 samples cannot be used")


def test_a_whole_set_exits_with_0_and_bad_flags_with_2(tmp_path):
    write_clip(tmp_path / "a.mp4")
    result = run_check(tmp_path, "--resolutions", "48x64")
    assert result.returncode == 0 and "enlarged" not in result.stdout
    result = run_check(tmp_path)
    assert result.returncode == 0 and result.stdout.splitlines() == [
        " samples  of layout folder, 1 s in all",
        "       1  480x832x1",
        "       1  of them are smaller and would be enlarged",
    ]
    assert run_check(tmp_path, "--resolutions", "64x63").returncode == 2
    assert run_check(tmp_path, "--fps", "nan").returncode == 2
    both = run_check(tmp_path, "--config", "tiny-base", "--fps", 16)
    assert both.returncode == 2 and "leave out --fps" in both.stderr


def test_the_check_of_a_configuration_wants_what_its_run_wants(tmp_path):
    write_avatar_clip(tmp_path / "speech" / "1")
    assert run_check(tmp_path, "--config", "tiny-avatar").returncode == 0
    shutil.rmtree(tmp_path / "speech" / "1" / "face_masks")
    result = run_check(tmp_path, "--config", "tiny-avatar")
    assert result.returncode == 3 and "no face masks" in result.stdout


# ------------------------------------------------------------------------------------------ what a run is given


def test_bad_samples_are_refused_or_skipped(broken_folder):
    root, _ = broken_folder
    with pytest.raises(InputError, match=r"9 of 10 samples cannot be used, .*binary.mp4 first: damaged caption"):
        read_samples(config_for(root))
    found = read_samples(config_for(root, sets=["data.bad=skip"]))
    assert [sample.name for sample in found.samples] == ["good.mp4"] and len(found.skipped) == 9
    assert found.samples[0].bucket == Bucket(64, 64, 9)


def test_a_broken_set_trains_where_bad_samples_are_skipped(broken_folder, tmp_path):
    """Spec check 7, to its end: refused by itself, trained on with `bad: skip`."""
    root, _ = broken_folder
    sets = ["train.steps=1", "train.global_batch=1", "data.holdout=0", "log.tensorboard=false"]
    sets += [f"data.sources=[{{path: {root}}}]", f"output={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"]
    flags = ["--config", "tiny-base", *(part for each in sets for part in ("--set", each))]
    with pytest.raises(InputError, match="9 of 10 samples cannot be used"):
        train.main(train.parse_args(flags))
    (exported,) = train.main(train.parse_args([*flags, "--set", "data.bad=skip"]))
    assert exported.is_file()


def test_nothing_is_measured_twice(tmp_path, monkeypatch):
    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", seed=i)
    before = read_samples(config_for(tmp_path))
    measured = []
    monkeypatch.setattr(data, "measure", lambda one: measured.append(one.name) or measure(one))
    assert read_samples(config_for(tmp_path)) == before and measured == []
    os.utime(tmp_path / "1.mp4", ns=(1, 1))
    write_sound(tmp_path / "2.wav")
    read_samples(config_for(tmp_path))
    assert sorted(measured) == ["1.mp4", "2.mp4"]
    (tmp_path / ".cache" / "index.json").write_text("{broken")
    assert read_samples(config_for(tmp_path)).samples[0] == before.samples[0] and len(measured) == 5


def test_an_index_of_facts_reads_back_equal(tmp_path):
    clip = write_avatar_clip(tmp_path / "speech" / "1")
    (clip / "lip_masks" / "frame_3.png").unlink()
    listed = list_videos(tmp_path, "stableavatar")
    first = data.measured(listed, tmp_path / "cache")
    assert data.measured(listed, tmp_path / "cache") == first and first[listed[0]].missing_masks


def test_sources_and_repeats_make_the_order(tmp_path):
    for folder, count in (("a", 3), ("b", 2)):
        for i in range(count):
            write_clip(tmp_path / folder / f"{i}.mp4", seed=10 * count + i)
    sources = json.dumps([{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b"), "repeat": 3}])
    found = read_samples(read_config("tiny-base", [f"data.sources={sources}", "data.holdout=0"]))
    order = found.order(global_batch=9, seed=0)
    ids = order.batch(0).ids
    assert sorted(found.samples[i].source for i in ids) == [0, 0, 0, *[1] * 6]
    counts = {
        name: sum(found.samples[i].name == name and found.samples[i].source == 1 for i in ids)
        for name in ("0.mp4", "1.mp4")
    }
    assert counts == {"0.mp4": 3, "1.mp4": 3}


def test_held_out_samples_stay_so_when_data_are_added(tmp_path):
    for i in range(12):
        write_clip(tmp_path / f"{i:02d}.mp4", num_frames=9, height=32, width=32, seed=i)
    config = config_for(tmp_path, sets=["data.holdout=0.4"])
    before = read_samples(config)
    assert before.samples and before.held_out
    for i in range(12, 16):
        write_clip(tmp_path / f"{i:02d}.mp4", num_frames=9, height=32, width=32, seed=i)
    after = read_samples(config)
    assert {s.name for s in before.held_out} <= {s.name for s in after.held_out}
    assert {s.name for s in before.samples} <= {s.name for s in after.samples}
    assert before.hash != after.hash


def test_the_hash_sees_captions_and_nothing_of_the_place(tmp_path):
    write_clip(tmp_path / "one" / "a.mp4")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, moved = (read_samples(config_for(tmp_path / folder)).hash for folder in ("one", "two"))
    assert first == moved
    (tmp_path / "two" / "a.txt").write_text("Another caption")
    assert read_samples(config_for(tmp_path / "two")).hash != first


def test_no_torch_is_loaded(tmp_path):
    write_clip(tmp_path / "a.mp4")
    code = f"import sys; from training import data; data.main(data.parse_arguments(['check', {str(tmp_path)!r}]))\n"
    code += "print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False", result.stderr
