"""infer_long_video.py --variant talk and dance as a user runs them, on the tiny model."""

from pathlib import Path

import numpy
import pytest
from safetensors.torch import save_file

import infer_long_video
from configs import load_config
from errors import InputError, UsageError, WeightsError
from models.multitalk import MultiTalk
from models.pose_embedder import KEY
from models.wan.float8 import Float8Linear, float8_linears
from models.wan.transformer import WanTransformer
from pipelines.clip_plan import pose_indices
from pipelines.distributed import start_processes
from pipelines.long_video import dance
from pipelines.long_video.command import resolve_long_video
from pipelines.long_video.parts import driving_parts
from pipelines.long_video.settings import LongVideoSettings
from pipelines.tiny import tiny_multitalk, tiny_pose_embedder
from pipelines.wan import Wan
from preprocess import audio
from preprocess.audio import SAMPLE_RATE, read_audio, write_wav
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import write_video
from tests.test_talk_dance import lora_tensors

SMALL = [
    "--config",
    "tiny-i2v",
    "--height",
    "64",
    "--width",
    "96",
    "--num_inference_steps",
    "2",
    "--quality",
    "10",
    "--no_drift_report",
]
CLIP = 9  # frames of a clip of the tiny model
NUM_POSES = 20


def write_sound(path: Path, seconds: float, pitch: float = 200.0) -> Path:
    time = numpy.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    write_wav(path, 0.3 * numpy.sin(2 * numpy.pi * pitch * time) * numpy.sin(9 * time) ** 2, SAMPLE_RATE)
    return path


def write_poses(path: Path, step: int = 3) -> Path:
    frames = numpy.zeros((NUM_POSES, 64, 96, 3), numpy.uint8)
    for i in range(NUM_POSES):
        frames[i, 10:50, step * i : step * i + 8] = (255, 0, 90)
    write_video(path, [frames], fps=30)
    return path


def make(output: Path, *flags) -> numpy.ndarray:
    """Run the script; the frames of its video."""
    infer_long_video.main(infer_long_video.parse_args([*SMALL, "--output", str(output), *map(str, flags)]))
    return read_frames(output)


def resolve(*flags) -> LongVideoSettings:
    return resolve_long_video(infer_long_video.parse_args([*SMALL, *map(str, flags)]))[0]


def poses_given(settings: LongVideoSettings, config: dict, monkeypatch) -> list[list[int]]:
    """The poses, by their numbers, that each clip of a video is given."""
    wan = Wan(settings, config, start_processes("cpu"), driving_parts(settings, config))
    given, read_poses = [], dance.read_poses
    monkeypatch.setattr(dance, "read_poses", lambda path, *rest: given.append(rest[0]) or read_poses(path, *rest))
    opened = dance.open_poses(wan)
    for clip in settings.clips(seed=0):
        dance.pose_plugins(wan, opened, clip)
    return given


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_sound(tmp_path_factory.mktemp("talk") / "speech.wav", 0.81)  # 20.25 frames, three clips


@pytest.fixture(scope="module")
def talking(sound) -> numpy.ndarray:
    return make(sound.with_name("talk.mp4"), "--variant", "talk", "--audio_path", sound)


@pytest.fixture(scope="module")
def poses(tmp_path_factory) -> Path:
    return write_poses(tmp_path_factory.mktemp("dance") / "poses.mp4")


@pytest.fixture(scope="module")
def dancing(poses) -> numpy.ndarray:
    return make(poses.with_name("dance.mp4"), "--variant", "dance", "--pose_path", poses)


# ----------------------------------------------------------------------------------------------------------- talk


def test_the_video_lasts_as_long_as_the_speech_and_has_its_sound(sound, talking):
    video = sound.with_name("talk.mp4")
    info = probe(video)
    assert (info.num_frames, info.fps, info.has_audio) == (20, 25, True)
    assert (info.height, info.width) == (64, 96)
    heard, given = read_audio(video), read_audio(sound)
    assert abs(len(heard) / SAMPLE_RATE - info.duration) < 0.06  # AAC comes in blocks
    length = min(len(heard), len(given)) - 1000
    assert numpy.corrcoef(heard[:length], given[:length])[0, 1] > 0.95
    metadata = read_metadata(video)
    assert metadata["settings"]["guidance_scale"] == [2.0] and metadata["settings"]["audio_guidance_scale"] == 5.0
    assert [clip["start"] for clip in metadata["clips"]] == [0, 9, 17]


