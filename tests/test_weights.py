"""The list of what a run reads, and what is said of what is missing or wrong before anything loads."""

from pathlib import Path

import pytest

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from pipelines.control_video import resolve_vace_settings
from pipelines.distributed import start_processes
from pipelines.image_to_video_settings import resolve_image_to_video
from pipelines.vace import VaceWan
from pipelines.wan import Wan

FACE = "assets/face.png"


def make_wan(*flags: str) -> Wan:
    settings, config = resolve_image_to_video(infer.parse_args([*flags, "--prompt", "x"]))
    return Wan(settings, config, start_processes("cpu"))


def test_weights_lists_each_part_with_its_download():
    files = make_wan("--wan_version", "2.2", "--ip_image", FACE).weights()
    assert [(file.name, file.config) for file in files] == [
        ("high-noise transformer", "wan2.2-t2v-A14B"),
        ("low-noise transformer", "wan2.2-t2v-A14B"),
        ("umT5", "wan2.2-t2v-A14B"),
        ("tokenizer", "wan2.2-t2v-A14B"),
        ("VAE", "wan2.2-t2v-A14B"),
        ("Stand-In (high noise)", "stand-in-wan2.2"),
        ("Stand-In (low noise)", "stand-in-wan2.2"),
    ]
    assert files[0].path == Path("checkpoints/Wan2.2/t2v/high_noise_model")
    assert files[0].hint == "run: python download_models.py --only wan2.2-t2v-A14B"


def test_weights_of_the_tiny_model_are_none():
    assert make_wan().weights() == []


def test_vae_decides_until_denoised_only_where_it_encodes():
    def vae(wan: Wan):
        return next(file for file in wan.weights() if file.name == "VAE")

    assert not vae(make_wan("--config", "wan2.1-t2v-1.3B")).until_denoised
    assert vae(make_wan("--wan_version", "2.1", "--ip_image", FACE)).until_denoised  # the photo
    assert vae(make_wan("--config", "wan2.1-i2v-14B-480P", "--image", FACE)).until_denoised
    assert not vae(make_wan("--config", "wan2.2-ti2v-5B")).until_denoised
    assert vae(make_wan("--config", "wan2.2-ti2v-5B", "--image", FACE)).until_denoised
    args = infer_with_vace.parse_args(["--config", "wan2.1-vace-1.3B", "--prompt", "x", "--num_frames", "9"])
    settings, config = resolve_vace_settings(args)
    files = VaceWan(settings, config, start_processes("cpu")).weights()
    assert [file.name for file in files] == ["VACE", "umT5", "tokenizer", "VAE"]
    assert files[-1].until_denoised


@pytest.mark.parametrize(
    "script", [infer, infer_with_lora, infer_face_swap, infer_with_vace, infer_audio_avatar, infer_long_video]
)
def test_every_script_takes_a_tokenizer(script):
    assert script.parse_args(["--tokenizer_path", "there"]).tokenizer_path == "there"


def test_a_tokenizer_that_is_named_is_the_one_that_is_read():
    wan = make_wan("--config", "wan2.1-t2v-1.3B", "--tokenizer_path", "there")
    (tokenizer,) = (file for file in wan.weights() if file.name == "tokenizer")
    assert (tokenizer.path, tokenizer.flag) == (Path("there"), "--tokenizer_path")
