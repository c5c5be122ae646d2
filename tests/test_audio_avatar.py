"""infer_audio_avatar.py on the tiny model: a sound of any length becomes a video of that length, killed or not."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file

import infer_audio_avatar
from configs import load_config
from errors import UserError
from models.wan.transformer import WanTransformer
from pipelines import job_state
from pipelines.audio_avatar.part import transformer_path
from pipelines.audio_avatar.pipeline import AvatarMaker, read_reference
from pipelines.audio_avatar.state import AvatarState, create_on_disk, open_on_disk
from pipelines.audio_avatar.windows import blend_weights, fuse, latent_length, sound_of
from pipelines.distributed import Processes
from pipelines.tiny import (
    tiny_audio_adapter,
    tiny_audio_encoder,
    tiny_image_encoder,
    tiny_text_encoder,
    tiny_transformer,
    tiny_vae,
)
from pipelines.windows import plan_windows
from preprocess.audio import SAMPLE_RATE, AudioTimeline, read_audio, write_wav
from preprocess.image import write_png
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import VideoWriter
from tests.test_distributed import torchrun
from tests.test_infer import original_vae_names
from tests.tiny_face import write_antelopev2

PROJECT = Path(__file__).parent.parent
SIZE = ("--height", "32", "--width", "32")
SMALL = (*SIZE, "--clip_sample_n_frames", "17", "--overlap_window_length", "2", "--sample_steps", "3")
FPS = 25


def sound(path: Path, seconds: float) -> Path:
    """A voice-like sweep; every window hears something else."""
    time = numpy.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    loudness = 0.5 + 0.5 * numpy.sin(2 * numpy.pi * 3 * time)
    write_wav(path, 0.5 * loudness * numpy.sin(2 * numpy.pi * (150 + 40 * time) * time), SAMPLE_RATE)
    return path


def run(output, *flags) -> None:
    made = infer_audio_avatar.main(infer_audio_avatar.parse_args(["--output", str(output), *map(str, flags)]))
    assert made == [Path(output)]


def make(output, *flags) -> numpy.ndarray:
    run(output, *flags)
    return read_frames(output)


@pytest.fixture(scope="module", autouse=True)
def collected_faster():
    """Every run collects garbage when it frees an encoder; what was imported by now need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """1.3 s: 33 frames, 9 latent frames, in windows of 5 that share 2, the last one moved back: 3 windows."""
    return sound(tmp_path_factory.mktemp("speech") / "speech.wav", 1.3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, speech) -> numpy.ndarray:
    return make(tmp_path_factory.mktemp("reference") / "out.mp4", *SMALL, "--audio", speech)


# ----------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("window", [5, 21])
@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_windows_cover_every_frame_at_full_length(window, overlap):
    for num_latents in range(window, 6 * window):
        windows = plan_windows(num_latents, window, overlap)
        assert windows[0].start == 0 and windows[-1].stop == num_latents
        assert all(w.length == window for w in windows)
        for before, after in pairwise(windows):
            assert after.start > before.start
            assert after.overlap == before.stop - after.start >= overlap
        legacy = plan_windows(num_latents, window, overlap, cut_last=True)
        assert len(legacy) == len(windows)
        assert [w.start for w in legacy[:-1]] == [w.start for w in windows[:-1]]
        assert all(w.overlap == overlap for w in legacy[1:])
        assert overlap < legacy[-1].length <= window or len(legacy) == 1


