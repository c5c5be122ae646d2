"""Files are whole or not there, synced before they are renamed, and no link that somebody planted is followed."""

import os
import tempfile
from pathlib import Path

import numpy
import pytest
import torch

import infer
import infer_long_video
from errors import ResourceError, UsageError, UserError
from metrics.drift import report
from pipelines.audio_avatar.state import create_on_disk
from pipelines.instant_id import first_frame
from pipelines.instant_id.pipeline import FaceGuide
from pipelines.job_state import load_state, save_state
from pipelines.text_to_video.command import resolve_image_to_video
from preprocess.image import read_image, write_png
from preprocess.output import allocate, part_of, whole_file
from preprocess.picture_writer import write_picture
from preprocess.side_file import write_side_picture
from preprocess.video import read_frames
from preprocess.video_writer import add_metadata, write_video
from tests.test_batches import SCRIPTS, TINY, names, run

FRAMES = numpy.zeros((3, 16, 16, 3), numpy.uint8)
RECORD = {"made_by": "Selfsame"}


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order."""
    found, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_replace(source, target):
        found.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files")


@needs_proc
def test_both_are_synced_then_the_record_is_renamed_then_the_video(tmp_path, events):
    folder = ("sync", tmp_path.name)
    write_video(tmp_path / "v.mp4", [FRAMES], fps=8, metadata=RECORD)
    whole = [("sync", ".v.part.json"), ("sync", ".v.part.mp4"), ("rename", "v.json"), ("rename", "v.mp4"), folder]
    assert events == whole
    events.clear()
    add_metadata(tmp_path / "v.mp4", {"face_score": 1})
    assert events == whole
    events.clear()
    write_picture(tmp_path / "p.png", FRAMES[0], RECORD)
    assert [name for _, name in events] == [".p.part.json", ".p.part.png", "p.json", "p.png", tmp_path.name]


@needs_proc
def test_states_and_side_files_are_synced_before_they_are_renamed(tmp_path, events):
    save_state(tmp_path / ".s.state.safetensors", {"a": torch.ones(2)}, {})
    write_png(tmp_path / "a.png", FRAMES[0])
    write_video(tmp_path / "v.mp4", [FRAMES], fps=8)
    events.clear()
    report(tmp_path / "v.mp4")
    save_state(tmp_path / ".s.state.safetensors", {"a": torch.zeros(2)}, {})
    write_side_picture(tmp_path / "v.face0.png", FRAMES[0], overwrite=False)
    written = ["v.drift.tsv", "v.drift.png", ".s.state.safetensors", "v.face0.png"]
    expected = [[("sync", part_of(Path(n)).name), ("rename", n), ("sync", tmp_path.name)] for n in written]
    assert events == [event for three in expected for event in three]


def test_a_state_is_never_half(tmp_path, monkeypatch):
    """A save that fails in the middle leaves the state before."""
    path = tmp_path / ".s.state.safetensors"
    save_state(path, {"a": torch.ones(2)}, {"step": "1"})

    def half(tensors, part, metadata):
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.job_state.save_file", half)
    with pytest.raises(ResourceError, match="make room"):
        save_state(path, {"a": torch.zeros(2)}, {"step": "2"})
    tensors, metadata = load_state(path, "")
    assert metadata == {"step": "1"} and tensors["a"].tolist() == [1, 1]
    assert names(tmp_path) == [path.name]


def refuse_renaming(monkeypatch, name: str) -> None:
    """As if the disk were full at the end of this file."""
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("name", ["v.drift.tsv", "v.drift.png"])
def test_a_drift_report_is_never_half(tmp_path, monkeypatch, name):
    write_video(tmp_path / "v.mp4", [FRAMES], fps=8)
    report(tmp_path / "v.mp4")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_video(tmp_path / "v.mp4", [255 - FRAMES], fps=8)
    refuse_renaming(monkeypatch, name)
    with pytest.raises(ResourceError, match="No space left|the disk is full"):
        report(tmp_path / "v.mp4")
    assert (tmp_path / name).read_bytes() == before[name] and names(tmp_path) == sorted(before)


FIRST_FRAME = [f"v.first_frame.{end}" for end in ("safetensors", "keypoints.png", "json", "png")]


class GreyPictures:
    """In place of SDXL."""

    def __init__(self, *args):
        pass

    def make(self, job) -> Path:
        write_picture(job.output, numpy.full((64, 64, 3), 100, numpy.uint8), RECORD)
        return job.output

    def free(self) -> None:
        pass


@needs_proc
@pytest.mark.parametrize("failing", [None, *FIRST_FRAME])
def test_a_first_frame_is_whole_or_not_there(tmp_path, monkeypatch, events, failing):
    """Each file is synced and renamed, the picture that says that all are there last; and none is ever half."""
    args = ["--first_frame", "instantid", "--ip_image", "assets/face.png", "--prompt", "x"]
    monkeypatch.chdir(Path(__file__).parent.parent)
    settings, _ = resolve_image_to_video(infer.parse_args([*args, *TINY, "--output", str(tmp_path / "v.mp4")]))
    keypoints = numpy.array([[20.0, 20], [40, 20], [30, 30], [22, 40], [38, 40]])
    guide = FaceGuide(numpy.ones(512, numpy.float32), keypoints, (10.0, 10, 50, 50), (64, 64))
    monkeypatch.setattr(first_frame, "guide_face", lambda *args: guide)
    monkeypatch.setattr(first_frame, "PictureMaker", GreyPictures)
    for name in ("load_recognizer", "load_scorer"):
        monkeypatch.setattr(first_frame, name, lambda *args: None)
    if failing is not None:
        refuse_renaming(monkeypatch, failing)
        with pytest.raises(UserError, match="No space left|the disk is full") as error:
            first_frame.make_first_frame(settings, tmp_path / "v.mp4")
        assert error.value.exit_code == 5
        assert not (tmp_path / failing).exists() and not list(tmp_path.glob(".*"))
        return
    assert first_frame.make_first_frame(settings, tmp_path / "v.mp4").shape == (32, 32, 3)
    assert [name for kind, name in events if kind == "rename"] == [*FIRST_FRAME[2:], *FIRST_FRAME]
    synced = [name for kind, name in events if kind == "sync"]
    assert {part_of(Path(name)).name for name in FIRST_FRAME[:2]} < set(synced)
    assert names(tmp_path) == sorted(FIRST_FRAME)


# ------------------------------------------------------------------------------------------------------ planted links


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="links")
@pytest.mark.parametrize("kind", ["symlink", "link"])
def test_planted_links_are_not_followed(tmp_path, kind):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    plant = getattr(os, kind)

    def planted(name: str) -> None:
        (tmp_path / name).unlink(missing_ok=True)
        plant(precious, tmp_path / name)

    for name in (".v.part.json", ".v.part.ffmetadata", ".v.part.sound.mp4", ".v.part.ffconcat"):
        planted(name)
    write_video(tmp_path / "v.mp4", [FRAMES], fps=8, metadata=RECORD)
    for name in (".v.part.json", ".v.part.mp4", ".v.part.ffmetadata"):
        planted(name)
    add_metadata(tmp_path / "v.mp4", {"face_score": 1})
    for name in (".p.part.json", ".p.part.png", "..s.state.part.safetensors", "latents.part"):
        planted(name)
    write_picture(tmp_path / "p.png", FRAMES[0], RECORD)
    write_png(tmp_path / "p.png", FRAMES[0], overwrite=True)
    save_state(tmp_path / ".s.state.safetensors", {"a": torch.ones(2)}, {})
    create_on_disk(tmp_path / "latents.part", (2, 2), {})
    planted(".w.part.mp4")  # where the lock is, a link is refused
    with pytest.raises(UsageError, match=r"\.w\.part\.mp4 .* is a link, not ours; remove it"):
        write_video(tmp_path / "w.mp4", [FRAMES], fps=8)
    assert precious.read_bytes() == b"precious"


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="links")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["state", "clips"])
def test_a_planted_work_folder_is_refused_at_once(tmp_path, monkeypatch, script, kind):
    """What is saved would go into it, and all that is there would be removed with it at the end."""
    monkeypatch.setattr("pipelines.distributed.start_processes", lambda *args, **options: pytest.fail("too late"))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "00000.mp4").write_bytes(b"precious")
    (tmp_path / f".out.{kind}").symlink_to(precious)
    module, flags = SCRIPTS[script]
    with pytest.raises(UsageError, match=rf"\.out\.{kind} beside the output is a link, not ours; remove it"):
        run(module, *flags, "--output", tmp_path / "out.mp4")
    assert names(precious) == ["00000.mp4"] and (precious / "00000.mp4").read_bytes() == b"precious"


def test_a_long_name_has_a_work_file_too(tmp_path):
    with whole_file(tmp_path / f"{'x' * 251}.png") as part:
        part.write_bytes(b"x")
    assert names(tmp_path) == [f"{'x' * 251}.png"]


# ------------------------------------------------------------------------------------------------- no temporary folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_put_into_the_temporary_folder(tmp_path, monkeypatch, script):
    """It may be small, full or not there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    module, flags = SCRIPTS[script]
    run(module, *flags, "--output", tmp_path / "out.mp4")
    assert len(read_frames(tmp_path / "out.mp4")) >= 4
    assert [name for name in names(tmp_path) if "face0" not in name] == ["out.json", "out.mp4"]


