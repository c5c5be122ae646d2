"""infer_long_video.py end to end on the tiny models: what a user types, and the file that comes out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import infer_long_video
from configs import load_config
from errors import UsageError, UserError
from metrics.drift import clip_starts, draw, likeness_to, measure_clips
from models.wan.transformer import WanTransformer
from pipelines.clip_plan import Chain, clips_for, plan_clips, pose_indices, prompts_of_clips, upstream_pose_indices
from pipelines.long_video.command import check_released_name, resolve_long_video
from pipelines.long_video.media import size_on_area
from pipelines.long_video.variant import VARIANTS, Variant, variant_config, variant_of_file
from pipelines.tiny import tiny_transformer
from preprocess.face_detection import Face
from preprocess.prompts import read_prompt_stream
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import write_video

PROJECT = Path(__file__).parent.parent
SMALL = ["--height", "32", "--width", "32", "--num_frames", "5", "--num_inference_steps", "2", "--no_drift_report"]
TWO_EXPERTS = ["--config", "tiny-i2v-a14b"]
ONE_MODEL = ["--config", "tiny-i2v"]
MODELS = {"2.0": TWO_EXPERTS, "2.0-pro": TWO_EXPERTS}
LONGER = ["--num_frames", "9"]  # for the variants whose clips share five frames


def run_here(output, *flags) -> None:
    made = infer_long_video.main(infer_long_video.parse_args(["--output", str(output), *map(str, flags)]))
    assert made == [output]


def make(output, *flags) -> numpy.ndarray:
    """Run in this process; the frames of the file."""
    run_here(output, *SMALL, *flags)
    return read_frames(output)


def command(*flags) -> list[str]:
    return [sys.executable, "infer_long_video.py", *map(str, flags)]


def difference(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return float(abs(a.astype(int) - b.astype(int)).mean())


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Three clips of SVI-Shot: 13 frames."""
    output = tmp_path_factory.mktemp("reference") / "out.mp4"
    make(output)
    return output


# ---------------------------------------------------------------------------------------------------------- the plan

