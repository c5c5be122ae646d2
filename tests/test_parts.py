"""A plug-in that nobody knows: one Part and one plug-in, and it runs in every script, beside the others."""

import hashlib
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

import infer
import infer_audio_avatar
import infer_long_video
import infer_with_vace
from errors import WeightsError
from models.wan.checkpoint import assign_tensors, read_tensors
from models.wan.config import WanConfig
from models.wan.slots import BlockContext, Slots
from pipelines.parts import Part, Reading
from pipelines.wan import Wan
from pipelines.weights import WeightsFile
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests.test_batches import TINY, run

SPEECH = str(Path(__file__).parent.parent / "assets" / "speech.wav")
AVATAR = ["--width", "32", "--height", "32", "--sample_steps", "1", "--num_frames", "9"]
TALK = ["--config", "tiny-i2v", "--variant", "talk", "--audio_path", SPEECH, "--num_clips", "1", "--no_drift_report"]
SCRIPTS = {
    "infer": (infer, [*TINY, "--no_face_crop"]),  # beside Stand-In
    "vace": (infer_with_vace, [*TINY, "--no_face_crop"]),  # beside Stand-In and a branch
    "avatar": (infer_audio_avatar, AVATAR),  # beside an adapter
    "talk": (infer_long_video, [*TINY, *TALK]),  # beside audio layers
}


class Tint(ModelMixin, ConfigMixin):
    """A residual at the end of every block."""

    @register_to_config
    def __init__(self, dim: int, num_layers: int):
        super().__init__()
        self.shifts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))
        self.calls = 0

    def plugin(self, tokens: torch.Tensor, ctx: BlockContext) -> Slots:
        self.calls += 1
        return Slots(block_residuals=list(self.shifts))


def build(shape: WanConfig) -> Tint:
    return Tint(shape.dim, shape.num_layers)


def tint_part(path: Path, loaded: list[Tint]) -> Part:
    def load(transformer, reading: Reading) -> Tint:
        with torch.device("meta"):
            tint = Tint(transformer.config.dim, transformer.config.num_layers)
        assign_tensors(tint, read_tensors(path), dtype=reading.dtype, device=reading.device, source=path)
        loaded.append(tint.requires_grad_(False))
        return tint

    files = [WeightsFile("tint", "--tint_path", path, read=lambda: read_tensors(path))]
    return Part("tint", files, load, build, plugin=lambda tint: tint.plugin)


@pytest.fixture
def tint(tmp_path, monkeypatch) -> list[Tint]:
    """Every model that is made has the part; the tints that are loaded."""
    loaded, make = [], Wan.__init__

    def with_tint(self, settings, config, processes, parts=()):
        make(self, settings, config, processes, [*parts, tint_part(tmp_path / "tint.safetensors", loaded)])

    monkeypatch.setattr(Wan, "__init__", with_tint)
    return loaded


def write_tint(path: Path, strength: float) -> None:
    torch.manual_seed(0)
    tensors = Tint(64, 2).state_dict()
    save_file({name: strength * tensor for name, tensor in tensors.items()}, path)


def frames_of(name: str, output: Path, *flags) -> numpy.ndarray:
    script, own = SCRIPTS[name]
    run(script, *own, *flags, "--output", output)
    return read_frames(output).astype(int)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_made_up_plug_in_runs_beside_the_others(tmp_path, request, calls, name):
    plain = frames_of(name, tmp_path / "plain.mp4")
    loaded = request.getfixturevalue("tint")
    write_tint(tmp_path / "tint.safetensors", 0)
    assert (frames_of(name, tmp_path / "nothing.mp4") == plain).all()
    write_tint(tmp_path / "tint.safetensors", 1)
    calls.clear()
    tinted = frames_of(name, tmp_path / "tinted.mp4")
    assert abs(tinted - plain).mean() > 1
    assert loaded[-1].calls == len(calls) > 0  # in every forward pass of every branch
    weights = read_metadata(tmp_path / "tinted.mp4")["weights"]
    assert weights[str(tmp_path / "tint.safetensors")] != "", "its file is hashed"


@pytest.mark.parametrize("memory", ["model", "group", "sequential"])
@pytest.mark.parametrize("name", ["vace", "talk"])
def test_several_parts_under_every_memory_mode(tmp_path, tint, name, memory):
    write_tint(tmp_path / "tint.safetensors", 1)
    whole = frames_of(name, tmp_path / "whole.mp4", "--memory", "resident")
    assert (frames_of(name, tmp_path / "part.mp4", "--memory", memory) == whole).all()


def test_it_is_estimated_and_its_file_named_where_it_lacks(tmp_path, tint, monkeypatch):
    needs, ask = [], Wan.needs
    monkeypatch.setattr(Wan, "needs", lambda self, *args: needs.append(ask(self, *args)) or needs[-1])
    with pytest.raises(WeightsError, match=r"tint: .*tint\.safetensors: no such weights \(--tint_path\)"):
        frames_of("vace", tmp_path / "out.mp4")
    write_tint(tmp_path / "tint.safetensors", 1)
    frames_of("vace", tmp_path / "out.mp4")
    monkeypatch.undo()
    monkeypatch.setattr(Wan, "needs", lambda self, *args: needs.append(ask(self, *args)) or needs[-1])
    frames_of("vace", tmp_path / "plain.mp4")
    values = sum(tensor.numel() for tensor in load_file(tmp_path / "tint.safetensors").values())
    assert needs[0].weights["resident"] - needs[1].weights["resident"] == 4 * values


def test_another_content_starts_over(tmp_path, tint):
    """What a part is read from decides what a finished output counts for."""
    write_tint(tmp_path / "tint.safetensors", 1)
    frames_of("infer", tmp_path / "a.mp4")
    write_tint(tmp_path / "tint.safetensors", 2)
    frames_of("infer", tmp_path / "b.mp4")
    contents = [read_metadata(tmp_path / name)["content"] for name in ("a.mp4", "b.mp4")]
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.mp4", "b.mp4")]
    assert contents[0] != contents[1] and digests[0] != digests[1]