def test_no_room_for_the_features_of_a_sound_is_exit_5(tmp_path, monkeypatch):
    """A mapping of a sparse file would end in SIGBUS."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    module, flags = SCRIPTS["avatar"]
    with pytest.raises(UserError, match="No space left on device .*make room there") as error:
        run(module, *flags, "--output", tmp_path / "out.mp4")
    assert error.value.exit_code == 5 and "\n" not in str(error.value)


@pytest.mark.parametrize("supported", [True, False])
def test_allocated_files_have_their_blocks(tmp_path, monkeypatch, supported):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    if not supported:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with open(tmp_path / "file", "wb+") as file:
        file.write(b"head")
        file.flush()
        allocate(file.fileno(), 3 * 2**20)
    found = (tmp_path / "file").stat()
    assert found.st_size == 3 * 2**20 <= 512 * found.st_blocks
    assert (tmp_path / "file").read_bytes()[:5] == b"head\0"


# ---------------------------------------------------------------------------------------------------------- side files


@pytest.mark.parametrize(
    ("module", "flags", "name"),
    [
        (infer, [], "out.face0.png"),
        (infer, ["--preview"], "out.preview.png"),
        (infer_long_video, ["--num_clips", "1"], "out.drift.tsv"),
        (infer_long_video, ["--num_clips", "1"], "out.drift.png"),
    ],
)
def test_what_somebody_else_put_beside_the_output_stays(tmp_path, module, flags, name):
    """Refused before anything is made; ours, of an unfinished run, is replaced."""
    flags = [*TINY, *flags, *(["--no_face_crop"] if module is infer else [])]
    if name.endswith(".png"):
        write_png(tmp_path / name, FRAMES[0])
    else:
        (tmp_path / name).write_text("precious")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UsageError, match=f"{name} is in the way .*--overwrite"):
        run(module, *flags, "--output", tmp_path / "out.mp4")
    assert (tmp_path / name).read_bytes() == before and names(tmp_path) == [name]
    run(module, *flags, "--output", tmp_path / "out.mp4", "--overwrite")
    made = (tmp_path / name).read_bytes()
    assert made != before
    (tmp_path / "out.mp4").unlink()
    (tmp_path / "out.json").unlink()
    run(module, *flags, "--output", tmp_path / "out.mp4")
    assert (tmp_path / name).read_bytes() == made
    assert name.endswith(".tsv") or read_image(tmp_path / name).ndim == 3
