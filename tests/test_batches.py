"""A batch that was stopped goes on, a finished command is kept, and runs that were killed leave nothing in the way."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy
import pytest

import infer
import infer_audio_avatar
import infer_long_video
import infer_with_vace
from errors import UsageError
from pipelines.clip_store import ClipStore
from pipelines.job_state import JobState
from preprocess.image import read_image, write_png
from preprocess.output import resolve_output
from preprocess.record import read_comment
from preprocess.video import read_frames
from preprocess.video_writer import VideoWriter, write_video
from tests.test_infer import SMALL

PROJECT = Path(__file__).parent.parent
TINY = ["--height", "32", "--width", "32", "--num_frames", "5", "--num_inference_steps", "1"]
SCRIPTS = {
    "infer": (infer, [*TINY, "--no_face_crop"]),
    "vace": (infer_with_vace, [*TINY, "--no_face_crop"]),
    "avatar": (infer_audio_avatar, ["--width", "32", "--height", "32", "--sample_steps", "1", "--num_frames", "9"]),
    "long": (infer_long_video, [*TINY, "--num_clips", "1", "--no_drift_report"]),
}


def run(script, *flags) -> list[Path]:
    return script.main(script.parse_args([str(flag) for flag in flags]))


def batch(output, *flags) -> list[Path]:
    return run(infer, *SMALL, "--output", output, "--prompt", "a", "b", "--seed", "0", "1", *flags)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_stopped_batch_goes_on(tmp_path, monkeypatch, calls, caplog, capsys):
    """Kept, resumed, made: and one file of something else stands in the way of nothing but itself."""
    (tmp_path / "whole").mkdir()
    whole = batch(tmp_path / "whole" / "v.mp4")
    assert len(whole) == 4 and len(calls) == 4 * 6

    def interrupt(self, step, save=JobState.save):
        save(self, step)
        if "000-seed1" in self.path.name and step.index == 1:
            raise KeyboardInterrupt

    (tmp_path / "v-001-seed0.mp4").write_bytes(b"precious")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobState, "save", interrupt)
        batch(tmp_path / "v.mp4")
    assert "v-001-seed0.mp4 exists" in caplog.text and "the others are made" in caplog.text
    calls.clear()
    capsys.readouterr()
    caplog.set_level("INFO")
    with pytest.raises(UsageError, match=r"v-001-seed0.mp4 not made: .*--overwrite") as error:
        batch(tmp_path / "v.mp4")
    assert error.value.exit_code == 2
    assert len(calls) == 2 + 6, "one step was left of the second, three of the fourth"
    assert "v-000-seed0.mp4: done already" in caplog.text
    made = ["v-000-seed0.mp4", "v-000-seed1.mp4", "v-001-seed1.mp4"]
    assert [Path(line).name for line in capsys.readouterr().out.split()] == made
    for name in made:
        assert (read_frames(tmp_path / name) == read_frames(tmp_path / "whole" / name)).all()
    assert (tmp_path / "v-001-seed0.mp4").read_bytes() == b"precious"
    (tmp_path / "v-001-seed0.mp4").unlink()
    calls.clear()
    assert [path.name for path in batch(tmp_path / "v.mp4")] == names_of(whole)
    assert len(calls) == 6


def names_of(paths) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_command_is_kept_and_no_model_is_loaded(tmp_path, monkeypatch, caplog, capsys, script):
    module, flags = SCRIPTS[script]
    output = tmp_path / "out.mp4"
    made = run(module, *flags, "--output", output)
    content = output.read_bytes()
    (tmp_path / ".out.state.safetensors").write_bytes(b"of a run killed just before its end")
    capsys.readouterr()
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.wan.Wan.encode_prompts", None)
        assert run(module, *flags, "--output", output) == made == [output]
    assert capsys.readouterr().out.split() == [str(output)]
    assert "out.mp4: done already, by the same settings" in caplog.text
    assert output.read_bytes() == content and not (tmp_path / ".out.state.safetensors").exists()
    for other in (["--seed", 5], ["--shift", 2], ["--quality", 5], ["--tiled"]):
        with pytest.raises(UsageError, match="out.mp4 exists; .*--overwrite"):
            run(module, *flags, *other, "--output", output)
    assert output.read_bytes() == content


def test_a_photo_counts_by_its_content(tmp_path):
    photo = tmp_path / "me.png"
    shutil.copy(PROJECT / "assets" / "face.png", photo)
    flags = [*TINY, "--no_face_crop", "--prompt", "x", "--output", tmp_path / "out.mp4", "--ip_image"]
    run(infer, *flags, photo)
    moved = photo.rename(tmp_path / "moved.png")
    assert run(infer, "--memory", "group", *flags, moved) == [tmp_path / "out.mp4"]
    write_png(photo, 255 - read_image(moved))
    with pytest.raises(UsageError, match="exists"):
        run(infer, *flags, photo)


# ------------------------------------------------------------------------------------------------- killed at the end


def killed(call: str, count: int, main) -> None:
    """Run in a child process that is killed (-9) at its count-th call of a function of `os`."""
    child = os.fork()
    if child == 0:
        real, calls = getattr(os, call), []

        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, call, deadly)
        main()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run was not killed"


def test_killed_between_record_and_video_is_no_finished_output(tmp_path):
    frames = numpy.zeros((2, 16, 16, 3), numpy.uint8)
    killed("replace", 2, lambda: write_video(tmp_path / "v.mp4", [frames], fps=8, metadata={"made_by": "Selfsame"}))
    assert names(tmp_path) == [".v.part.ffmetadata", ".v.part.mp4", "v.json"], "the record is to be there first"
    record = {"made_by": "Selfsame", "settings": {}}
    (tmp_path / "v.json").write_text(json.dumps(record))
    assert resolve_output(tmp_path / "v.mp4", overwrite=False) == tmp_path / "v.mp4"
    (tmp_path / "v.json").write_text('{"a recipe": "of somebody else"}')
    with pytest.raises(UsageError, match="v.json .*exists"):
        resolve_output(tmp_path / "v.mp4", overwrite=False)


@pytest.mark.parametrize("cleaned", [False, True], ids=["work files there", "work files removed"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_goes_on_after_that(tmp_path, script, cleaned):
    """The same command makes the video, and clears what the killed run left."""
    module, flags = SCRIPTS[script]
    output = tmp_path / "out.mp4"

    def main():
        run(module, *flags, "--output", output)

    def place(source, target, replace=os.replace):
        if Path(target) == output:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    child = os.fork()
    if child == 0:
        os.replace = place
        main()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert (tmp_path / "out.json").exists() and not output.exists()
    if cleaned:
        for file in tmp_path.glob(".out.part*"):
            file.unlink()
    main()
    assert [name for name in names(tmp_path) if "face0" not in name] == ["out.json", "out.mp4"]
    assert read_comment(output)["content"] == json.loads((tmp_path / "out.json").read_text())["content"]


def parts_of(script: str, folder: Path) -> tuple:
    """A script whose video is joined of two files: two windows of a control video, or two clips."""
    if script == "long":
        module, flags = SCRIPTS["long"]
        return module, [*flags, "--num_clips", 2]
    frames = numpy.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), numpy.uint8)
    write_video(folder / "control.mp4", [frames], fps=16)
    module, flags = SCRIPTS["vace"]
    windows = ["--num_frames", 9, "--window_frames", 5, "--window_overlap", 1]
    return module, [*flags, *windows, "--reference_video", folder / "control.mp4"]


@pytest.mark.parametrize("moment", ["finish", "join"])
@pytest.mark.parametrize("script", ["windows", "long"])
def test_killed_between_the_last_part_and_the_join(tmp_path, calls, script, moment):
    """Its latents are finished, or its frames too: nothing is denoised again, and the frames are an unbroken run's."""
    module, flags = parts_of(script, tmp_path)
    run(module, *flags, "--output", tmp_path / "whole.mp4")
    output, kind = tmp_path / "out.mp4", {"finish": ClipStore, "join": VideoWriter}[moment]
    child = os.fork()
    if child == 0:
        method = getattr(kind, moment)

        def deadly(self, *args):
            if kind is VideoWriter or args[0] is self.clips[-1]:
                os.kill(os.getpid(), signal.SIGKILL)
            method(self, *args)

        setattr(kind, moment, deadly)
        run(module, *flags, "--output", output)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not output.exists()
    assert len(list((tmp_path / ".out.clips").glob("0*.mp4"))) == 2
    calls.clear()
    run(module, *flags, "--output", output)
    assert not calls, "finished steps were computed again"
    assert (read_frames(output) == read_frames(tmp_path / "whole.mp4")).all()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("script", ["windows", "long"])
@pytest.mark.parametrize("part", ["00000.mp4", "00001.mp4"])
def test_a_flipped_bit_of_a_finished_part_is_never_joined(tmp_path, monkeypatch, caplog, script, part):
    module, flags = parts_of(script, tmp_path)
    run(module, *flags, "--output", tmp_path / "whole.mp4")
    whole = read_frames(tmp_path / "whole.mp4")

    def interrupt(self, videos):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VideoWriter, "join", interrupt)
        run(module, *flags, "--output", tmp_path / "out.mp4")
    damaged = tmp_path / ".out.clips" / part
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1  # a pixel's
    damaged.write_bytes(content)
    run(module, *flags, "--output", tmp_path / "out.mp4")
    assert f"{part} is damaged; starting from the first clip" in caplog.text
    assert (read_frames(tmp_path / "out.mp4") == whole).all()
    assert not list(tmp_path.glob(".*"))
