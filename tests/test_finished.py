"""What is finished is kept: by every script that test_batches.py does not run, and by the processes of one run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

import infer
import infer_face_swap
import infer_with_lora
from errors import UsageError
from pipelines.face_swap.command import make_demo_clip
from tests.test_batches import TINY, names, run
from tests.test_distributed import SMALL, torchrun
from tests.test_lora import DIALECTS, factors
from tests.tiny_consis_id import write_release
from tests.tiny_face import write_antelopev2
from tests.tiny_instant_id import write_instant_id, write_sdxl

PROJECT = Path(__file__).parent.parent
PHOTO = ["--ip_image", PROJECT / "assets" / "face.png", "--prompt", "a woman"]


LOADS = "wan.Wan.encode_prompts"  # the first that reads weights in full


def face_swap(folder):
    clip = make_demo_clip(folder / "clip.mp4", num_frames=5, side=64)
    return infer_face_swap, ["--input_video", clip, "--num_inference_steps", 2, "--num_frames", 17], LOADS


def lora(folder):
    save_file(DIALECTS["Diffusers"](factors()), folder / "lora.safetensors")
    return infer_with_lora, [*TINY, "--no_face_crop", "--lora_path", folder / "lora.safetensors"], LOADS


def instant_id(folder):
    write_antelopev2(folder / "antelopev2", ((6, 8, 0.9, 3),))
    paths = ["--sdxl_path", write_sdxl(folder / "sdxl"), "--instantid_path", write_instant_id(folder / "InstantID")]
    small = ["--height", 256, "--width", 256, "--num_inference_steps", 2, "--antelopv2_path", folder / "antelopev2"]
    return infer, ["--method", "instantid", *paths, *small, *PHOTO], "instant_id.pipeline.load_instant_id"


def consis_id(folder):
    (folder / "release").mkdir()
    release = ["--method", "consisid", "--base_path", write_release(folder / "release", "1.0"), "--num_frames", 9]
    small = ["--height", 64, "--width", 96, "--num_inference_steps", 2, "--face_detector", "scrfd"]
    return infer, [*release, *small, *PHOTO], "consis_id.model.ConsisID.prepare_face"


@pytest.mark.parametrize("method", [face_swap, lora, instant_id, consis_id], ids=lambda method: method.__name__)
def test_a_finished_command_is_kept_and_no_model_is_loaded(tmp_path, monkeypatch, caplog, capsys, method):
    (tmp_path / "parts").mkdir()
    module, flags, loads = method(tmp_path / "parts")
    (tmp_path / "made").mkdir()
    output = tmp_path / "made" / ("out.png" if method is instant_id else "out.mp4")
    assert run(module, *flags, "--output", output) == [output]
    content, made = output.read_bytes(), names(tmp_path / "made")
    output.with_name(".out.state.safetensors").write_bytes(b"of a run killed just before its end")
    capsys.readouterr()
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr(f"pipelines.{loads}", None)
        assert run(module, *flags, "--output", output, "--memory", "model") == [output]
    assert capsys.readouterr().out.split() == [str(output)]
    assert f"{output.name}: done already, by the same settings" in caplog.text
    assert output.read_bytes() == content and names(tmp_path / "made") == made
    for other in (["--seed", 5], ["--num_inference_steps", 3], ["--guidance_scale", 2]):
        with pytest.raises(UsageError, match=f"{output.name} exists; .*--overwrite"):
            run(module, *flags, *other, "--output", output)
    assert output.read_bytes() == content


# ----------------------------------------------------------------------------------------------------- two processes


def test_processes_of_a_split_video_take_the_first_ones_files(tmp_path):
    """Their disks may differ: what the first one has is done for both, what only the second has is made."""
    torchrun("tests/settle_worker.py", tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [["done", "", "refused"]] * 2


def test_a_split_video_that_is_finished_is_kept(tmp_path):
    flags = [*SMALL, "--prompt", "a man", "--ulysses_degree", 2, "--output", tmp_path / "out.mp4"]
    assert torchrun("infer.py", *flags).stdout.split() == [str(tmp_path / "out.mp4")]
    content = (tmp_path / "out.mp4").read_bytes()
    (tmp_path / ".out.state.safetensors").write_bytes(b"of a run killed just before its end")
    again = torchrun("infer.py", *flags)
    assert again.stdout.split() == [str(tmp_path / "out.mp4")], "once, not once a process"
    assert "out.mp4: done already, by the same settings" in again.stderr
    assert (tmp_path / "out.mp4").read_bytes() == content
    assert [name for name in names(tmp_path) if "face0" not in name] == ["out.json", "out.mp4"]


def test_one_foreign_file_ends_no_other_process(tmp_path):
    """It is all that the second process has to do: the first one's video is made all the same."""
    (tmp_path / "out-001-seed0.mp4").write_bytes(b"precious")
    flags = [*SMALL, "--no_face_crop", "--output", tmp_path / "out.mp4", "--prompt", "a", "b"]
    first = torchrun("infer.py", *flags)
    assert first.stdout.split() == [str(tmp_path / "out-000-seed0.mp4")]
    assert "out-001-seed0.mp4 not made: something of other settings is there" in first.stderr
    content = (tmp_path / "out-000-seed0.mp4").read_bytes()
    (tmp_path / "out-001-seed0.mp4").unlink()
    second = torchrun("infer.py", *flags)
    assert sorted(second.stdout.split()) == [str(tmp_path / f"out-00{number}-seed0.mp4") for number in range(2)]
    assert "out-000-seed0.mp4: done already" in second.stderr
    assert (tmp_path / "out-000-seed0.mp4").read_bytes() == content