def test_the_sound_is_decoded_once(sound, tmp_path, monkeypatch):
    """Long sounds take their time."""
    decoded, decode = [], audio.run_ffmpeg
    monkeypatch.setattr(
        audio, "run_ffmpeg", lambda *words, **options: decoded.append(words) or decode(*words, **options)
    )
    make(tmp_path / "talk.mp4", "--variant", "talk", "--audio_path", sound, "--num_clips", 1)
    assert len(decoded) == 1


def test_every_clip_hears_its_own_moment(sound, talking, tmp_path, monkeypatch):
    """Clip k begins with frame 8·k of the sound: the one its first frame shows again."""
    starts, speech = [], MultiTalk.speech

    def recording(self, audio, start, num_frames):
        starts.append((start, num_frames, len(audio)))
        return speech(self, audio, start, num_frames)

    monkeypatch.setattr(MultiTalk, "speech", recording)
    frames = make(tmp_path / "talk.mp4", "--variant", "talk", "--audio_path", sound)
    assert starts == [(0, CLIP, 20), (8, CLIP, 20), (16, CLIP, 20)]
    assert (frames == talking).all()


def test_other_speech_makes_another_video(talking, tmp_path):
    other = write_sound(tmp_path / "other.wav", 0.81, pitch=700)
    frames = make(tmp_path / "out.mp4", "--variant", "talk", "--audio_path", other, "--num_clips", 1)
    assert len(frames) == CLIP
    assert abs(frames.astype(int) - talking[:CLIP]).mean() > 1


def test_an_interrupted_talk_goes_on_and_is_the_same(sound, talking, tmp_path, monkeypatch):
    forward, calls = WanTransformer.forward, []

    def stopping(self, *args, **options):
        calls.append(1)
        if len(calls) == 9:  # three branches a step, two steps a clip: in the second clip's first step
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    flags = ("--variant", "talk", "--audio_path", sound)
    with monkeypatch.context() as patch:
        patch.setattr(WanTransformer, "forward", stopping)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "talk.mp4", *flags)
    assert not (tmp_path / "talk.mp4").exists()
    again = []

    def counting(self, *args, **options):
        again.append(1)
        return forward(self, *args, **options)

    monkeypatch.setattr(WanTransformer, "forward", counting)
    assert (make(tmp_path / "talk.mp4", *flags) == talking).all()
    assert len(again) == 12


def test_the_record_of_a_talk_makes_it_again(sound, talking, tmp_path):
    args = ["--config", str(sound.with_name("talk.json")), "--output", str(tmp_path / "again.mp4")]
    infer_long_video.main(infer_long_video.parse_args(args))
    assert (read_frames(tmp_path / "again.mp4") == talking).all()


