"""Videos while a run trains: the scripts' own, and the run is none the different for them; and what is logged."""

import json
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from errors import UsageError
from preprocess.video import read_frames
from tests.tiny_data import write_clip
from training import log
from training.config import read_config
from training.estimate import flop_of, forward_arithmetic
from training.log import News
from training.recipes.base import Batch
from training.validation_videos import check_samples, command_of, make_video

PROJECT = Path(__file__).parent.parent
FACE = str(PROJECT / "assets" / "face.png")
SAMPLE = f"validate.samples=[{{prompt: a face, reference: {FACE}, num_inference_steps: 1}}]"


def run(output: Path, data: Path, *sets: str) -> None:
    given = [
        f"data.sources=[{{path: {data}}}]",
        f"output={output}",
        "train.steps=4",
        "optim.warmup=0",
        "optim.lr=0.05",
        "save.every=2",
        "ema={decay: 0.5}",
        "data.holdout=0",
        *sets,
    ]
    train.main(train.parse_args(["--config", "tiny-base", *(part for each in given for part in ("--set", each))]))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for i in range(2):
        write_clip(root / f"{i}.mp4", height=64, width=64, seed=i)
    return root


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> tuple[Path, Path]:
    """The same run without and with videos, the second in a folder that is not the project's."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "plain", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(Path("seen"), data, SAMPLE, "validate.videos_every=2")
    return folder / "plain", folder / "seen"


def test_a_run_with_videos_has_the_same_bits(runs):
    plain, seen = runs
    for name in ("weights", "ema"):
        one, two = (load_file(path / "step-000004" / f"{name}.safetensors") for path in (plain, seen))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (plain / "losses.jsonl").read_bytes() == (seen / "losses.jsonl").read_bytes()


def test_videos_are_of_the_weights_of_their_step(runs):
    _, seen = runs
    folders = sorted((seen / "validation").iterdir())
    assert [folder.name for folder in folders] == ["step-000000", "step-000002", "step-000004"]
    assert not [file for folder in folders for file in folder.rglob("*.safetensors")]
    frames = [read_frames(folder / "0.mp4").astype(float) for folder in folders]
    assert frames[0].shape == (9, 64, 64, 3)
    assert np.abs(frames[1] - frames[0]).mean() > 1 and np.abs(frames[2] - frames[1]).mean() > 1


def test_the_last_video_is_what_the_exported_file_makes(runs, tmp_path):
    _, seen = runs
    config = read_config(seen / "config.yaml")
    files = {"lora": seen / "export" / "lora.safetensors"}
    command = command_of(config, config.validate.samples[0], files, tmp_path / "again.mp4")
    import infer_with_lora

    infer_with_lora.main(infer_with_lora.parse_args(command[2:]))
    assert (read_frames(tmp_path / "again.mp4") == read_frames(seen / "validation" / "step-000004" / "0.mp4")).all()


def test_a_video_that_fails_is_a_warning(tmp_path, caplog):
    command = [sys.executable, "-c", "import sys; sys.exit('error: no such photo')"]
    assert not make_video(command, tmp_path / "0.mp4")
    assert "0.mp4 was not made: error: no such photo" in caplog.text


def words(config_name: str, files: dict[str, str], *sets: str, **sample: str) -> list[str]:
    given = ", ".join(f"{name}: {value}" for name, value in {"prompt": "p", **sample}.items())
    config = read_config(config_name, [f"validate.samples=[{{{given}}}]", *sets])
    check_samples(config)
    command = command_of(config, config.validate.samples[0], {k: Path(v) for k, v in files.items()}, Path("o.mp4"))
    return [Path(command[1]).name, *command[2:]]


def holds(command: list[str], *pair: str) -> bool:
    return any(command[i : i + 2] == list(pair) for i in range(len(command)))


def test_each_recipe_has_its_script(tmp_path):
    clip = str(write_clip(tmp_path / "c.mp4"))
    face, image = {"reference": FACE}, {"image": FACE}
    cases = [
        ("base-14b", {"lora": "f"}, {}, "infer_with_lora.py", ("--lora_path", "f")),
        ("base-i2v-14b", {"lora": "f"}, {"image": FACE}, "infer_with_lora.py", ("--image", FACE)),
        ("base-a14b-low", {"lora": "f"}, {}, "infer_with_lora.py", ("--lora_path_low", "f")),
        ("base-1.3b-full", {"transformer": "f"}, {}, "infer.py", ("--base_path", "f")),
        ("stand-in-14b", {"stand_in": "f"}, {"reference": FACE}, "infer.py", ("--stand_in_path", "f")),
        ("avatar-1.3b", {"transformer": "f"}, face | {"audio": clip}, "infer_audio_avatar.py", ("--audio", clip)),
        ("vace-1.3b", {"vace": "f"}, {"control": clip}, "infer_with_vace.py", ("--reference_video", clip)),
        ("svi-film-14b", {"lora": "f"}, {"image": FACE}, "infer_long_video.py", ("--variant", "film")),
        ("svi-talk-14b", {"lora": "f"}, image | {"audio": clip}, "infer_long_video.py", ("--audio_path", clip)),
        ("svi-dance-14b", {"lora": "f"}, image | {"control": clip}, "infer_long_video.py", ("--pose_path", clip)),
    ]  # fmt: skip
    for name, files, sample, script, pair in cases:
        command = words(name, files, **sample)
        assert command[0] == script and holds(command, *pair), (name, command)
    beside = words("base-1.3b-full", {"transformer": "f"})
    assert holds(beside, "--text_encoder_path", "checkpoints/Wan2.1/t2v-1.3B") or "--text_encoder_path" in beside
    placed = words("base-14b", {"lora": "f"}, "model.base_path=/models/wan")
    assert holds(placed, "--base_path", "/models/wan")


@pytest.mark.parametrize(
    ("config", "sample", "message"),
    [
        ("base-14b", {"audio": FACE}, "number 0: infer_with_lora.py takes no audio; it takes reference"),
        ("stand-in-14b", {}, "number 0: infer.py needs reference, a file"),
        ("stand-in-14b", {"reference": "nobody.png"}, "reference nobody.png: no such file"),
        ("stand-in-a14b-low", {"reference": FACE}, "a video needs both experts"),
    ],
)
def test_samples_that_cannot_be_made_are_refused_at_once(config, sample, message):
    with pytest.raises(UsageError, match=message):
        words(config, {}, **sample)


def test_a_measure_without_its_weights_is_refused(monkeypatch):
    monkeypatch.setattr("training.validation_videos.recognizer_is_there", lambda: False)
    with pytest.raises(UsageError, match="validate.metrics.*download_models.py --only antelopev2"):
        words("stand-in-14b", {}, "validate.metrics=[face_similarity]", reference=FACE)


# ------------------------------------------------------------------------------------------------------------ logs


def test_metrics_have_times_and_losses_have_none(runs):
    plain, _ = runs
    metrics = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    losses = [json.loads(line) for line in (plain / "losses.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [0, 1, 2, 3] and all(entry["seconds"] > 0 for entry in metrics)
    assert [{k: v for k, v in entry.items() if k != "seconds"} for entry in metrics] == losses


def test_weights_and_biases_hears_every_step(data, tmp_path, monkeypatch):
    heard, opened = [], {}

    class FakeRun:
        def log(self, numbers, step):
            heard.append((step, numbers))

    def init(**options):
        opened.update(options)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run(tmp_path / "run", data, "log.wandb=mine", "data.holdout=0.4", "validate.every=2", "validate.quantiles=1")
    assert (opened["project"], opened["id"], opened["resume"]) == ("mine", "run", "allow")
    assert opened["config"]["train"]["steps"] == 4
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert [numbers["loss"] for _, numbers in heard if "loss" in numbers] == losses
    assert [step for step, numbers in heard if "held_out/loss" in numbers] in ([2, 4], [])


def test_weights_and_biases_without_its_package_is_refused_before_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="log.wandb mine: needs its package: pip install wandb"):
        log.import_wandb(read_config("tiny-base", ["log.wandb=mine"]))


def test_the_line_of_news_is_of_all_steps_since_the_last(monkeypatch, caplog):
    """A card of 100 TFLOP a second that does 30 steps of 1 TFLOP in a minute and a half is at 0.33 % of its peak."""
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    news = News(torch.device("cpu"), steps=100)
    news.peak = 100e12
    caplog.set_level(logging.INFO, "selfsame")
    for step in range(30):
        clock[0] += 3
        numbers = news.add({"step": step, "loss": float(step), "norm": 1.0, "limit": 1.0, "lr": 0.1}, int(1e12))
        assert numbers["seconds"] == 3 and numbers["of_peak"] == pytest.approx(1 / 300, abs=1e-4)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("step 20: loss 9.5000 (mean of 20)") and "3 s a step" in line
    assert "0% of the card's peak" in line and line.endswith("4 min to go")  # 80 steps of 3 s


def test_the_arithmetic_of_a_batch_is_the_estimates():
    config = read_config("base-1.3b-full")
    batch = Batch([0, 1], torch.zeros(2, 16, 21, 60, 104, device="meta"), [], None, None, {})
    from models.wan.config import VARIANTS

    expected = forward_arithmetic(VARIANTS["t2v-1.3B"], 32760).step(True)
    assert flop_of(config)(batch) == 2 * expected
