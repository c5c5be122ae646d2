"""The scripts as modules: what README's section "From Python" says is run as it stands there."""

import re
from pathlib import Path

import infer
import infer_audio_avatar
import infer_long_video
import infer_with_lora
from pipelines.distributed import Processes
from pipelines.text_to_video import pipeline as text_to_video
from pipelines.wan import Wan
from preprocess.video import probe

PROJECT = Path(__file__).parent.parent


def test_section_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (PROJECT / "README.md").read_text(encoding="utf-8").split("## From Python\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    exec(code, names)  # noqa: S102 (the section itself)
    names_of_files = [f"outputs/reading-000-seed{seed}.mp4" for seed in (0, 1)]
    assert names["paths"] == [tmp_path / name for name in names_of_files]
    assert all(name in code for name in names_of_files), "what the comment promises"
    assert names["frames"].shape == (probe(names["paths"][0]).num_frames, 128, 128, 3)


def test_the_same_arguments_make_it_again(tmp_path):
    """A cell of a notebook is run more than once; `main` completes a copy of its arguments."""
    size = ["--height", "64", "--width", "64", "--overwrite"]
    few = ["--ref_image_path", "assets/face.png", "--num_clips", "1", "--num_frames", "9", "--num_inference_steps", "1"]
    long = ["--output_root", str(tmp_path), "--prompt", "x", *few, *size, "--no_drift_report"]
    talk = ["--GPU_memory_mode", "model_full_load", "--enable_teacache", "--clip_sample_n_frames", "9", *size]
    talk += ["--sample_steps", "1", "--output", str(tmp_path / "talk.mp4")]
    for script, flags, output in ((infer_long_video, long, "face.mp4"), (infer_audio_avatar, talk, "talk.mp4")):
        args = script.parse_args(flags)
        given = dict(vars(args))
        assert script.main(args) == script.main(args) == [tmp_path / output]
        assert vars(args) == given


def test_a_process_without_a_video_loads_nothing(tmp_path, monkeypatch):
    """More processes than prompts: the others are done at once."""
    monkeypatch.setattr(Processes, "own", lambda self, jobs: [])
    monkeypatch.setattr(Wan, "__init__", lambda *_: (_ for _ in ()).throw(AssertionError("a model is made")))
    monkeypatch.setattr(text_to_video, "prepare_faces", lambda *_: 1 / 0)
    lora = tmp_path / "a.safetensors"
    lora.write_bytes(b"never read")
    for script, flags in (
        (infer, ["--prompt", "x"]),
        (infer_with_lora, ["--prompt", "x", "--lora_path", str(lora)]),
    ):
        assert script.main(script.parse_args([*flags, "--output", str(tmp_path / "out.mp4")])) == []