def test_layers_come_from_the_file_that_is_given(sound, talking, tmp_path):
    tensors = tiny_multitalk(load_config("tiny-i2v")).state_dict()
    flags = (
        "--variant",
        "talk",
        "--audio_path",
        sound,
        "--num_clips",
        2,
        "--multitalk_path",
        tmp_path / "m.safetensors",
    )
    save_file(tensors, tmp_path / "m.safetensors")
    same = make(tmp_path / "same.mp4", *flags)
    assert len(same) == 2 * CLIP - 1
    assert abs(same.astype(int) - talking[: len(same)]).mean() < 0.1  # mapped weights lie elsewhere in memory
    save_file({name: -tensor for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    assert abs(make(tmp_path / "other.mp4", *flags).astype(int) - same).mean() > 1


def test_audio_layers_of_a_file_are_read_as_float8(sound, tmp_path, monkeypatch):
    """None of them is wide even before they are placed."""
    save_file(tiny_multitalk(load_config("tiny-i2v")).state_dict(), tmp_path / "m.safetensors")
    flags = ("--variant", "talk", "--audio_path", sound, "--multitalk_path", tmp_path / "m.safetensors", "--fp8")
    args = infer_long_video.parse_args([*SMALL, *map(str, flags)])
    settings, config, _ = resolve_long_video(args)
    wan = Wan(settings, config, start_processes("cpu"), driving_parts(settings, config))
    placed = []
    monkeypatch.setattr(wan, "_place", lambda layers: placed.append(layers))
    wan.transformer(0)
    linears = [type(layer) for layers in placed for layer in float8_linears(layers).values()]
    assert len(placed) == 2 and set(linears) == {Float8Linear}


def test_more_clips_than_the_sound_lasts_are_not_made(sound, caplog):
    settings = resolve("--variant", "talk", "--audio_path", sound, "--num_clips", 9)
    assert (settings.num_clips, settings.video_frames) == (3, 20)
    assert "--num_clips 9: the sound lasts for 3, which are made" in caplog.text


# ---------------------------------------------------------------------------------------------------------- dance


def test_the_video_has_a_frame_for_each_pose_at_their_rate(poses, dancing):
    info = probe(poses.with_name("dance.mp4"))
    assert (info.num_frames, round(info.fps), info.has_audio) == (NUM_POSES, 30, False)
    assert read_metadata(poses.with_name("dance.mp4"))["settings"]["guidance_scale"] == [2.0]


def test_other_poses_make_another_video(dancing, tmp_path):
    other = write_poses(tmp_path / "other.mp4", step=1)
    frames = make(tmp_path / "out.mp4", "--variant", "dance", "--pose_path", other, "--num_clips", 1)
    assert abs(frames[: CLIP - 1].astype(int) - dancing[: CLIP - 1]).mean() > 0.3


def test_more_clips_than_poses_start_over(poses, caplog):
    settings = resolve("--variant", "dance", "--pose_path", poses, "--num_clips", 4)
    assert sum(len(clip.kept) for clip in settings.clips(seed=0)) == 4 * (CLIP - 1) + 1
    assert "--num_clips 4: the poses last for 3; then they start over" in caplog.text
    *_, last = settings.clips(seed=0)
    assert pose_indices(last, CLIP, NUM_POSES) == [4, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("more", "read"),
    [(("--num_clips", 4), [4, 5, 6, 7, 8, 9, 10, 11, 12]), ((), [16, 17, 18, 19, 19, 19, 19, 19, 19])],
    ids=["start over", "are held"],
)
def test_poses_that_the_last_clip_is_given(poses, monkeypatch, more, read):
    """Beyond the end of the poses: they start over in a longer video, and are held where the video ends with them."""
    args = infer_long_video.parse_args([*SMALL, "--variant", "dance", "--pose_path", str(poses), *map(str, more)])
    settings, config, _ = resolve_long_video(args)
    given = poses_given(settings, config, monkeypatch)
    assert given[0] == list(range(CLIP))
    assert given[-1] == read


def test_the_last_pose_is_held_in_frames_that_are_cut_off(poses):
    *_, last = resolve("--variant", "dance", "--pose_path", poses).clips(seed=0)
    assert pose_indices(last, CLIP, NUM_POSES, starts_over=False) == [16, 17, 18, 19, 19, 19, 19, 19, 19]
    assert last.kept == range(4)


def test_the_released_file_brings_lora_and_embedder(poses, dancing, tmp_path, monkeypatch):
    tensors = tiny_pose_embedder(load_config("tiny-i2v")).state_dict()
    embedder = {f"{KEY}{name}": tensor for name, tensor in tensors.items()}
    without_effect = {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in lora_tensors().items()}
    flags = ("--variant", "dance", "--pose_path", poses, "--lora_path", tmp_path / "svi-dance.safetensors")

    def difference(output: str) -> float:
        frames = make(tmp_path / output, *flags, "--num_clips", 2)
        return abs(frames[: CLIP - 1].astype(int) - dancing[: CLIP - 1]).mean()

    save_file(without_effect | embedder, tmp_path / "svi-dance.safetensors")
    assert difference("same.mp4") < 0.1  # mapped weights lie elsewhere in memory
    save_file(lora_tensors() | embedder, tmp_path / "svi-dance.safetensors")
    assert difference("other.mp4") > 1
    save_file(lora_tensors(), tmp_path / "svi-dance.safetensors")
    monkeypatch.setattr(Wan, "encode_prompts", None)  # umT5 takes minutes: it is said before
    with pytest.raises(WeightsError, match="no pose embedder in it"):
        difference("none.mp4")


# ------------------------------------------------------------------------------------------------ speech and poses


@pytest.mark.parametrize("variant", ["talk", "dance"])
def test_speech_and_poses_drive_one_video(sound, poses, talking, dancing, tmp_path, variant):
    """Both act: without the one, or with another of either, the frames are others."""

    def both(name: str, speech: Path, drawn: Path) -> numpy.ndarray:
        frames = make(tmp_path / name, "--variant", variant, "--audio_path", speech, "--pose_path", drawn)
        return frames.astype(int)

    frames = both("both.mp4", sound, poses)
    info = probe(tmp_path / "both.mp4")
    assert (info.num_frames, info.fps, info.has_audio) == (20, 25, True)  # as long as the speech, at its rate
    metadata = read_metadata(tmp_path / "both.mp4")
    assert metadata["audio"] and metadata["poses"]
    alone = {"talk": talking, "dance": dancing}[variant]
    assert abs(frames - alone[:20]).mean() > 1
    other_sound = both("sound.mp4", write_sound(tmp_path / "other.wav", 0.81, pitch=900), poses)
    other_poses = both("poses.mp4", sound, write_poses(tmp_path / "other.mp4", step=1))
    assert abs(other_sound - frames).mean() > 0.1 and abs(other_poses - frames).mean() > 0.1
    assert (both("again.mp4", sound, poses) == frames).all()


def test_poses_that_end_before_the_speech_start_over(poses, monkeypatch, tmp_path):
    speech = write_sound(tmp_path / "long.wav", 1.2)  # 30 frames for 20 poses
    flags = ("--variant", "talk", "--audio_path", speech, "--pose_path", poses)
    settings, config, _ = resolve_long_video(infer_long_video.parse_args([*SMALL, *map(str, flags)]))
    given = poses_given(settings, config, monkeypatch)
    assert given[0] == list(range(CLIP))
    assert given[-1] == [(settings.clips(seed=0)[-1].start + i) % NUM_POSES for i in range(CLIP)]


def test_the_embedder_beside_speech_has_a_file_of_its_own(sound, poses, tmp_path):
    flags = ("--variant", "talk", "--audio_path", sound, "--pose_path", poses)
    same = make(tmp_path / "seed.mp4", *flags)
    tensors = tiny_pose_embedder(load_config("tiny-i2v")).state_dict()
    for name, factor in (("same", 1), ("other", -1)):
        embedder = {f"{KEY}{key}": factor * tensor for key, tensor in tensors.items()}
        save_file(embedder | lora_tensors(), tmp_path / f"{name}.safetensors")
    from_file, other = (
        make(tmp_path / f"{name}.mp4", *flags, "--pose_embedder_path", tmp_path / f"{name}.safetensors").astype(int)
        for name in ("same", "other")
    )
    assert abs(from_file - same).mean() < 0.1 < 0.5 < abs(other - same).mean()


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--variant", "talk"], UsageError, "--variant talk needs --audio_path: a sound file"),
        (["--variant", "dance"], UsageError, "--variant dance needs --pose_path"),
        (["--variant", "talk", "--audio_path", "no.wav"], InputError, "--audio_path no.wav is missing"),
        (["--variant", "talk", "--audio_path", "{poses}"], InputError, "has no sound track"),
        (["--variant", "dance", "--pose_path", "{sound}"], InputError, "no video stream"),
        (
            ["--variant", "shot", "--audio_path", "{sound}"],
            UsageError,
            "shot is not driven by audio; use --variant talk",
        ),
        (["--variant", "shot", "--pose_path", "{poses}"], UsageError, "not driven by pose; use --variant dance"),
        (
            ["--variant", "dance", "--pose_path", "{poses}", "--multitalk_path", "m.safetensors"],
            UsageError,
            "not driven by audio; use --variant talk",
        ),
        (["--variant", "talk", "--audio_path", "{sound}", "--fps", "16"], UsageError, "--fps 16 .* trained at 25"),
        (
            ["--variant", "talk", "--audio_path", "{sound}", "--cfg_scale_audio", "-1"],
            UsageError,
            "accepted are 0 to 100",
        ),
        (["--variant", "talk", "--audio_path", "{sound}", "--extend", "{poses}"], UsageError, "--extend with"),
    ],
)
def test_what_cannot_be_is_refused(flags, error, words, sound, poses, tmp_path):
    flags = [flag.format(sound=sound, poses=poses) for flag in flags]
    with pytest.raises(error, match=words):
        make(tmp_path / "out.mp4", *flags)


def test_missing_layers_are_named_with_the_command(sound, tmp_path):
    flags = ("--variant", "talk", "--audio_path", sound, "--multitalk_path", "none.safetensors")
    with pytest.raises(WeightsError, match="none.safetensors: no such weights .--multitalk_path.; run: .* multitalk"):
        make(tmp_path / "out.mp4", *flags)
