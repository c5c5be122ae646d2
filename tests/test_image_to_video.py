"""infer.py from a picture: what the pictures decide, and what is refused."""

import json

import numpy
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import infer
from configs import load_config
from errors import UserError
from pipelines import video
from pipelines.text_to_video.command import picture_size
from pipelines.text_to_video.from_pictures import video_size
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests.conftest import GOLDENS
from tests.tiny import CONFIG

SMALL = ["--height", "64", "--width", "96", "--num_frames", "5", "--num_inference_steps", "2", "--prompt", "x"]


def make(output, *flags) -> numpy.ndarray:
    infer.main(infer.parse_args([*SMALL, "--output", str(output), *map(str, flags)]))
    return read_frames(output)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of 96 x 64, and a square one."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate({"a": (64, 96, 3), "b": (64, 96, 3), "square": (80, 80, 3)}.items()):
        pixels = numpy.random.default_rng(seed).integers(0, 255, size, dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def flf2v(tmp_path_factory):
    """The tiny model with a position embedding for two pictures."""
    config = load_config("tiny-i2v")
    tokens = 2 * (1 + (config["image_encoder"]["image_size"] // config["image_encoder"]["patch_size"]) ** 2)
    return write_config(
        tmp_path_factory.mktemp("flf2v") / "flf2v.yaml", config, config["transformer"] | {"image_tokens": tokens}
    )


def write_config(path, config, transformer, **changes):
    keys = ("tiny", "seed", "vae", "text_encoder", "image_encoder", "tokenizer", "defaults")
    content = {k: config[k] for k in keys if k in config} | {"description": "a test", "transformer": transformer}
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_the_picture_decides_the_video(tmp_path, pictures):
    a = make(tmp_path / "a.mp4", "--image", pictures / "a.png")  # tiny-i2v by itself
    b = make(tmp_path / "b.mp4", "--image", pictures / "b.png")
    assert a.shape == b.shape == (5, 64, 96, 3)
    assert (a != b).mean() > 0.5
    record = read_metadata(tmp_path / "a.mp4")
    assert record["settings"]["config"] == "tiny-i2v"
    assert len(record["pictures"]) == 1
    infer.main(infer.parse_args(["--config", str(tmp_path / "a.json"), "--output", str(tmp_path / "again.mp4")]))
    assert (read_frames(tmp_path / "again.mp4") == a).all()


def test_clip_features_reach_the_model(tmp_path, pictures, monkeypatch):
    from pipelines.wan import Wan

    a = make(tmp_path / "a.mp4", "--image", pictures / "a.png")
    encode = Wan.encode_images
    monkeypatch.setattr(Wan, "encode_images", lambda self, images: encode(self, images) + 1)
    assert (make(tmp_path / "other.mp4", "--image", pictures / "a.png") != a).any()


@pytest.mark.parametrize("memory", ["group", "sequential"])
def test_memory_modes_leave_the_video(tmp_path, pictures, memory):
    a = make(tmp_path / "a.mp4", "--image", pictures / "a.png")
    assert (make(tmp_path / "b.mp4", "--image", pictures / "a.png", "--memory", memory) == a).all()


def test_video_has_the_pictures_shape(tmp_path, pictures):
    assert make(tmp_path / "square.mp4", "--image", pictures / "square.png").shape == (5, 64, 64, 3)
    config = load_config("wan2.1-i2v-14B-480P")
    landscape = numpy.zeros((480, 832, 3), numpy.uint8)
    assert video_size(landscape, 480, 832, config) == (480, 832)  # upstream's rounding: 464
    assert video_size(landscape[:240, :416], 480, 832, config) == (480, 832)
    assert video_size(numpy.zeros((1000, 1000, 3), numpy.uint8), 480, 832, config) == (624, 624)
    ti2v = load_config("wan2.2-ti2v-5B")
    assert video_size(numpy.zeros((1280, 704, 3), numpy.uint8), 704, 1280, ti2v) == (1280, 704)


def test_first_and_last_picture(tmp_path, pictures, flf2v):
    flags = ("--config", flf2v, "--image", pictures / "a.png", "--last_image")
    ab = make(tmp_path / "ab.mp4", *flags, pictures / "b.png")
    aa = make(tmp_path / "aa.mp4", *flags, pictures / "a.png")
    assert (ab != aa).mean() > 0.5
    assert make(tmp_path / "cut.mp4", *flags, pictures / "square.png").shape == ab.shape
    assert len(read_metadata(tmp_path / "ab.mp4")["pictures"]) == 2


def test_ti2v_holds_the_first_frame(tmp_path, pictures, monkeypatch):
    """One model makes videos from text, and from a picture that stays as it is."""
    from models.wan.transformer import WanTransformer
    from models.wan.vae import detect_vae_config, diffusers_names

    golden = load_file(GOLDENS / "wan-vae22" / "weights.safetensors")
    vae = detect_vae_config({key: tuple(tensor.shape) for key, tensor in diffusers_names(golden).items()})
    shape = CONFIG["transformer"] | {"in_dim": 48, "out_dim": 48}
    defaults = {k: v for k, v in CONFIG["defaults"].items() if k != "ip_image"}
    config = write_config(tmp_path / "ti2v.yaml", CONFIG, shape, vae=vae, defaults=defaults)
    finals, told = [], []
    denoise, forward = video.denoise, WanTransformer.forward

    def recorded(*args, **options):
        finals.append((options.get("pinned"), denoise(*args, **options)))
        return finals[-1][1]

    def heard(model, hidden_states, timestep, *args, **options):
        told.append(timestep)
        return forward(model, hidden_states, timestep, *args, **options)

    monkeypatch.setattr(video, "denoise", recorded)
    monkeypatch.setattr(WanTransformer, "forward", heard)
    make(tmp_path / "picture.mp4", "--config", config, "--image", pictures / "a.png")
    pinned, latents = finals[0]
    assert torch.equal(latents[:, :, :1], pinned.latents)
    _, _, frames, height, width = latents.shape
    for timestep in told:  # the picture is clean: its tokens are told so, and no others
        of_frames = timestep.view(1, frames, height * width // 4)
        assert (of_frames[:, 0] == 0).all()
        assert (of_frames[:, 1:] == of_frames[:, -1:, -1:]).all() and of_frames[0, -1, -1] > 0
    assert len({timestep.max().item() for timestep in told}) > 1
    flags = [f for f in SMALL if f != "x"]
    infer.main(infer.parse_args([*flags, "x", "--config", str(config), "--output", str(tmp_path / "text.mp4")]))


def test_interrupted_run_goes_on(tmp_path, pictures, monkeypatch):
    from pipelines.job_state import JobState

    whole = make(tmp_path / "whole.mp4", "--image", pictures / "a.png")

    def interrupt(self, step, save=JobState.save):
        save(self, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(JobState, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out.mp4", "--image", pictures / "a.png")
    monkeypatch.undo()
    assert (make(tmp_path / "out.mp4", "--image", pictures / "a.png") == whole).all()


def test_json_of_a_plain_run_fits_other_scripts(tmp_path):
    """What only infer.py has is left out of the record where it was not used."""
    from pipelines.earlier_run import read_run_json
    from pipelines.settings import Settings

    flags = [*SMALL, "--no_face_crop", "--output", str(tmp_path / "out.mp4")]
    infer.main(infer.parse_args(flags))
    assert read_run_json(str(tmp_path / "out.json"), Settings)["num_frames"] == 5
    assert "first_frame" not in json.loads((tmp_path / "out.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("video", "picture"),
    [
        ((480, 832), (704, 1216)),
        ((832, 480), (1216, 704)),
        ((720, 1280), (768, 1344)),
        ((1280, 720), (1344, 768)),
        ((1024, 1024), (1024, 1024)),
        ((64, 64), (1024, 1024)),
    ],
)
def test_size_of_a_first_frame_before_it_is_cut(video, picture):
    assert picture_size(*video) == picture


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--config", "tiny", "--image", "a.png"], 2, ["--image", "tiny starts from text", "wan2.1-i2v-14B-480P"]),
        (["--config", "tiny-i2v"], 2, ["starts from a picture", "--image", "--first_frame instantid"]),
        (["--image", "missing.png"], 3, ["--image missing.png"]),
        (["--image", "a.txt"], 3, ["--image", "a.txt"]),
        (["--image", "a.png", "--last_image", "a.png"], 2, ["--last_image", "wan2.1-flf2v-14B-720P"]),
        (["--config", "wan2.1-flf2v-14B-720P", "--image", "a.png"], 2, ["--last_image"]),
        (["--image", "a.png", "--first_frame", "instantid", "--ip_image", "a.png"], 2, ["--image and --first_frame"]),
        (["--wan_version", "2.1", "--image", "a.png"], 4, ["--only wan2.1-i2v-14B-480P"]),
        (["--wan_version", "2.2", "--image", "a.png"], 4, ["--only wan2.2-i2v-A14B"]),
        (["--image", "a.png", "--face_height", "0.5"], 2, ["--face_height", "--first_frame instantid"]),
        (["--image", "a.png", "--pose_image", "a.png"], 2, ["--pose_image", "--first_frame instantid"]),
        (["--image", "a.png", "--lcm"], 2, ["--lcm", "--method standin"]),
        (["--image", "a.png", "--ip_image", "a.png"], 2, ["--ip_image", "--first_frame instantid"]),
        (["--first_frame", "magic", "--ip_image", "a.png"], 2, ["--first_frame magic", "instantid"]),
        (["--first_frame", "instantid"], 2, ["--ip_image", "one photo"]),
        (["--first_frame", "instantid", "--ip_image", "a.png", "--prompt", "y"], 2, ["--first_frame_prompt"]),
        (["--first_frame", "instantid", "--ip_image", "a.png", "--config", "tiny"], 2, ["tiny starts from text"]),
        (["--first_frame", "instantid", "--ip_image", "a.png"], 4, ["--only sdxl-base-1.0"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, pictures, flags, exit_code, words):
    monkeypatch.chdir(tmp_path)  # no checkpoints here
    Image.open(pictures / "a.png").save("a.png")
    (tmp_path / "a.txt").write_text("no picture")
    with pytest.raises(UserError) as error:
        make(tmp_path / "out.mp4", *flags)
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    for word in words:
        assert word in message, message
    assert not list(tmp_path.glob("*.mp4"))