@pytest.mark.parametrize(
    ("seconds", "frames", "windows"),
    [(0.1, 3, 1), (1, 25, 1), (3.2, 80, 1), (3.24, 81, 1), (3.28, 82, 2), (3.36, 84, 2), (3.4, 85, 2), (3.5, 88, 2)]
    + [(10.4, 260, 6), (60, 1500, 34), (3600, 90000, 2045)],
)
def test_the_video_is_as_long_as_the_sound(seconds, frames, windows):
    timeline = AudioTimeline(round(seconds * SAMPLE_RATE), FPS)
    num_latents = latent_length(timeline.num_latent_frames, 21)
    plan = plan_windows(num_latents, 21, 10)
    assert abs(timeline.num_frames - seconds * FPS) < 1
    assert timeline.num_frames == frames
    assert 4 * num_latents - 3 >= frames
    assert len(plan) == windows
    lengths = {end - first for first, end in (sound_of(w, timeline, num_latents, "full", "released") for w in plan)}
    assert lengths == {21 * 4 * SAMPLE_RATE // FPS}, "a window hears another length than it shows"
    assert sound_of(plan[0], timeline, num_latents, "full", "exact") == (0, 81 * SAMPLE_RATE // FPS)


def test_fused_windows_that_agree_are_what_they_agree_on():
    """Every weighting of equal values is that value; and a result's frames outside overlaps are its own."""
    latents = torch.randn(1, 2, 23, 3, 4, generator=torch.Generator().manual_seed(0))
    windows = plan_windows(23, 7, 3)
    parts = [latents[:, :, w.start : w.stop] for w in windows]
    for scheme in ("uniform", "log"):
        for blend in (False, True):
            target = torch.full_like(latents, torch.nan)
            fuse(target, windows, parts, scheme, blend)
            torch.testing.assert_close(target, latents)
    constant = [torch.full_like(part, float(i)) for i, part in enumerate(parts)]
    fuse(target, windows, constant, "uniform", blend=True)
    torch.testing.assert_close(target[0, 0, :8, 0, 0], torch.tensor([0, 0, 0, 0, 0, 0.5, 1, 1]))
    fuse(target, windows, constant, "uniform", blend=False)
    torch.testing.assert_close(target[0, 0, :8, 0, 0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))


def test_an_overlap_of_one_frame_is_the_newer_windows():
    assert blend_weights("uniform", 1).tolist() == blend_weights("log", 1).tolist() == [1.0]


# ----------------------------------------------------------------------------------------------------- any length


@pytest.mark.parametrize("seconds", [0.1, 1, 3.24, 3.4, 3.5, 10.4, 60])
def test_lengths(tmp_path, seconds):
    output = tmp_path / "out.mp4"
    size = ("--height", 16, "--width", 16)
    run(output, *size, "--sample_steps", 2, "--audio", sound(tmp_path / "in.wav", seconds))
    info = probe(output)
    assert info.has_audio
    assert (info.width, info.height, info.fps) == (16, 16, FPS)
    assert abs(info.num_frames - seconds * FPS) < 1
    heard = read_audio(output)
    assert abs(len(heard) / SAMPLE_RATE - info.num_frames / FPS) < 0.05  # AAC comes in blocks of 1024 samples
    given = read_audio(tmp_path / "in.wav")
    length = min(len(given), len(heard))
    assert numpy.corrcoef(given[:length], heard[:length])[0, 1] > 0.98, "the sound is another, or not in time"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.wav", "out.json", "out.mp4"]


def test_command_without_arguments(tmp_path):
    """The tiny model on the photo and the speech in assets/, as a user runs it."""
    output = tmp_path / "out.mp4"
    command = [sys.executable, "infer_audio_avatar.py", "--output", str(output)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "UNTRAINED" in result.stderr
    info = probe(output)
    seconds = len(read_audio(PROJECT / "assets" / "speech.wav")) / SAMPLE_RATE
    assert info.has_audio and abs(info.duration - seconds) <= 1 / FPS
    made = read_metadata(output)
    assert made["settings"]["prompt"] and "ip_image" not in made["settings"] and made["audio"]


def test_longer_sounds_begin_with_the_same_noise():
    def noise(count: int) -> torch.Tensor:
        wan = SimpleNamespace(transformer_config=SimpleNamespace(out_dim=16))
        maker = SimpleNamespace(num_latents=count, grid=(2, 2), wan=wan)
        return torch.stack(list(AvatarMaker.noise(maker, SimpleNamespace(seed=3))))

    assert torch.equal(noise(9)[:5], noise(5))


@pytest.mark.parametrize(
    "flags",
    [
        ("--sample_text_guide_scale", 1),
        ("--sample_audio_guide_scale", 1),
        ("--audio_native_guidance", 2, 2),
        ("--overlap_window_length", 3),
        ("--overlapping_weight_scheme", "log"),
        ("--last_window", "legacy"),
        ("--audio_alignment", "exact"),
        ("--color_correction", 0.5),
        ("--clip_sample_n_frames", 25),
        ("--fps", 24),
        ("--prompt", "a man sings"),
        ("--negative_prompt", "rain"),
        ("--seed", 1),
        ("--shift", 2),
        ("--solver", "euler"),
        ("--timesteps", 1000, 600, 300),
        ("--audio", "assets/speech.wav"),
        ("--enable_teacache", "--teacache_threshold", 10, "--num_skip_start_steps", 1),
        ("--step_cache", "first_block", "--step_cache_threshold", 10),
        ("--GPU_memory_mode", "model_cpu_offload_and_qfloat8"),
        ("--dtype", "bf16"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_flag_of_the_sampling_changes_the_video(tmp_path, reference, speech, flags):
    frames = make(tmp_path / "out.mp4", *SMALL, "--audio", speech, *flags)
    assert len(frames) != len(reference) or (frames != reference).any()


@pytest.mark.parametrize(
    "flags",
    [
        ("--GPU_memory_mode", "model_full_load"),
        ("--GPU_memory_mode", "sequential_cpu_offload"),
        ("--memory", "group"),
        ("--preview",),
        ("--teacache_threshold", 0, "--enable_teacache", "--teacache_offload"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_memory_modes_and_previews_leave_the_video_as_it_is(tmp_path, reference, speech, flags):
    assert (make(tmp_path / "out.mp4", *SMALL, "--audio", speech, *flags) == reference).all()
    assert (tmp_path / "out.preview.png").exists() == ("--preview" in flags)


def count_blocks(monkeypatch) -> list[bool]:
    """Of every transformer call from now on, whether its step cache skipped the blocks."""
    skipped = []
    forward = WanTransformer.forward

    def counting(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        skipped.append(kwargs["step_cache"] is not None and kwargs["step_cache"].skipped[-1])
        return out

    monkeypatch.setattr(WanTransformer, "forward", counting)
    return skipped


def test_a_step_cache_decides_once_a_step_for_all_windows(tmp_path, speech, monkeypatch):
    skipped = count_blocks(monkeypatch)
    flags = ("--enable_teacache", "--teacache_threshold", 10, "--num_skip_start_steps", 2, "--sample_steps", 5)
    run(tmp_path / "out.mp4", *SMALL, "--audio", speech, *flags)
    windows, branches = 3, 3
    by_step = numpy.array(skipped).reshape(5, windows * branches)
    assert (by_step == by_step[:, :1]).all()
    assert by_step[:, 0].tolist() == [False, False, True, True, False]


def test_a_step_cache_that_does_not_fit_is_exit_5(tmp_path, speech, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=40_000, total=2**40))
    # 3 windows, 3 branches, 5 x 2 x 2 tokens of 64 float32 values
    with pytest.raises(UserError, match="remembers 45 KiB for 3 windows, 39.06 KiB are free") as error:
        run(tmp_path / "out.mp4", *SMALL, "--audio", speech, "--enable_teacache")
    assert error.value.exit_code == 5


def test_equal_scales_need_no_third_branch(tmp_path, speech, monkeypatch):
    skipped = count_blocks(monkeypatch)
    flags = ("--sample_text_guide_scale", 1, "--sample_audio_guide_scale", 1)
    run(tmp_path / "out.mp4", *SMALL, "--audio", speech, *flags)
    assert len(skipped) == 3 * 3


def test_json_of_a_run_makes_the_run_again(tmp_path, speech):
    flags = ("--sample_audio_guide_scale", 3, "--overlapping_weight_scheme", "log", "--seed", 5)
    first = make(tmp_path / "first.mp4", *SMALL, "--audio", speech, *flags)
    assert (make(tmp_path / "again.mp4", "--config", tmp_path / "first.json") == first).all()
    assert read_metadata(tmp_path / "again.mp4") == read_metadata(tmp_path / "first.mp4")


def test_likeness_is_recorded_and_tries_further_seeds(tmp_path, speech):
    """The photo is scored against itself by a detector that finds a face anywhere; no seed reaches a cosine of 1."""
    models = write_antelopev2(tmp_path / "antelopev2", ((6, 8, 0.9, 3),))
    flags = (*SMALL, "--audio", speech, "--antelopv2_path", models)
    plain = make(tmp_path / "plain.mp4", *flags, "--seed", 1)
    assert read_metadata(tmp_path / "plain.mp4")["face_score"]["frames_looked_at"] == 7  # 33 frames, every fifth
    make(tmp_path / "best.mp4", *flags, "--min_face_score", 1, "--max_retries", 1)
    made = read_metadata(tmp_path / "best.mp4")
    assert made["settings"]["seed"][0] in (0, 1)
    if made["settings"]["seed"] == [1]:
        assert (read_frames(tmp_path / "best.mp4") == plain).all()
    assert not list(tmp_path.glob("best.seed*")) and not list(tmp_path.glob(".best*"))
    with pytest.raises(UserError, match="--min_face_score") as error:
        run(tmp_path / "two.mp4", *flags, "--max_retries", 1)
    assert error.value.exit_code == 2


def write_release(folder: Path, config: dict) -> list[str]:
    """The tiny avatar as files in the released layouts; the flags that name them."""
    folder.mkdir()
    both = tiny_transformer(config).state_dict() | tiny_audio_adapter(config).state_dict()
    torch.save({"state_dict": both}, folder / "transformer3d-square.pt")
    torch.save(original_vae_names(tiny_vae(config).state_dict()), folder / "Wan2.1_VAE.pth")
    text_encoder = tiny_text_encoder(config)
    states = {f"encoder.{name}": tensor for name, tensor in text_encoder.encoder.state_dict().items()}
    torch.save(states, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    text_encoder.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    vision = tiny_image_encoder(config).model.state_dict()
    last = config["image_encoder"]["num_hidden_layers"]  # the released tower has one more block, which is not run
    vision |= {name.replace("layers.0.", f"layers.{last}."): t for name, t in vision.items() if "layers.0." in name}
    torch.save(vision, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    tiny_audio_encoder(config).model.save_pretrained(folder / "wav2vec2-base-960h")
    wav2vec2 = folder / "wav2vec2-base-960h"
    paths = (folder / "transformer3d-square.pt", folder, wav2vec2)
    names = ("--transformer_path", "--pretrained_model_name_or_path", "--pretrained_wav2vec_path")
    return [str(part) for pair in zip(names, paths, strict=True) for part in pair]


def test_released_layout_equals_the_model_in_memory(tmp_path, speech):
    heads = load_config("tiny-avatar")["image_encoder"] | {"num_attention_heads": 1}  # 80 wide or one, in a release
    written = {"base": "tiny-avatar", "description": "one head", "tiny": True, "seed": 0, "image_encoder": heads}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(written))
    flags = [*SMALL, "--config", tmp_path / "one.yaml", "--audio", speech, "--reference_image", "assets/face.png"]
    files = write_release(tmp_path / "release", load_config(tmp_path / "one.yaml"))
    expected = make(tmp_path / "memory.mp4", *flags)
    assert (make(tmp_path / "files.mp4", *flags, *files) == expected).all()
    made = read_metadata(tmp_path / "files.mp4")
    assert not made["untrained"]
    assert len(made["weights"]) == 6 and all("sha256" in value for value in made["weights"].values())

    torch.save(tiny_transformer(load_config("tiny-i2v")).state_dict(), tmp_path / "release" / "transformer3d-square.pt")
    with pytest.raises(UserError, match="no audio adapter in it") as error:
        make(tmp_path / "plain.mp4", *flags, *files)
    assert error.value.exit_code == 4


def test_a_trained_lora_changes_the_video(tmp_path, reference, speech):
    """In the dialect of StableAvatar's own training, which its scripts cannot load; for all steps or a part of them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("self_attn_q", "cross_attn_k_img"):
        path = f"lora_transformer__blocks_0_{name}"
        tensors[f"{path}.lora_down.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{path}.lora_up.weight"] = torch.randn(64, 4, generator=generator)
        tensors[f"{path}.alpha"] = torch.tensor(2)
    torch.save(tensors, tmp_path / "lora.pt")
    flags = (*SMALL, "--audio", speech, "--lora_path", tmp_path / "lora.pt")
    merged, live = make(tmp_path / "merged.mp4", *flags), make(tmp_path / "live.mp4", *flags, "--lora_mode", "live")
    in_part = make(tmp_path / "part.mp4", *flags, "--lora_start", 0.4)
    assert abs(merged.astype(int) - live).mean() < 0.1
    for one, other in ((merged, reference), (in_part, reference), (in_part, merged)):
        assert (one != other).mean() > 0.5
    assert len(read_metadata(tmp_path / "merged.mp4")["weights"]) == 2


def test_the_weights_follow_the_shape_of_the_video(tmp_path):
    config = load_config("stableavatar-1.3B")
    for size, name in (((512, 512), "square"), ((832, 480), "rec-vec"), ((480, 832), "rec-vec")):
        settings = SimpleNamespace(transformer_path=None, width=size[0], height=size[1])
        assert transformer_path(settings, config) == Path(f"checkpoints/StableAvatar-1.3B/transformer3d-{name}.pt")


# ------------------------------------------------------------------------------------------ interrupted and resumed


def killed_at(function, count: int):
    """That function, which ends the process (kill -9) in its count-th call, before it does anything."""
    calls = []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return deadly


@pytest.mark.parametrize(
    ("place", "name", "count", "windows_left"),
    [
        (AvatarState, "save_window", 5, 9 - 4),  # in the second step, with its second window unsaved
        (AvatarState, "commit", 3, 9 - 6),  # all windows of the second step are done, their sum is not yet in place
        (AvatarState, "begin", 3, 9 - 6),  # as is
        (AvatarState, "finished_windows", 3, 9 - 6),  # between the second and the third step
        (VideoWriter, "write", 4, 0),  # while frames are decoded
        (os, "fsync", 1, 9),  # while the noise is saved
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_killed_run_goes_on_and_gives_the_same_frames(
    tmp_path, reference, speech, monkeypatch, place, name, count, windows_left
):
    output = tmp_path / "out.mp4"
    flags = (*SMALL, "--audio", speech)
    child = os.fork()
    if child == 0:
        setattr(place, name, killed_at(getattr(place, name), count))
        run(output, *flags)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run was not killed"
    assert not output.exists()
    calls = count_blocks(monkeypatch)
    assert (make(output, *flags) == reference).all()
    assert len(calls) == 3 * windows_left, "what was done before is done again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_state_of_another_sound_or_damaged_is_not_used(tmp_path, reference, speech, monkeypatch, caplog):
    def interrupt(self, commit=AvatarState.commit):
        commit(self)
        if self.folder.joinpath(".window1.state.safetensors").exists():
            raise KeyboardInterrupt

    output = tmp_path / "out.mp4"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AvatarState, "commit", interrupt)
        run(output, *SMALL, "--audio", sound(tmp_path / "other.wav", 1.3 + 1e-4))
    assert (make(output, *SMALL, "--audio", speech) == reference).all()
    assert "belongs to a run with other settings" in caplog.text

    folder = tmp_path / ".out.state"
    folder.mkdir()
    (folder / "latents.safetensors").write_bytes(b"\0" * 100)
    assert (make(output, *SMALL, "--audio", speech, "--overwrite") == reference).all()
    assert "is damaged" in caplog.text


def test_latents_on_disk_are_read_back(tmp_path):
    written = create_on_disk(tmp_path / "a.safetensors", (3, 2, 2), {"step": "4"})
    assert (written == 0).all()
    written.copy_(torch.arange(12.0).view(3, 2, 2))
    read, metadata = open_on_disk(tmp_path / "a.safetensors")
    assert torch.equal(read, written) and metadata == {"step": "4"}
    size = (tmp_path / "a.safetensors").stat().st_size
    os.truncate(tmp_path / "a.safetensors", size - 1)
    assert open_on_disk(tmp_path / "a.safetensors") is None
    assert open_on_disk(tmp_path / "missing") is None


def test_no_room_for_the_latents_is_exit_5(tmp_path, monkeypatch):
    state = AvatarState(tmp_path / "out.mp4", {}, (2, 16, 2, 2), Processes(0, 1, torch.device("cpu"), False))
    monkeypatch.setattr("builtins.open", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left") as error:
        state.open(iter(()), resumable=False)
    assert error.value.exit_code == 5


def test_a_disk_that_fills_up_is_exit_5_and_the_run_can_go_on(tmp_path, reference, speech, monkeypatch):
    saved = []

    def save_file(tensors, path, metadata, save=job_state.save_file):
        saved.append(path)
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(job_state, "save_file", save_file)
        with pytest.raises(UserError, match="No space left on device.; make room") as error:
            run(tmp_path / "out.mp4", *SMALL, "--audio", speech)
    assert error.value.exit_code == 5
    calls = count_blocks(monkeypatch)
    assert (make(tmp_path / "out.mp4", *SMALL, "--audio", speech) == reference).all()
    assert len(calls) == 3 * (9 - 4)


def test_out_of_memory_goes_on_with_the_next_mode(tmp_path, reference, speech, monkeypatch, caplog):
    calls = []
    forward = WanTransformer.forward

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 14:  # in the second window of the second step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward", failing)
    assert (make(tmp_path / "out.mp4", *SMALL, "--audio", speech, "--memory", "model") == reference).all()
    assert "going on with group" in caplog.text
    assert len(calls) == 3 * 9 + 2, "finished windows were computed again"


# ------------------------------------------------------------------------------------------------------ bad inputs


def bad_sounds(folder: Path) -> dict[str, Path]:
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.wav").write_bytes(b"")
    samples = numpy.zeros(SAMPLE_RATE, numpy.float32)
    samples[100] = numpy.nan
    header = b"RIFF" + (36 + samples.nbytes).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + SAMPLE_RATE.to_bytes(4, "little")
    header += (4 * SAMPLE_RATE).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    header += b"data" + samples.nbytes.to_bytes(4, "little")
    (folder / "nan.wav").write_bytes(header + samples.tobytes())
    with VideoWriter(folder / "mute.mp4", fps=25) as video:
        video.write(numpy.zeros((5, 32, 32, 3), numpy.uint8))
    return {name: folder / name for name in ("text.wav", "empty.wav", "nan.wav", "mute.mp4", "missing.wav")}


@pytest.mark.parametrize("name", ["text.wav", "empty.wav", "nan.wav", "mute.mp4", "missing.wav"])
def test_sounds_that_cannot_be_used_are_exit_3(tmp_path, name):
    with pytest.raises(UserError, match=name) as error:
        run(tmp_path / "out.mp4", *SMALL, "--audio", bad_sounds(tmp_path)[name])
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_silence_is_allowed_and_said(tmp_path, caplog):
    write_wav(tmp_path / "still.wav", numpy.zeros(SAMPLE_RATE // 2), SAMPLE_RATE)
    assert len(make(tmp_path / "out.mp4", *SMALL, "--audio", tmp_path / "still.wav")) == 13
    assert "is silent" in caplog.text


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--identity", "me.jpg"], 2, ["--identity me.jpg", "text-to-video", "--reference_image"]),
        (["--ip_image", "me.jpg"], 2, ["--identity me.jpg"]),
        (["--guidance_scale", "4"], 2, ["--sample_text_guide_scale"]),
        (["--overlap_window_length", "5"], 2, ["--overlap_window_length 5", "1 to 4"]),
        (["--clip_sample_n_frames", "1"], 2, ["--clip_sample_n_frames 1", "5 or more"]),
        (["--overlap_window_length", "0"], 2, ["--overlap_window_length 0"]),
        (["--overlapping_weight_scheme", "cosine"], 2, ["cosine", "uniform, log"]),
        (["--last_window", "short"], 2, ["full, legacy"]),
        (["--audio_alignment", "late"], 2, ["released, exact"]),
        (["--solver", "unipc"], 2, ["--solver unipc", "euler-flow", "history"]),
        (["--sample_audio_guide_scale", "nan"], 2, ["--sample_audio_guide_scale nan", "0 to 100"]),
        (["--color_correction", "2"], 2, ["--color_correction 2", "0 to 1"]),
        (["--GPU_memory_mode", "magic"], 2, ["magic", "model_cpu_offload"]),
        (["--GPU_memory_mode", "Normal", "--memory", "group"], 2, ["--GPU_memory_mode", "--memory"]),
        (["--enable_teacache", "--step_cache", "first_block"], 2, ["contradict"]),
        (["--teacache_offload"], 2, ["--teacache_offload", "teacache"]),
        (["--num_skip_start_steps", "3"], 2, ["--num_skip_start_steps", "teacache"]),
        (["--audio_native_guidance", "2", "2", "--sample_audio_guide_scale", "4"], 2, ["--audio_native_guidance"]),
        (["--fsdp_dit"], 2, ["--fsdp_dit", "--ulysses_degree"]),
        (["--fsdp_dit", "--ulysses_degree", "2", "--fp8"], 2, ["--fsdp_dit", "--fp8"]),
        (["--ulysses_degree", "2"], 2, ["torchrun --nproc_per_node 2"]),
        (["--config", "tiny"], 2, ["family t2v", "accepted here are i2v, fun"]),
        (["--config", "stableavatar-1.3B"], 2, ["--reference_image"]),
        (["--reference_image", "missing.png"], 3, ["--reference_image", "missing.png"]),
        (["--reference_image", "README.md"], 3, ["README.md"]),
        (["--lora_path", "missing.safetensors"], 4, ["missing.safetensors"]),
        (["--lora_start", "0.5"], 2, ["--lora_start", "no --lora_path"]),
        (["--transformer_path", "missing.pt", "--audio", "assets/speech.wav", "--reference_image", "assets/face.png"]
         , 4, ["missing.pt", "--only stableavatar-1.3B"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, exit_code, words):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UserError) as error:
        run(tmp_path / "out.mp4", *SMALL, *flags)
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ----------------------------------------------------------------------------------------------- several processes


def test_two_processes_give_what_one_gives(tmp_path, speech):
    """By windows (three for two processes; in the second run the last is a legacy short one), by ulysses, and by
    ulysses with sharded weights.
    """
    flags = [*map(str, SMALL), "--audio", str(speech)]
    runs = {
        "windows": [],
        "legacy": ["--last_window", "legacy", "--sample_audio_guide_scale", "3"],
        "ulysses": ["--ulysses_degree", "2"],
        "shards": ["--ulysses_degree", "2", "--fsdp_dit"],
    }
    command = []
    for name, extra in runs.items():
        command += ["--", str(tmp_path / f"{name}.mp4"), *flags, *extra]
    torchrun("tests/avatar_worker.py", *command)
    for name, extra in runs.items():
        alone = [flag for flag in extra if flag not in ("--ulysses_degree", "2", "--fsdp_dit")]
        with keeping_latents() as kept:
            run(tmp_path / f"{name}-alone.mp4", *flags, *alone)
        shared = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(shared["latents"], kept[0], rtol=0, atol=1e-4)
        assert shared["rows"].tolist() == ([32, 32] if name == "shards" else [64, 64])
        assert not (tmp_path / f".{name}.state").exists()
        difference = read_frames(tmp_path / f"{name}.mp4").astype(int) - read_frames(tmp_path / f"{name}-alone.mp4")
        assert abs(difference).mean() < 0.1


@contextlib.contextmanager
def keeping_latents():
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        frames = AvatarMaker.frames

        def keep(self, latents):
            kept.append(latents.clone())
            return frames(self, latents)

        patch.setattr(AvatarMaker, "frames", keep)
        yield kept


def test_settings_are_refused_before_torch_is_imported():
    code = """
import sys
import infer_audio_avatar
from pipelines.audio_avatar.command import resolve_avatar
resolve_avatar(infer_audio_avatar.parse_args([]))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


def test_a_photo_without_a_face_is_said(tmp_path, caplog):
    """Looked for in what the video shows, however small it is, and not refused: it may be a drawing."""

    def said(photo: str, width: int, height: int) -> bool:
        caplog.clear()
        picture = read_reference(
            SimpleNamespace(reference_image=photo, width=width, height=height, antelopv2_path=str(tmp_path / "none"))
        )
        assert picture.shape == (height, width, 3)
        return "no face is found in what the video shows of it" in caplog.text

    face = str(PROJECT / "assets" / "face.png")
    assert not said(face, 64, 64)
    assert not said(face, 512, 512)
    write_png(tmp_path / "wall.png", numpy.full((300, 400, 3), 128, numpy.uint8))
    assert said(str(tmp_path / "wall.png"), 64, 64)
