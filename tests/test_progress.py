"""Saved progress counts for the same content, wherever it lies and however it is decoded; and for nothing else."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import infer
from errors import UserError
from models.wan.vae import WanVAE
from pipelines.audio_avatar.state import AvatarState
from pipelines.clip_store import ClipStore
from pipelines.denoise import Step
from pipelines.distributed import Processes
from pipelines.job_state import JobState, checksum, load_state, save_state
from pipelines.record import hash_of_weights
from pipelines.tiny import tiny_stand_in_tensors
from preprocess.record import read_comment, without_folders
from preprocess.video import read_frames
from tests.test_checkpoint import MALFORMED
from tests.test_infer import SMALL, write_release
from tests.tiny import CONFIG

PROJECT = Path(__file__).parent.parent
IDENTITY = {"settings": {"seed": [0]}, "encoding": ["float32", None], "num_steps": 3}


def make(output, *flags) -> numpy.ndarray:
    infer.main(infer.parse_args([*SMALL, "--output", str(output), *map(str, flags)]))
    return read_frames(output)


def stop_after(monkeypatch, step: int, run) -> None:
    """Run until this step is saved."""

    def interrupt(self, done, save=JobState.save):
        save(self, done)
        if done.index == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobState, "save", interrupt)
        run()


def stopped_while_decoding(output, monkeypatch, *flags) -> None:
    def no_memory(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory while decoding"):
        patch.setattr(WanVAE, "decode_stream", no_memory)
        make(output, *flags)


@pytest.mark.parametrize(
    "flags", [("--tiled", "--vae_dtype", "bf16"), ("--quality", 5, "--memory", "group", "--preview")], ids=str
)
def test_advice_after_running_out_of_memory_keeps_the_denoising(tmp_path, monkeypatch, calls, flags):
    """With a photo, which the VAE encodes before denoising, too."""
    stopped_while_decoding(tmp_path / "out.mp4", monkeypatch)
    done = len(calls)
    make(tmp_path / "out.mp4", *flags)
    assert len(calls) == done


def test_how_pictures_are_encoded_counts_until_all_steps_are_done(tmp_path, caplog):
    sample = torch.ones(2)
    for step, counts in ((1, False), (2, True)):
        JobState(tmp_path / "out.mp4", IDENTITY).save(Step(step, sample, sample, {}))
        other = JobState(tmp_path / "out.mp4", IDENTITY | {"encoding": ["bfloat16", None]})
        assert (other.load({}) is not None) == counts
        assert JobState(tmp_path / "out.mp4", IDENTITY).load({})[0] == step + 1
        assert JobState(tmp_path / "out.mp4", IDENTITY | {"settings": {"seed": [1]}}).load({}) is None


def test_an_edited_config_is_another_model(tmp_path, monkeypatch, caplog, calls):
    config = tmp_path / "mine.yaml"
    written = {"base": str(PROJECT / "configs" / "tiny.yaml"), "description": "x"}
    written |= {"seed": 0, "transformer": CONFIG["transformer"]}
    config.write_text(yaml.safe_dump(written))
    flags = ("--config", config, "--ip_image", "assets/face.png", "--prompt", "x")
    stop_after(monkeypatch, 1, lambda: make(tmp_path / "out.mp4", *flags))
    written["transformer"] = CONFIG["transformer"] | {"num_heads": 4}
    config.write_text(yaml.safe_dump(written))
    fresh = make(tmp_path / "fresh.mp4", *flags)
    calls.clear()
    assert (make(tmp_path / "out.mp4", *flags) == fresh).all()
    assert len(calls) == 6
    assert "belongs to a run with other settings" in caplog.text

    stop_after(monkeypatch, 1, lambda: make(tmp_path / "moved.mp4", *flags))
    config.write_text(yaml.safe_dump(written | {"description": "the same model in other words"}))
    config.rename(tmp_path / "renamed.yaml")
    calls.clear()
    make(tmp_path / "moved.mp4", "--config", tmp_path / "renamed.yaml", *flags[2:])
    assert len(calls) == 2


def test_weights_count_by_content_and_not_by_place(tmp_path, monkeypatch, caplog, calls):
    """Moved files are the same; one changed value of the text encoder is not. A VAE that only decodes may change."""
    release = tmp_path / "a"
    write_release(release, CONFIG)
    flags = ["--config", "configs/tiny.yaml", "--prompt", "x"]
    stand_in = tmp_path / "Stand-In_wan2.1_T2V_14B_ver1.0.ckpt"
    torch.save(tiny_stand_in_tensors(CONFIG), stand_in)
    photo = shutil.copy(PROJECT / "assets" / "face.png", tmp_path / "me.png")
    person = ("--ip_image", photo, "--stand_in_path", stand_in)
    stop_after(monkeypatch, 1, lambda: make(tmp_path / "out.mp4", *flags, *person, "--base_path", release))
    release = release.rename(tmp_path / "b")
    photo, stand_in = Path(photo).rename(tmp_path / "you.png"), stand_in.rename(tmp_path / "s.pt")
    person = ("--ip_image", photo, "--stand_in_path", stand_in)
    calls.clear()
    whole = make(tmp_path / "out.mp4", *flags, *person, "--base_path", release)
    assert len(calls) == 2

    stop_after(monkeypatch, 1, lambda: make(tmp_path / "text.mp4", *flags, *person, "--base_path", release))
    file = release / "models_t5_umt5-xxl-enc-bf16.pth"
    tensors = torch.load(file)
    name = next(name for name in tensors if name.endswith("wo.weight"))
    tensors[name][0, 0] += 1
    torch.save(tensors, file)
    calls.clear()
    assert (make(tmp_path / "text.mp4", *flags, *person, "--base_path", release) != whole).any()
    assert len(calls) == 6
    assert "belongs to a run with other settings" in caplog.text


def test_a_flipped_bit_starts_over(tmp_path, monkeypatch, caplog):
    whole = make(tmp_path / "whole.mp4")
    stop_after(monkeypatch, 1, lambda: make(tmp_path / "out.mp4"))
    file = JobState(tmp_path / "out.mp4", {}).path
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)
    assert (make(tmp_path / "out.mp4") == whole).all()
    assert "is damaged (its checksum is another); starting from the first step" in caplog.text


def test_a_flipped_bit_of_a_long_videos_latents_or_clips(tmp_path, caplog):
    alone = Processes(0, 1, torch.device("cpu"), False)
    state = AvatarState(tmp_path / "out.mp4", IDENTITY, (2, 4, 2, 2), alone)
    assert state.open(torch.randn(2, 4, 2, 2), resumable=True) == 0
    state.begin(0).copy_(torch.randn(2, 4, 2, 2))
    state.commit()
    assert AvatarState(tmp_path / "out.mp4", IDENTITY, (2, 4, 2, 2), alone).open(torch.zeros(2, 4, 2, 2), True) == 1
    content = bytearray(state.path.read_bytes())
    content[-1] ^= 64
    state.path.write_bytes(content)
    assert AvatarState(tmp_path / "out.mp4", IDENTITY, (2, 4, 2, 2), alone).open(torch.zeros(2, 4, 2, 2), True) == 0
    assert "latents.safetensors is damaged (its checksum is another)" in caplog.text


@pytest.mark.parametrize("content", [{}, {"clips": "[]"}, {"digest": "0"}, None], ids=str)
def test_a_foreign_state_is_none(tmp_path, content):
    """Also of another program, with no metadata or other keys: no traceback."""
    alone = Processes(0, 1, torch.device("cpu"), False)
    (tmp_path / ".out.state").mkdir()
    (tmp_path / ".out.clips").mkdir()
    for file in (".out.state.safetensors", ".out.state/latents.safetensors", ".out.clips/handover.safetensors"):
        save_file({"tensor": torch.zeros(2, 4, 2, 2)}, tmp_path / file, content)
    assert JobState(tmp_path / "out.mp4", IDENTITY).load({}) is None
    assert AvatarState(tmp_path / "out.mp4", IDENTITY, (2, 4, 2, 2), alone).open(torch.zeros(2, 4, 2, 2), True) == 0
    assert ClipStore(tmp_path / "out.mp4", IDENTITY, []).load() == (0, None)


STATES = (".out.state.safetensors", ".out.state/latents.safetensors", ".out.clips/handover.safetensors")


@pytest.mark.parametrize("kind", [*MALFORMED, "half", "empty"])
def test_a_malformed_state_is_none(tmp_path, kind):
    """Whatever its header says, it is a warning, and the work starts afresh."""
    alone = Processes(0, 1, torch.device("cpu"), False)
    for file in STATES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        if kind in MALFORMED:
            (tmp_path / file).write_bytes(MALFORMED[kind][0])
        else:
            tensor = torch.zeros(2, 2, dtype=torch.float16) if kind == "half" else torch.zeros(0)
            save_file({"tensor": tensor}, tmp_path / file, {"clips": "[]"})
    assert JobState(tmp_path / "out.mp4", IDENTITY).load({}) is None
    assert AvatarState(tmp_path / "out.mp4", IDENTITY, (2, 4, 2, 2), alone).open(torch.zeros(2, 4, 2, 2), True) == 0
    assert ClipStore(tmp_path / "out.mp4", IDENTITY, []).load() == (0, None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (2, 3)], ids=str)
def test_tensors_of_every_kind_have_a_checksum(tmp_path, dtype, shape):
    """Empty ones too: the last window of a video hands nothing over."""
    tensor = torch.ones(shape, dtype=dtype)
    save_state(tmp_path / "state", {"a": tensor, "turned": torch.ones(2, 3, dtype=dtype).T}, {"step": "1"})
    tensors, metadata = load_state(tmp_path / "state", "starting over")
    assert metadata == {"step": "1"}
    assert tensors["a"].dtype == dtype and tensors["a"].shape == shape and torch.equal(tensors["a"], tensor)
    assert checksum({"a": tensor}, {}) != checksum({"a": tensor[None]}, {}), "the shape counts"
    if tensor.numel():
        assert checksum({"a": tensor}, {}) != checksum({"a": torch.zeros_like(tensor)}, {})


def test_config_json_is_part_of_the_weights(tmp_path):
    """The number of heads is not in the tensors."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2}))
    before = hash_of_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "x": 1}))
    assert hash_of_weights(tmp_path) != before
    assert hash_of_weights(tmp_path) == hash_of_weights(tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------- what is told to others


def test_the_video_itself_names_no_folders(tmp_path):
    """A home folder has the user's name in it. The JSON beside keeps whole paths; what it lacks nobody needs."""
    photo = shutil.copy(PROJECT / "assets" / "face.png", tmp_path / "me.png")
    make(tmp_path / "out.mp4", "--ip_image", photo)
    assert str(tmp_path).encode() not in (tmp_path / "out.mp4").read_bytes()
    inside = read_comment(tmp_path / "out.mp4")
    assert inside["settings"]["ip_image"] == ["me.png"] and list(inside["faces"]) == ["me.png"]
    beside = json.loads((tmp_path / "out.json").read_text())
    assert beside["settings"]["ip_image"] == [str(photo)] and without_folders(beside) == inside
    assert (make(tmp_path / "again.mp4", "--config", tmp_path / "out.json") == read_frames(tmp_path / "out.mp4")).all()


def test_folders_below_the_project_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [f"{PROJECT}/assets/face.png", "photos/me.jpg", f"{tmp_path}/b.jpg", "../x/c.jpg", "https://h.org/p?q=1"]
    settings = {"ip_image": paths, "prompt": ["/home/x"], "base_path": None}
    record = {"settings": settings, "places": ["ip_image", "base_path"], "weights": {"/a/w.pth": "1"}}
    assert without_folders(record) == {
        "places": ["ip_image", "base_path"],
        "settings": {
            "ip_image": ["assets/face.png", "photos/me.jpg", "b.jpg", "c.jpg", "https://h.org/p?q=1"],
            "prompt": ["/home/x"],
            "base_path": None,
        },
        "weights": {"w.pth": "1"},
    }
