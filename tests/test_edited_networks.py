"""Configs edited by hand whose values look right: a network that cannot be made of them is refused in one line.

`test_edited_files` tries anything before torch is loaded. Here each run goes on until its networks are loaded and have
encoded prompts, pictures and sound; nothing is denoised.
"""

import copy
import json
import logging
import random
import wave
from pathlib import Path

import pytest
import yaml

import infer_audio_avatar
import infer_face_swap
import infer_long_video
from configs import load_config
from errors import UserError
from pipelines.audio_avatar.pipeline import AvatarMaker
from pipelines.face_swap.command import make_demo_clip
from pipelines.long_video.pipeline import LongVideoMaker
from pipelines.settings import recorded
from pipelines.text_to_video.pipeline import VideoMaker
from tests.test_edited_files import FACE, SCRIPTS, nodes

TINY = ["--height", "32", "--width", "32", "--num_frames", "5", "--num_inference_steps", "1"]
RUNS = {  # base config, script, flags
    "avatar": ("tiny-avatar", infer_audio_avatar, ["--height", "32", "--width", "32", "--num_frames", "5"]),
    "long video": ("tiny-i2v", infer_long_video, [*TINY, "--num_clips", "1"]),
    "talk": ("tiny-i2v", infer_long_video, [*TINY, "--num_clips", "1", "--variant", "talk"]),
    "face swap": ("tiny", infer_face_swap, ["--num_frames", "5"]),
}
FILES = {
    "avatar": ["--audio", "speech.wav"],
    "long video": ["--ref_image_path", FACE, "--no_drift_report"],
    "talk": ["--ref_image_path", FACE, "--no_drift_report", "--audio_path", "speech.wav"],
    "face swap": ["--input_video", "walk.mp4", "--ip_image", FACE],
}
NETWORKS = ("transformer", "vae", "text_encoder", "image_encoder", "audio_encoder", "multitalk", "stand_in", "vace")
NUMBERS = (1, 2, 3, 5, 7, 8, 12, 24, 33, 64, 100)
LISTS = ([], [1], [2, 1], [1, 1, 1], [1, 2, 4, 4], [16] * 6, [3] * 7, [True], [False, True, True], [0.5], ["a"], [[1]])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Where runs end before the first step, with a short speech and a video of a face to run on."""

    def load(self, job) -> Path:
        self.wan.transformer(0)
        return job.output

    for maker in (VideoMaker, LongVideoMaker, AvatarMaker):
        monkeypatch.setattr(maker, "make", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("selfsame"), "disabled", True)
    with wave.open("speech.wav", "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(random.Random(0).randbytes(10_000))
    make_demo_clip(Path("walk.mp4"), num_frames=1, side=96)
    return tmp_path


def run(name: str, config: Path) -> UserError | None:
    """The refusal, in one line; None where all networks were made."""
    _, script, flags = RUNS[name]
    flags = [*flags, *FILES[name]]
    try:
        script.main(script.parse_args(["--config", str(config), *flags, "--output", "out.mp4", "--overwrite"]))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return error
    return None


def edited(content: dict, generator: random.Random) -> dict:
    """With one network, or one or two of the values in it, taken out or replaced by another of about its kind."""
    content = copy.deepcopy(content)
    places = [place for place in nodes(content) if place[0] in NETWORKS]
    for *above, key in generator.sample(places, generator.choice((1, 1, 2))):
        inner = content
        for name in above:
            inner = inner.get(name, {}) if isinstance(inner, dict) else {}
        if key not in inner or generator.random() < 0.15:
            inner.pop(key, None)
        elif isinstance(inner[key], dict):
            other = generator.choice([name for name in NETWORKS if isinstance(content.get(name), dict)])
            inner[key] = generator.choice(({}, {key: inner[key]}, content[other], list(inner[key].values())))
        elif isinstance(inner[key], list):
            inner[key] = generator.choice([*LISTS, inner[key][::-1], inner[key] * 2])
        else:
            inner[key] = generator.choice(NUMBERS)
    return content


@pytest.mark.parametrize("name", RUNS)
def test_edited_networks(here, name):
    """YAML, and every third time the record of a run that names it. A face swap also encodes its video each time."""
    base, *_ = RUNS[name]
    content = {key: value for key, value in load_config(base).items() if key not in ("name", "base")}
    generator = random.Random(name)
    path = here / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run(name, path) is None
    for number in range(6 if name == "face swap" else 18):
        text = yaml.safe_dump(edited(content, generator))
        path.write_text(text)
        error = run(name, path if number % 3 else record_of(name, path))
        assert error is None or error.exit_code in (2, 3, 4), text


def record_of(name: str, config: Path) -> Path:
    """What a run of the unedited config would have recorded, naming the edited one."""
    base, script, _ = RUNS[name]
    module, resolve, flags = SCRIPTS[f"{script.__name__}.py"]
    settings = resolve(module.parse_args([*flags, "--config", base]))[0]
    values = {key: value for key, value in recorded(settings).items() if key not in ("output", "overwrite", "preview")}
    record = config.with_name("run.json")
    record.write_text(json.dumps({"settings": values | {"config": str(config)}}))
    return record