CHAINS = {
    "shot": Chain(81, 1, 1, "earlier"),
    "film": Chain(81, 5, 5, "earlier"),
    "talk": Chain(81, 1, 1, "later"),
    "2.0-pro": Chain(81, 0, 5, "later", motion_latents=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_moment_is_shown_once(name):
    chain = Variant.of(name).chain(81)
    assert chain == CHAINS.get(name, chain)
    for extends in (False, True):
        clips = plan_clips(chain, ["p"] * 5, extends=extends)
        shown = [clip.start + i for clip in clips for i in clip.kept]
        assert shown == list(range(chain.overlap if extends else 0, 5 * 81 - 4 * chain.overlap))


def test_motion_frames_are_upstreams_or_as_asked(tmp_path):
    def settings(*flags):
        return resolve_long_video(infer_long_video.parse_args([*ONE_MODEL, "--prompt", "a", "b", *flags]))[0]

    variant = ["--variant", "2.0-wan2.1"]
    assert settings(*variant).svi.chain(81) == Chain(81, 5, 5, "earlier")  # of scripts/test/svi_2.0.sh
    assert settings(*variant, "--num_motion_frames", "1").svi.chain(81) == Chain(81, 1, 1, "earlier")
    assert settings("--variant", "film").svi.motion_frames == 5
    assert settings("--variant", "film-transitions").svi.motion_frames == 5
    assert settings("--variant", "shot").svi.motion_frames == 1
    flags = [*ONE_MODEL, *variant, *LONGER, "--num_clips", 2]
    assert len(make(tmp_path / "five.mp4", *flags)) == 2 * 9 - 5
    assert len(make(tmp_path / "one.mp4", *flags, "--num_motion_frames", 1)) == 2 * 9 - 1


def test_seams_of_upstream_show_a_moment_twice():
    """What the default plan avoids: Talk keeps all frames, Pro's own default drops one too few."""
    talk = plan_clips(Chain(81, 1, 1, "neither"), ["p"] * 3)
    assert sum(len(clip.kept) for clip in talk) == 243
    pro = plan_clips(Chain(81, 4, 4, "later", motion_latents=1), ["p"] * 3)
    ours = plan_clips(Variant.of("2.0-pro").chain(81), ["p"] * 3)
    assert sum(len(c.kept) for c in pro) - sum(len(c.kept) for c in ours) == 2


def test_clips_follow_the_length_of_speech():
    chain = Variant.of("talk").chain(81)
    for frames in (1, 81, 82, 161, 162, 1000):
        clips = plan_clips(chain, ["p"] * clips_for(frames, chain), num_frames=frames)
        assert sum(len(clip.kept) for clip in clips) == frames
        assert all(len(clip.kept) for clip in clips)


def test_poses_are_those_of_their_moment():
    chain = Variant.of("dance").chain(81)
    clips = plan_clips(chain, ["p"] * 3)
    shown = [pose_indices(clip, 81, 200)[i] for clip in clips for i in clip.kept]
    assert shown == [i % 200 for i in range(241)]
    upstream = upstream_pose_indices(chain, 3, 200)
    stutter = [upstream[clip.index][i] for clip in clips for i in clip.kept]
    assert stutter[:82] == [*range(81), 80]  # one pose twice at the first seam, and late by one ever after
    assert stutter[82:] == [i % 200 for i in range(81, 240)]


def test_seeds_and_prompts_of_clips():
    clips = plan_clips(Variant.of("shot").chain(9), prompts_of_clips("ab", 4, times=2, prefix="wide"), seed=7)
    assert [clip.seed for clip in clips] == [7, 49, 91, 133]
    assert [clip.prompt for clip in clips] == ["wide, a", "wide, a", "wide, b", "wide, b"]
    assert prompts_of_clips("ab", 5) == list("abbbb")
    assert prompts_of_clips("ab", 5, repeat="cycle") == list("ababa")
    assert prompts_of_clips("ab", 5, repeat="stop") == list("ab")
    assert prompts_of_clips("ab", 3, first_only=True, repeat="stop") == list("aaa")


def test_size_has_the_shape_of_the_picture_on_the_trained_area():
    assert size_on_area(480, 832, 480 * 832) == (480, 832)
    for height, width in ((1204, 2150), (2150, 1204), (100, 100), (217, 300)):
        rows, columns = size_on_area(height, width, 480 * 832)
        assert rows % 16 == columns % 16 == 0
        assert rows * columns == pytest.approx(480 * 832, rel=0.05)
        assert rows / columns == pytest.approx(height / width, rel=0.05)


# -------------------------------------------------------------------------------------------------------- prompt files

STORY = ["A cat.", "A dog runs, fast [left].", "It's « naïve » 猫 😀"]


@pytest.mark.parametrize(
    "text",
    [
        'prompts = ["A cat.", "A dog runs, fast [left].", "It\'s « naïve » 猫 😀"]',
        'prompts=[\n  "A cat.",  # one ] two\n  """A dog runs, fast [left].""",\n  "It\'s « naïve » 猫 😀",\n]\n',
        'import os\nos.abort()\nprompts = ["A cat.", "A dog runs, fast [left].", "It\'s « naïve » 猫 😀"]\nos.abort()',
        '["A cat.", "A dog runs, fast [left].",\n"It\'s « naïve » 猫 😀"]',
        "# a story\nA cat.\n\n  A dog runs, fast [left].  \nIt's « naïve » 猫 😀\n",
        'prompts = ["A cat.", "A dog runs, fast [left].", "It\'s « naïve » 猫 😀"]\n)) not python at all ]',
    ],
    ids=["list", "spread", "code", "bare", "lines", "rubbish"],
)
@pytest.mark.parametrize("encode", [str.encode, lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()])
def test_every_form_of_prompt_file(tmp_path, text, encode):
    file = tmp_path / "prompt.txt"
    file.write_bytes(encode(text))
    assert read_prompt_stream(str(file)) == STORY


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('prompts = ["old"]\nprompts = [\n  "a",\n  "b",\n]\n', ["a", "b"]),
        ('# prompts = ["old"]\nprompts = ["a"]\n# prompts = ["new"]', ["a"]),
        ('prompts = ["old"]; prompts = ["a"]; fps = 3', ["a"]),
        ('prompts = ["""\nprompts = ["no"]"""]', ['\nprompts = ["no"]']),
        ('prompts = ["a"]\nprompts += ["b", "c"]\nprompts.append("d")\nprompts.extend(["e"])', list("abcde")),
        ('prompts = ["a"] + ["b" "c", "d" + "e"] * 2', ["a", "bc", "de", "bc", "de"]),
        ('prompts: list[str] = ["a", f"b"]', ["a", "b"]),
        ('prompts = ("a",\n "b")', ["a", "b"]),
        ('prompts = ["old"]\nprompts = ("a", ("b"))', ["a", "b"]),
        ('my_prompts = ["a", "b"]', ["a", "b"]),
        ("prompts = (the crowd) a man walks\nhe stops", ["prompts = (the crowd) a man walks", "he stops"]),
    ],
)
def test_a_file_means_what_its_prompts_are_at_its_end(tmp_path, text, prompts):
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    assert read_prompt_stream(str(file)) == prompts


