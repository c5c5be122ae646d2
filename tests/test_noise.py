"""--noise_device: what the original projects draw, where, in which order and dtype. A CPU's generator stands in for the
GPU's: order, shape and dtype are the same there.
"""

from types import SimpleNamespace

import pytest
import torch

import infer
import infer_audio_avatar
import infer_with_vace
from errors import UsageError
from pipelines.audio_avatar.pipeline import AvatarMaker, upstream_noise
from pipelines.conditions import initial_noise
from pipelines.face_swap.pipeline import noise_like
from pipelines.vace.context import noise_with_references
from preprocess.audio import AudioTimeline
from preprocess.record import read_metadata
from preprocess.video import read_frames

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
TINY = ["--num_inference_steps", "1", "--height", "64", "--width", "64", "--num_frames", "5", "--no_face_crop"]


class DrawnError(Exception):
    """A draw on the other device."""


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_wan_and_vace_draw_the_whole_video_at_once_in_float32(device):
    def drawn(*size):  # as wan/text2video.py, image2video.py and vace.py do
        generator = torch.Generator(device=device)
        generator.manual_seed(7)
        return torch.randn(*size, dtype=torch.float32, device=device, generator=generator).cpu()

    assert torch.equal(initial_noise((16, 9, 32, 48), 7, device=device)[0], drawn(16, 3, 4, 6))
    assert torch.equal(initial_noise((48, 5, 64, 32), 7, 16, device)[0], drawn(48, 2, 4, 2))
    references_first = noise_with_references((16, 9, 32, 48), 7, 2, last_first=False, device=device)
    assert torch.equal(references_first[0], drawn(16, 2 + 3, 4, 6))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_stable_avatar_draws_the_whole_video_at_once_in_bfloat16(device):
    def drawn(*sizes):  # as randn_tensor does, in its prepare_latents; what it does not make comes after
        generator = torch.Generator(device=device).manual_seed(7)
        options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        return torch.cat([torch.randn(size, **options).cpu() for size in sizes], dim=2)

    shown = torch.stack(list(upstream_noise((16, 30, 4, 6), 29, 7, device)), dim=1)
    assert shown.dtype == torch.float32
    assert torch.equal(shown[None], drawn((1, 16, 29, 4, 6), (1, 16, 1, 4, 6)).float())
    whole = torch.stack(list(upstream_noise((16, 21, 4, 6), 21, 7, device)), dim=1)
    assert torch.equal(whole[None], drawn((1, 16, 21, 4, 6)).float())


def test_upstream_draws_the_frames_that_it_makes(monkeypatch):
    """2.24 s are 56 frames: 15 latent frames here, 14 upstream, which leaves the last frames out."""
    shapes = []
    monkeypatch.setattr("pipelines.audio_avatar.pipeline.upstream_noise", lambda *args: shapes.append(args))
    maker = AvatarMaker.__new__(AvatarMaker)
    maker.timeline, maker.num_latents, maker.grid = AudioTimeline(round(2.24 * 16000), 25), 15, (2, 2)
    maker.wan = SimpleNamespace(transformer_config=SimpleNamespace(out_dim=16), noise_device=torch.device("cpu"))
    assert maker.timeline.num_latent_frames == 15
    maker.upstream_noise(SimpleNamespace(seed=3))
    assert shapes == [((16, 15, 2, 2), 14, 3, torch.device("cpu"))]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (infer, TINY),
        (infer_with_vace, TINY),
        (infer_audio_avatar, [*TINY[:6], "--clip_sample_n_frames", "49"]),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_every_script_draws_where_it_is_told(tmp_path, monkeypatch, script, flags):
    """On the real model's GPU: here the run ends with its first draw."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device to draw on")
    words = [*flags, "--output", str(tmp_path / "out.mp4"), "--noise_device", "cuda"]
    with pytest.raises(UsageError, match="--noise_device cuda: not available here .*leave it out"):
        script.main(script.parse_args(words))
    assert not (tmp_path / "out.mp4").exists()

    generator = torch.Generator

    def draw(device):
        if torch.device(device).type == "cuda":
            raise DrawnError
        return generator(device)  # the tiny model's weights are drawn too

    monkeypatch.setattr("pipelines.wan.choose_device", lambda name, flag: torch.device(name))
    monkeypatch.setattr(torch, "Generator", draw)
    with pytest.raises(DrawnError):
        script.main(script.parse_args(words))


def test_face_swap_draws_there_too(monkeypatch):
    monkeypatch.setattr("pipelines.face_swap.pipeline.initial_noise", lambda *args: devices.append(args[-1]) or noise)
    devices, noise = [], torch.zeros(1, 16, 2, 4, 4)
    assert noise_like(noise, 0, 8, "the GPU") is noise
    assert devices == ["the GPU"]


def test_it_is_in_the_record_and_decides_the_content(tmp_path, monkeypatch):
    """On a stand-in for the GPU: another CPU generator's noise."""
    monkeypatch.setattr("pipelines.wan.choose_device", lambda name, flag: torch.device("cpu"))
    words = ["--prompt", "x", *TINY, "--output", str(tmp_path / "out.mp4")]
    infer.main(infer.parse_args([*words, "--noise_device", "cuda"]))
    made, frames = read_metadata(tmp_path / "out.mp4"), read_frames(tmp_path / "out.mp4")
    assert made["settings"]["noise_device"] == "cuda"
    infer.main(infer.parse_args([*words, "--overwrite"]))
    plain = read_metadata(tmp_path / "out.mp4")
    assert plain["settings"]["noise_device"] == "cpu"
    assert (read_frames(tmp_path / "out.mp4") == frames).all(), "the stand-in draws the same"
    assert plain["content"] != made["content"]


def test_other_words_are_refused():
    with pytest.raises(UsageError, match="--noise_device gpu: accepted are cpu, cuda"):
        infer.main(infer.parse_args(["--noise_device", "gpu"]))