def test_long_prompt_file(tmp_path):
    file = tmp_path / "prompt.txt"
    for prompts in (["x" * 100_000, "y"], ["[" * 30_000, "]"], ["a"] * 20_000):
        file.write_text(f"prompts = {json.dumps(prompts)}")
        assert read_prompt_stream(str(file)) == prompts
    file.write_text("[cinematic] a man\n" + "very " * 20_000)
    assert [len(prompt) for prompt in read_prompt_stream(str(file))] == [17, 99_999]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n# only a comment\n",
        "prompts = []",
        'prompts = ["a", "b"',
        'prompts = ["a", 2]',
        "prompts = [open('executed', 'w')]",
        'prompts = [__import__("pathlib").Path("executed").touch()]',
        'prompts = [f"{open(1)}"]',
        'prompts = ["a"]\nprompts = [open("executed", "w")]',
        'prompts = ["a"]\nfor i in range(3):\n    prompts.append("b")',
        'prompts = ["a"] * 10**9',
        'prompts = [["a", "b"], ["c"]]',
        "prompts = " + "[" * 5000,
        "prompts = [" + "-" * 50_000 + "1]",
    ],
)
def test_hostile_and_empty_prompt_files(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text(text)
    with pytest.raises(UserError, match="--prompt_path prompt.txt") as error:
        read_prompt_stream("prompt.txt")
    assert error.value.exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompt.txt"], "code of a prompt file was executed"


# ------------------------------------------------------------------------------------------------------- what comes out


def test_command_without_arguments(tmp_path):
    """Three clips of the photo in the repository, without a doubled frame, and a report of their drift."""
    output = tmp_path / "out.mp4"
    result = subprocess.run(command("--output", output), cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(output)
    info = probe(output)
    assert (info.num_frames, info.width, info.height, info.fps) == (3 * 9 - 2, 128, 128, 16.0)
    frames = read_frames(output)
    assert min(difference(a, b) for a, b in zip(frames, frames[1:], strict=False)) > 1
    made = read_metadata(output)
    assert [(c["start"], c["frames"], c["seed"]) for c in made["clips"]] == [(0, 8, 0), (8, 8, 42), (16, 9, 84)]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["out.drift.png", "out.drift.tsv", "out.json", "out.mp4"]
    assert "likeness" not in result.stderr or "seam" in result.stderr


def test_variants_condition_differently(tmp_path):
    """The same model, seeds and prompts: only padding, motion frames, hand-over and kept frames differ."""
    made = {}
    for variant, config in {v: MODELS.get(v, ONE_MODEL) for v in ("shot", "tom", "film", "2.0", "2.0-pro")}.items():
        made[variant] = make(tmp_path / f"{variant}.mp4", *config, *LONGER, "--variant", variant, "--num_clips", 2)
        assert read_metadata(tmp_path / f"{variant}.mp4")["settings"]["variant"] == variant
    lengths = {variant: len(frames) for variant, frames in made.items()}
    assert lengths == {"shot": 17, "tom": 17, "film": 13, "2.0": 17, "2.0-pro": 13}
    assert difference(made["tom"][:8], made["shot"][:8]) > 0.1
    assert (made["film"][:4] == made["tom"][:4]).all()  # the first clip knows one picture in both
    assert difference(made["film"][4:8], made["tom"][8:12]) > 0.1
    assert difference(made["2.0"][:9], made["2.0-pro"][:9]) > 0.1


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "a man"),
        ("--prompt_prefix", "close up"),
        ("--seed", 1),
        ("--seed_multiplier", 3),
        ("--ref_image_path", "assets/../assets/face.png", "--max_width", 48),
        ("--cfg_scale_text", 2),
        ("--num_steps", 3),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_change_the_video(tmp_path, reference, monkeypatch, flags):
    monkeypatch.chdir(PROJECT)
    small = SMALL[4:] if "--max_width" in flags else SMALL
    run_here(tmp_path / "out.mp4", *small, *flags, "--num_clips", 2)
    frames, before = read_frames(tmp_path / "out.mp4"), read_frames(reference)
    assert frames.shape[1:] != before.shape[1:] or difference(frames[4:8], before[4:8]) > 0.05


def test_prompts_that_do_not_last(tmp_path, caplog):
    story = tmp_path / "story.txt"
    story.write_text('prompts = ["one", "two"]', encoding="utf-8-sig")

    def prompts(*flags) -> list[str]:
        args = infer_long_video.parse_args([*SMALL, "--prompt_path", str(story), *flags])
        return [clip.prompt for clip in resolve_long_video(args)[0].clips(seed=0)]

    assert prompts() == ["one", "two"]
    assert prompts("--num_clips", "3") == ["one", "two", "two"]
    assert "3 clips for 2 prompts: the last one goes on" in caplog.text
    assert prompts("--num_clips", "3", "--prompt_repeat", "cycle") == ["one", "two", "one"]
    assert prompts("--num_clips", "3", "--prompt_repeat", "stop") == ["one", "two"]
    assert prompts("--num_clips", "3", "--use_first_prompt_only") == ["one"] * 3


def test_image_encoder_is_read_once(tmp_path, monkeypatch, reference):
    """It looks at a frame of every clip, and waits for the next one on the CPU; after the last it is gone."""
    from pipelines import wan as module

    read, waiting = [], []
    load, encode = module.read_image_encoder, module.Wan.encode_images

    def watched(self, images, keep=False):
        features = encode(self, images, keep)
        waiting.append(self._image_encoder is not None)
        return features

    monkeypatch.setattr(module, "read_image_encoder", lambda *args: read.append(args) or load(*args))
    monkeypatch.setattr(module.Wan, "encode_images", watched)
    assert (make(tmp_path / "out.mp4") == read_frames(reference)).all()
    assert len(read) == 1
    assert waiting == [True] * (len(waiting) - 1) + [False] and len(waiting) > 1


def test_json_of_a_run_makes_the_run_again(tmp_path, reference):
    again = tmp_path / "again.mp4"
    run_here(again, "--config", reference.with_suffix(".json"))
    assert (read_frames(again) == read_frames(reference)).all()
    assert read_metadata(again) == read_metadata(reference)


def test_two_processes_make_the_same_video(tmp_path):
    flags = [*TWO_EXPERTS, *SMALL, *LONGER, "--variant", "2.0-pro", "--num_clips", "2"]
    alone = make(tmp_path / "alone.mp4", *flags)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "infer_long_video.py"]
    flags += ["--ulysses_degree", "2", "--output", str(tmp_path / "split.mp4")]
    result = subprocess.run([*launch, *flags], cwd=PROJECT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert difference(read_frames(tmp_path / "split.mp4"), alone) < 0.5  # sums in another order


def test_first_frame_of_a_video_is_a_picture_too(tmp_path, reference):
    args = infer_long_video.parse_args([*SMALL, "--ref_image_path", str(reference)])
    assert (resolve_long_video(args)[2] == read_frames(reference)[0]).all()


def test_output_root(tmp_path):
    picture = tmp_path / "my photo.png"
    Image.open(PROJECT / "assets" / "face.png").save(picture)
    flags = infer_long_video.parse_args(
        [*SMALL, "--ref_image_path", str(picture), "--output_root", str(tmp_path / "v")]
    )
    infer_long_video.main(flags)
    assert (tmp_path / "v" / "my_photo.mp4").is_file()


# ------------------------------------------------------------------------------------------- interrupted and resumed


def count_calls(monkeypatch) -> list:
    calls = []
    forward = WanTransformer.forward

    def counting(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward", counting)
    return calls


def test_killed_run_goes_on_and_gives_the_same_frames(tmp_path, monkeypatch):
    """kill -9 in clip 2 of 3: no file; the same command computes the rest, and the frames are an unbroken run's."""
    steps = 12
    flags = [*SMALL, *LONGER, "--variant", "film", *ONE_MODEL, "--num_inference_steps", steps]
    whole = make(tmp_path / "whole.mp4", *flags)
    output = tmp_path / "out.mp4"
    clips = tmp_path / ".out.clips"
    process = subprocess.Popen(
        command(*flags, "--output", output), cwd=PROJECT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not (clips / ".00001.state.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (clips / ".00001.state.safetensors").exists()
    assert probe(clips / "00000.mp4").num_frames == 4  # the next one has the five that both show
    assert not output.exists()
    calls = count_calls(monkeypatch)
    assert (make(output, *flags) == whole).all()
    assert 2 * steps <= len(calls) < 2 * 2 * steps  # two branches: clip 3, and the rest of clip 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4", "whole.json", "whole.mp4"]


def stop_after_clip(monkeypatch, index: int) -> None:
    from pipelines.clip_store import ClipStore

    def stopping(self, clip, handover, finish=ClipStore.finish):
        finish(self, clip, handover)
        if clip.index == index:
            raise KeyboardInterrupt

    monkeypatch.setattr(ClipStore, "finish", stopping)


def test_latents_are_handed_over_a_break_and_later_prompts_may_change(tmp_path, monkeypatch, caplog):
    """What is finished stays; a longer story goes on from it, as if it had been whole from the start."""
    flags = [*TWO_EXPERTS, *LONGER, "--variant", "2.0-pro", "--prompt", "a", "b"]
    whole = make(tmp_path / "whole.mp4", *flags, "c", "d")
    stop_after_clip(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out.mp4", *flags, "x")
    monkeypatch.undo()
    caplog.set_level("INFO")
    assert (make(tmp_path / "out.mp4", *flags, "c", "d", "--memory", "resident") == whole).all()
    assert "going on after clip 2 of 4" in caplog.text


@pytest.mark.parametrize("damage", ["other settings", "damaged"])
def test_unusable_clips_are_made_anew(tmp_path, reference, monkeypatch, caplog, damage):
    stop_after_clip(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out.mp4", *(["--guidance_scale", 2] if damage == "other settings" else []))
    monkeypatch.undo()
    if damage == "damaged":
        (tmp_path / ".out.clips" / "handover.safetensors").write_bytes(b"\0" * 50)
    assert (make(tmp_path / "out.mp4") == read_frames(reference)).all()
    assert damage in caplog.text


# ----------------------------------------------------------------------------------------- extending, ends, two seeds


@pytest.mark.parametrize("variant", ["shot", "film", "2.0-pro"])
def test_extend_keeps_every_frame_and_the_sound(tmp_path, variant):
    sound = tmp_path / "sound.wav"
    import wave

    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((numpy.sin(numpy.arange(16000) / 8) * 9000).astype("<i2").tobytes())
    first = tmp_path / "first.mp4"
    noise = numpy.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), dtype=numpy.uint8)
    write_video(first, [noise], fps=12.5, quality=6, audio_path=sound)
    length = 13 if variant == "film" else 9
    flags = ["--variant", variant, *MODELS.get(variant, ONE_MODEL), *SMALL[6:], "--num_frames", length]
    run_here(tmp_path / "out.mp4", *flags, "--extend", first, "--num_clips", 2)
    info, frames = probe(tmp_path / "out.mp4"), read_frames(tmp_path / "out.mp4")
    overlap = {"shot": 1}.get(variant, 5)
    assert (frames[:17] == read_frames(first)).all()  # not a bit of them changed, though its quality is another
    assert (info.num_frames, info.fps, info.has_audio) == (17 + 2 * (length - overlap), 12.5, True)
    assert read_metadata(tmp_path / "out.mp4")["clips"][0]["start"] == 17


def test_extend_a_video_of_another_encoder(tmp_path, caplog):
    from preprocess.ffmpeg import ffmpeg_url, run_ffmpeg

    foreign = tmp_path / "foreign.webm"
    smooth = "testsrc2=size=32x32:rate=16:duration=0.5"
    assert run_ffmpeg("-f", "lavfi", "-i", smooth, "-c:v", "libvpx", "-b:v", "4M", ffmpeg_url(foreign)).returncode == 0
    flags = ["--extend", foreign, "--num_frames", 9, "--num_inference_steps", 2, "--num_clips", 1, "--no_drift_report"]
    run_here(tmp_path / "out.mp4", *flags)
    frames = read_frames(tmp_path / "out.mp4")
    assert len(frames) == 8 + 8
    assert difference(frames[:8], read_frames(foreign)) < 6
    assert "its picture is encoded anew" in caplog.text


def test_extending_goes_on_counting_seeds(tmp_path, reference):
    run_here(tmp_path / "out.mp4", "--extend", reference, *SMALL[4:], "--num_clips", 2)
    assert [clip["seed"] for clip in read_metadata(tmp_path / "out.mp4")["clips"]] == [126, 168]
    assert clip_starts(tmp_path / "out.mp4", None) == [0, 13, 16]


def test_end_image_is_what_the_last_clip_ends_on(tmp_path):
    end = tmp_path / "end.png"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(end)
    flags = [*TWO_EXPERTS, "--variant", "2.0", "--num_clips", "2"]
    without, with_end = make(tmp_path / "a.mp4", *flags), make(tmp_path / "b.mp4", *flags, "--end_image", end)
    assert (without[:5] == with_end[:5]).all()
    assert difference(without[5:], with_end[5:]) > 0.1


# --------------------------------------------------------------------------------------------------------------- LoRAs


def write_lora(path: Path, config: str, seed: int, scale: float = 0.3) -> Path:
    """In SVI 2's names."""
    transformer = tiny_transformer(load_config(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in transformer.named_parameters():
        if name.endswith((".q.weight", ".v.weight", ".ffn.0.weight")):
            stem = name.removesuffix(".weight")
            rows, columns = weight.shape
            tensors[f"{stem}.lora_A.default.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
            tensors[f"{stem}.lora_B.default.weight"] = torch.randn(rows, 4, generator=generator) * scale
    save_file(tensors, path)
    return path


def test_first_clip_without_the_lora(tmp_path, reference):
    lora = write_lora(tmp_path / "svi-shot.safetensors", "tiny-i2v", 1)
    beside = write_lora(tmp_path / "style.safetensors", "tiny-i2v", 2)
    flags = [*ONE_MODEL, "--num_clips", 2]
    switched = make(tmp_path / "switched.mp4", *flags, "--lora_path", lora, "--first_clip_without_lora")
    frames = make(tmp_path / "lora.mp4", *flags, "--lora_path", lora)
    base = read_frames(reference)
    assert difference(frames[:4], base[:4]) > 0.1
    assert (switched[:4] == base[:4]).all()
    assert difference(switched[4:8], base[4:8]) > 0.1
    both = ["--lora_path", lora, beside, "--lora_scale", 1, 0.5]
    stacked = make(tmp_path / "both.mp4", *flags, *both, "--first_clip_without_lora")
    alone = make(tmp_path / "alone.mp4", *flags, "--lora_path", beside, "--lora_scale", 0.5)
    assert (stacked[:4] == alone[:4]).all()  # what runs beside SVI's stays
    weights = read_metadata(tmp_path / "switched.mp4")["weights"]
    assert str(lora) in weights


def test_two_experts_with_a_distilled_lora_beside(tmp_path):
    """The preset: steps, shift, guidance, the switch of experts, and a scale for each of the two files."""
    files = {
        f"{kind}_{expert}": write_lora(tmp_path / f"{kind}_{expert}_noise.safetensors", "tiny-i2v-a14b", number)
        for number, (kind, expert) in enumerate((k, e) for k in ("svi_v2.0", "distilled") for e in ("high", "low"))
    }
    released = load_file(files["distilled_low"])  # with what the released one carries in vain
    released["diffusion_model.blocks.0.cross_attn.k_img.diff_b"] = torch.ones(8)
    released["diffusion_model.img_emb.proj.4.diff"] = torch.ones(8)
    save_file(released, files["distilled_low"])
    flags = [*TWO_EXPERTS, "--variant", "2.0", "--lora_config", "lora-svi-lightx2v", *SMALL[:6]]
    flags += ["--no_drift_report"]
    for expert in ("high", "low"):
        flags += [f"--lora_path_{expert}", files[f"svi_v2.0_{expert}"], files[f"distilled_{expert}"]]
    run_here(tmp_path / "out.mp4", *flags, "--num_clips", 1)
    settings = read_metadata(tmp_path / "out.mp4")["settings"]
    assert (settings["num_inference_steps"], settings["shift"], settings["solver"]) == (6, 8.0, "dpm++")
    assert (settings["lora_scale_high"], settings["lora_scale_low"]) == ([1.0, 0.5], [1.0, 1.0])
    assert settings["boundary"] == 0.9
    run_here(tmp_path / "full.mp4", *flags, "--num_clips", 1, "--lora_scale_high", 1, 1)
    assert difference(read_frames(tmp_path / "out.mp4"), read_frames(tmp_path / "full.mp4")) > 0.1


def test_names_of_released_files_tell_their_variant():
    for name in VARIANTS:
        for released in variant_config(name)["files"].values():
            assert variant_of_file(Path(released).name) == name, released
    assert variant_of_file("SVI_v2_PRO_Wan2.2-I2V-A14B_HIGH_lora_rank_128_fp16.safetensors") == "2.0-pro"
    check_released_name("svi-film_lora_rank_128_fp16.safetensors", "film", "")  # of the same variant
    with pytest.raises(UsageError, match="--variant film, not for shot"):
        check_released_name("svi-film-transitions.safetensors", "shot", "")
    for other in ("custom_style.safetensors", "my_svi_run.safetensors", "shotgun.safetensors", "tom.safetensors"):
        assert variant_of_file(other) is None


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--variant", "shoot"], 2, ["--variant shoot", "shot, film"]),
        (["--variant", "tiny-i2v.yaml"], 2, ["tiny-i2v.yaml"]),
        (
            ["--variant", "film", "--prompt", "x", "--ref_image_path", "assets/face.png"],
            4,
            ["svi-film-opt", "--only wan2.1-i2v-14B-480P svi-film"],
        ),
        (["--variant", "2.0", *ONE_MODEL], 2, ["--variant 2.0", "two experts"]),
        (["--num_motion_frames", "0"], 2, ["--num_motion_frames 0", "trained with 1"]),
        (["--variant", "2.0-pro", *TWO_EXPERTS, "--num_motion_frames", "4"], 2, ["--num_motion_frames 4"]),
        (["--variant", "shot", *TWO_EXPERTS], 2, ["--variant shot", "one model"]),
        (["--config", "svi-film", "--variant", "tom"], 2, ["contradict"]),
        (["--config", "wan2.1-t2v-1.3B", "--prompt", "x"], 2, ["family t2v"]),
        (["--num_clips", "0"], 2, ["--num_clips 0"]),
        (["--prompt_repeat", "often"], 2, ["--prompt_repeat often", "last, cycle, stop"]),
        (["--seed_multiplier", "0"], 2, ["--seed_multiplier 0"]),
        (["--num_frames", "1"], 2, ["--num_frames 1", "at least 5"]),
        (["--variant", "film", *ONE_MODEL, "--num_frames", "5"], 2, ["--num_frames 5", "at least 9"]),
        (["--height", "64"], 2, ["--height and --width"]),
        (["--boundary", "0.5"], 2, ["--boundary", "one model"]),
        (["--end_image", "assets/face.png"], 2, ["--end_image", "--variant 2.0"]),
        (["--extend", "missing.mp4"], 3, ["--extend", "missing.mp4"]),
        (["--extend", "README.md"], 3, ["--extend", "README.md"]),
        (["--extend", "x.mp4", "--fps", "8"], 2, ["--fps with --extend"]),
        (["--ref_image_path", "missing.png"], 3, ["--ref_image_path", "missing.png"]),
        (["--first_frame", "instantid"], 2, ["--ip_image", "one photo"]),
        (["--first_frame", "instantid", "--ip_image", "assets/face.png"], 4, ["--only sdxl-base-1.0"]),
        (["--first_frame", "instantid", "--extend", "x.mp4"], 2, ["--extend and --first_frame"]),
        (["--ip_image", "assets/face.png"], 2, ["--ip_image", "--first_frame instantid"]),
        (["--face_index", "0"], 2, ["--face_index", "--first_frame"]),
        (["--prompt_path", "missing.txt"], 3, ["--prompt_path missing.txt"]),
        (["--prompt_path", "README.md", "--prompt", "x"], 2, ["--prompt and --prompt_path"]),
        (["--output_root", "outputs"], 2, ["--output_root and --output"]),
        (["--extend", "assets/face.png"], 3, ["--extend"]),
        (["--lora_path", "missing.safetensors", *ONE_MODEL], 4, ["missing.safetensors"]),
        (["--lora_path_high", "x.safetensors", *ONE_MODEL], 2, ["--lora_path_high"]),
        (["--lora_path", "svi-film.safetensors", *ONE_MODEL], 2, ["--variant film, not for shot"]),
        (["--lora_path", "a/SVI_v2.0_pro_high.safetensors", *ONE_MODEL], 2, ["--variant 2.0-pro, not for shot"]),
        (
            ["--variant", "2.0", *TWO_EXPERTS, "--lora_path_low", "SVI_Wan2.2_high_noise_lora_v2.0.safetensors"],
            2,
            ["--lora_path_low", "high-noise expert"],
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, tmp_path_factory, monkeypatch, flags, exit_code, words):
    elsewhere = tmp_path_factory.mktemp("no checkpoints here")
    for name in ("assets", "README.md"):
        (elsewhere / name).symlink_to(PROJECT / name)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError) as error:
        run_here(tmp_path / "out.mp4", *flags)
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not list(tmp_path.iterdir())


def test_lora_with_another_variants_layers_is_refused(tmp_path):
    """SVI-Dance's file holds a pose embedder, whatever it is called."""
    from safetensors.torch import load_file

    file = write_lora(tmp_path / "mine.safetensors", "tiny-i2v", 1)
    save_file(load_file(file) | {"dwpose_embedding.0.weight": torch.zeros(16, 3, 3, 3, 3)}, file)
    with pytest.raises(UserError, match="dwpose_embedding") as error:
        make(tmp_path / "out.mp4", *ONE_MODEL, "--lora_path", file)
    assert error.value.exit_code == 3


# -------------------------------------------------------------------------------------------------------- drift report


def test_drift_report_measures_what_was_put_in():
    """A video with a known colour step, a frozen clip and a doubled frame."""
    generator = numpy.random.default_rng(1)
    noise = generator.integers(100, 120, (8, 32, 32, 3), dtype=numpy.uint8)
    redder = noise.copy()
    redder[..., 0] += 40
    frozen = numpy.repeat(noise[7:8], 8, axis=0)
    frames = [*noise, noise[7], *redder[1:], *frozen]
    rows = measure_clips(iter(frames), [0, 8, 16], likeness=lambda frame: float(frame[0, 0, 0] > 130))
    assert [row.frames for row in rows] == [8, 8, 8]
    assert rows[0].red == pytest.approx(noise[..., 0].mean(), abs=1e-3)
    assert rows[1].seam == 0
    assert rows[2].motion == 0
    assert rows[2].seam is None
    assert rows[0].shift == 0 < rows[2].shift < 1 < 5 < rows[1].shift
    assert rows[1].likeness == 0.75  # of four frames the first is the doubled one
    picture = draw(rows)
    assert picture.shape == (7 * 150, 900, 3)
    assert (picture != 255).any()


def test_likeness_is_the_cosine_to_the_pictures_face(monkeypatch):
    """With a recogniser whose embedding is the mean colour, and which sees no face in black."""

    def recognizer(picture: numpy.ndarray) -> list[Face]:
        color = picture.mean(axis=(0, 1))
        return [Face((0, 0, 8, 8), 1.0, embedding=color)] if color.any() else []

    monkeypatch.setattr("metrics.drift.recognizer_is_there", lambda: True)
    monkeypatch.setattr("metrics.drift.load_recognizer", lambda *args: recognizer)
    red, green, black = (numpy.full((8, 8, 3), color, numpy.uint8) for color in ((90, 0, 0), (0, 90, 0), (0, 0, 0)))
    likeness = likeness_to(red)
    assert likeness_to(black) is None
    rows = measure_clips([red, red, black, green, red, green, black, black], [0, 2, 4, 6], likeness)
    assert [row.likeness for row in rows] == [pytest.approx(1), pytest.approx(0), pytest.approx(0.5), None]


def test_drift_report_as_a_command(tmp_path, reference):
    assert clip_starts(reference, None) == [0, 4, 8]
    video = tmp_path / "any.mp4"
    write_video(video, [numpy.zeros((10, 32, 32, 3), numpy.uint8)], fps=8)
    result = subprocess.run(
        [sys.executable, "-m", "metrics.drift", str(video), "--clip_frames", "4"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert [line.split("\t")[:3] for line in result.stdout.splitlines()[1:]] == [
        ["0", "0", "4"],
        ["1", "4", "4"],
        ["2", "8", "2"],
    ]
    assert video.with_suffix(".drift.png").is_file()


def test_help_is_fast():
    start = time.monotonic()
    result = subprocess.run(command("--help"), cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0
    assert time.monotonic() - start < 1
