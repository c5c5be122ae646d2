"""Video files: what goes in comes out, whole or not at all, and never where it must not."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import preprocess.video_writer as video_file
from errors import InputError, ResourceError, UsageError
from preprocess.ffmpeg import ffmpeg_exe
from preprocess.output import free_disk_or_error, resolve_output, safe_name
from preprocess.record import read_metadata
from preprocess.video import VideoInfo, probe, read_frames
from preprocess.video_writer import VideoWriter, frames_to_uint8, write_video

ROOT = Path(__file__).parents[1]
NASTY = {
    "prompt": 'a "quoted" \\ man = ; # 男の子 😀 é\n\r\t\0 \u2028 \udcff\ncomment={}\n[STREAM]\n[CHAPTER]',
    "long": "字" * 100_000,
    "none": None,
    "nested": {"strength": [1.0, 0.5]},
}


def noise(num_frames=9, height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def write_sound(path, seconds, rate=16000):
    samples = (8000 * np.sin(np.arange(int(seconds * rate)) * 0.17)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def decode_sound(path):
    command = [ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a:0", "-f", "s16le", "-ac", "1", "pipe:1"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<i2")


# --- frames in, frames out -------------------------------------------------------------------------------------------


def test_count_size_rate_and_format(tmp_path):
    path = tmp_path / "out.mp4"
    frames = noise(13)
    write_video(path, [frames[:1], frames[1:5], frames[5:]], fps=16)
    assert probe(path) == VideoInfo(64, 48, 16.0, 13, False, 13 / 16, "yuv420p")
    assert read_frames(path).shape == (13, 48, 64, 3)
    assert left(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("fps", [0.5, 23.976, 29.97, 60])
def test_fractional_rates(tmp_path, fps):
    write_video(tmp_path / "out.mp4", [noise(5)], fps=fps)
    info = probe(tmp_path / "out.mp4")
    assert info.num_frames == 5
    assert info.fps == pytest.approx(fps, rel=1e-6)


def test_single_frame(tmp_path):
    write_video(tmp_path / "out.mp4", [noise(1)], fps=16)
    assert len(read_frames(tmp_path / "out.mp4")) == 1


def test_order_of_frames(tmp_path):
    grey = np.repeat(np.arange(0, 250, 10, dtype=np.uint8), 32 * 32 * 3).reshape(25, 32, 32, 3)
    write_video(tmp_path / "out.mp4", [grey], fps=16)
    assert np.abs(read_frames(tmp_path / "out.mp4").mean((1, 2, 3)) - grey[:, 0, 0, 0]).max() < 2


def test_colors_come_back(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 150, 120)]
    patches = [np.broadcast_to(np.array(color, np.uint8), (4, 64, 16, 3)) for color in colors]
    write_video(tmp_path / "out.mp4", [np.concatenate(patches, axis=2)], fps=16)
    centers = read_frames(tmp_path / "out.mp4")[2, 32, 8::16]  # (7, 3)
    assert np.abs(centers.astype(int) - colors).max() <= 3
    banner = subprocess.run([ffmpeg_exe(), "-hide_banner", "-i", tmp_path / "out.mp4"], capture_output=True, text=True)
    assert "yuv420p(tv, bt709, progressive)" in banner.stderr  # matrix, primaries and transfer, not the matrix alone


@pytest.mark.parametrize("quality", [1, 5, 10])
def test_any_quality_keeps_to_a_profile_that_players_know(tmp_path, quality):
    write_video(tmp_path / "out.mp4", [noise(3)], fps=16, quality=quality)
    banner = subprocess.run([ffmpeg_exe(), "-hide_banner", "-i", tmp_path / "out.mp4"], capture_output=True, text=True)
    assert "h264 (High) (avc1" in banner.stderr


def test_quality_is_imageios_rule(tmp_path):
    crfs = [VideoWriter(tmp_path / "x.mp4", fps=1, quality=quality).crf for quality in (1, 5, 8, 9, 9.5, 10)]
    assert crfs == [45, 25, 10, 5, 2, 1]


def test_index_comes_before_the_frames(tmp_path):
    write_video(tmp_path / "out.mp4", [noise()], fps=16)
    data, position, boxes = (tmp_path / "out.mp4").read_bytes(), 0, []
    while position < len(data):
        size = int.from_bytes(data[position : position + 4])
        boxes.append(data[position + 4 : position + 8])
        position += size
    assert position == len(data)
    assert boxes.index(b"moov") < boxes.index(b"mdat")


def test_same_frames_same_bytes(tmp_path):
    sound = write_sound(tmp_path / "sound.wav", 1)
    for name in ("a", "b"):
        path = tmp_path / name / "out.mp4"
        path.parent.mkdir()
        write_video(path, [noise(20)], fps=16, metadata=NASTY, audio_path=sound)
    for name in ("out.mp4", "out.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_chunks_do_not_matter(tmp_path):
    write_video(tmp_path / "a.mp4", [noise(8)], fps=16)
    write_video(tmp_path / "b.mp4", (noise(8)[i : i + 1] for i in range(8)), fps=16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63)])
def test_odd_sizes_are_padded_and_said(tmp_path, caplog, height, width):
    frames = np.full((3, height, width, 3), 200, np.uint8)
    with caplog.at_level(logging.WARNING, "selfsame"):
        write_video(tmp_path / "out.mp4", [frames[:2], frames[2:]], fps=16)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"frames of {width}x{height} become 64x48"
    ]
    assert np.abs(read_frames(tmp_path / "out.mp4").astype(int) - 200).max() <= 2  # the new edge too
    assert probe(tmp_path / "out.mp4").num_frames == 3


def test_wrong_frames_are_our_defect(tmp_path):
    with pytest.raises(ValueError, match="32x32 in a video of 64x48"):
        write_video(tmp_path / "out.mp4", [noise(), noise(1, 32, 32)], fps=16)
    with pytest.raises(ValueError, match="63x48 in a video of 64x48"):  # also when both would be padded to the same
        write_video(tmp_path / "out.mp4", [noise(), noise(1, 48, 63)], fps=16)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "out.mp4", [], fps=16)
    assert left(tmp_path) == []


@pytest.mark.parametrize("fps", [0, -1, 1e-9, float("nan"), float("inf"), 1e6])
def test_impossible_rate(tmp_path, fps):
    with pytest.raises(UsageError, match="fps"):
        VideoWriter(tmp_path / "out.mp4", fps=fps)


@pytest.mark.parametrize("quality", [0, 11, float("nan")])
def test_impossible_quality(tmp_path, quality):
    with pytest.raises(UsageError, match="quality"):
        VideoWriter(tmp_path / "out.mp4", fps=16, quality=quality)


# --- floats to bytes -------------------------------------------------------------------------------------------------


def test_rounding_in_closed_form():
    levels = torch.arange(256, dtype=torch.float32)
    for offset, expected in [(0, levels), (0.49, levels), (-0.49, levels), (0.51, (levels + 1).clamp(max=255))]:
        values = (levels + offset) / 127.5 - 1  # (256,)
        frames = frames_to_uint8(values.expand(1, 3, 1, 1, 256))
        assert frames.shape == (1, 1, 256, 3)
        assert np.array_equal(frames[0, 0, :, 1], expected.numpy().astype(np.uint8))


def test_clamping_nan_and_layout(caplog):
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("inf"), float("nan")])
    frames = torch.zeros(1, 3, 2, 1, 7)
    frames[0, 2, 1, 0] = values
    with caplog.at_level(logging.WARNING, "selfsame"):
        pixels = frames_to_uint8(frames)
    assert pixels[1, 0, :, 2].tolist() == [0, 0, 128, 255, 255, 255, 0]  # 127.5 rounds half to even
    assert (pixels[0] == 128).all()
    assert "NaN" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype):
    frames = torch.tensor([-1.0, 0.5, 1.0], dtype=dtype).expand(1, 3, 2, 4, 3)
    assert frames_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 191, 255]


def test_bytes_pass_through():
    assert frames_to_uint8(noise()) is not None
    assert np.array_equal(frames_to_uint8(torch.from_numpy(noise())), noise())
    for bad in (
        np.zeros((2, 8, 8), np.uint8),
        torch.zeros(2, 3, 1, 8, 8),
        torch.zeros(1, 8, 8, 3),
        np.zeros((1, 8, 8, 3), int),
    ):
        with pytest.raises(ValueError, match="must be"):
            frames_to_uint8(bad)


# --- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_inside_and_beside(tmp_path):
    write_video(tmp_path / "out.mp4", [noise()], fps=16, metadata={**NASTY, "path": Path("a/b")})
    expected = {**NASTY, "path": "a/b"}
    assert left(tmp_path) == ["out.json", "out.mp4"]
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == expected
    assert "男の子 😀" in (tmp_path / "out.json").read_text(encoding="utf-8")  # readable, not escaped
    shutil.move(tmp_path / "out.mp4", tmp_path / "alone.mp4")
    assert read_metadata(tmp_path / "alone.mp4") == expected


def test_metadata_from_the_record_beside(tmp_path):
    write_video(tmp_path / "out.mp4", [noise()], fps=16)
    with pytest.raises(InputError, match="out.mp4 carries no record"):
        read_metadata(tmp_path / "out.mp4")
    (tmp_path / "out.json").write_text('{"seed": 3}')
    assert read_metadata(tmp_path / "out.mp4") == {"seed": 3}


def test_bad_metadata_fails_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        VideoWriter(tmp_path / "out.mp4", fps=16, metadata={"loss": float("nan")})


# --- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.4, 1.5, 4])
def test_sound_is_as_long_as_the_video(tmp_path, seconds):
    sound = write_sound(tmp_path / "-i odd:name.wav", seconds)
    write_video(tmp_path / "out.mp4", [noise(24)], fps=16, audio_path=sound)
    info = probe(tmp_path / "out.mp4")
    assert info.has_audio
    assert info.num_frames == 24
    samples = decode_sound(tmp_path / "out.mp4")
    assert abs(len(samples) - 1.5 * 16000) <= 1024  # one AAC frame
    loud = np.flatnonzero(np.abs(samples) > 1000)
    assert loud[0] < 100  # in step from the start
    assert abs(loud[-1] - min(seconds, 1.5) * 16000) <= 1024


def test_no_sound_to_be_had(tmp_path):
    write_video(tmp_path / "mute.mp4", [noise()], fps=16)
    for audio_path in (tmp_path / "mute.mp4", tmp_path / "missing.wav", tmp_path, Path(__file__)):
        with pytest.raises(InputError):
            VideoWriter(tmp_path / "out.mp4", fps=16, audio_path=audio_path)


# --- whole or not at all ---------------------------------------------------------------------------------------------


def failing_chunks(error):
    yield noise()
    yield noise()
    raise error


@pytest.mark.parametrize("error", [RuntimeError("decoder"), KeyboardInterrupt(), SystemExit(1)])
def test_failure_in_the_middle_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write_video(tmp_path / "out.mp4", failing_chunks(error), fps=16, metadata=NASTY)
    assert left(tmp_path) == []


def test_failure_leaves_the_old_video(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"old video")
    (tmp_path / "out.json").write_bytes(b"old record")
    with pytest.raises(RuntimeError):
        write_video(tmp_path / "out.mp4", failing_chunks(RuntimeError()), fps=16, metadata=NASTY)
    assert left(tmp_path) == ["out.json", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old video"
    assert (tmp_path / "out.json").read_bytes() == b"old record"
    write_video(tmp_path / "out.mp4", [noise()], fps=16, metadata=NASTY)
    assert read_metadata(tmp_path / "out.mp4") == NASTY


SLOW_WRITER = """
    import sys, time, numpy as np
    from preprocess.video_writer import VideoWriter
    with VideoWriter(sys.argv[1], fps=16, metadata={"a": 1}) as video:
        for i in range(1000):
            video.write(np.full((4, 48, 64, 3), i % 256, np.uint8))
            print(i, flush=True)
            time.sleep(0.02)
"""


def slow_writer(path):
    code = textwrap.dedent(SLOW_WRITER)
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    return process


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_nothing(tmp_path):
    process = slow_writer(tmp_path / "out.mp4")
    assert left(tmp_path) == [".out.part.ffmetadata", ".out.part.mp4"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert left(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_kill_leaves_no_video_and_the_next_run_cleans_up(tmp_path):
    process = slow_writer(tmp_path / "out.mp4")
    with pytest.raises(UsageError, match="another run is writing"), VideoWriter(tmp_path / "out.mp4", fps=16):
        pass
    process.kill()
    process.communicate(timeout=20)
    time.sleep(0.5)  # ffmpeg ends by itself when its input does
    assert left(tmp_path) == [".out.part.ffmetadata", ".out.part.mp4"]
    write_video(tmp_path / "out.mp4", [noise(3)], fps=16)
    assert left(tmp_path) == ["out.mp4"]
    assert probe(tmp_path / "out.mp4").num_frames == 3


def test_refused_second_writer_does_no_harm(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", fps=16) as first:
        first.write(noise(4))
        with pytest.raises(UsageError, match="another run"), VideoWriter(tmp_path / "out.mp4", fps=16):
            pass
        first.write(noise(4))
    assert probe(tmp_path / "out.mp4").num_frames == 8


# --- no room ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited_ffmpeg(tmp_path_factory, monkeypatch):
    """ffmpeg whose files may have so many KiB; beyond, writing fails as on a full disk (with EFBIG for ENOSPC)."""

    def limit(kib):
        wrapper = tmp_path_factory.mktemp("bin") / "ffmpeg"
        wrapper.write_text(f"#!/bin/bash\ntrap '' XFSZ\nulimit -f {kib}\nexec '{real}' \"$@\"\n")
        wrapper.chmod(0o755)
        monkeypatch.setattr(video_file, "ffmpeg_exe", lambda: str(wrapper))

    real = ffmpeg_exe()
    return limit


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
@pytest.mark.parametrize("kib", [1, 100])
def test_disk_full_while_writing(tmp_path, limited_ffmpeg, kib):
    limited_ffmpeg(kib)
    with pytest.raises(
        ResourceError, match="stopped while writing .*out.mp4 .*free there.*: .*File too large; free"
    ) as e:
        write_video(tmp_path / "out.mp4", (noise(seed=i) for i in range(40)), fps=16, metadata=NASTY)
    assert "\n" not in str(e.value)
    assert left(tmp_path) == []


def test_ffmpeg_dies(tmp_path):
    with pytest.raises(ResourceError, match="exit status -9"), VideoWriter(tmp_path / "out.mp4", fps=16) as video:
        video.write(noise())
        video._ffmpeg.kill()
        for i in range(1000):
            video.write(noise(seed=i))
    assert left(tmp_path) == []


def test_no_room_for_the_sound(tmp_path, monkeypatch):
    sound = write_sound(tmp_path / "sound.wav", 1)

    def full(*arguments):
        Path(arguments[-1].removeprefix("file:")).write_bytes(b"half")
        return subprocess.CompletedProcess(arguments, 228, b"", b"[out#0/mp4 @ 0x5] Error: No space left on device\n")

    monkeypatch.setattr(video_file, "run_ffmpeg", full)
    with pytest.raises(ResourceError, match="out.mp4 .*: Error: No space left on device; free some disk"):
        write_video(tmp_path / "out.mp4", [noise()], fps=16, metadata=NASTY, audio_path=sound)
    assert left(tmp_path) == ["sound.wav"]


def test_no_room_for_the_record(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_video(tmp_path / "out.mp4", [noise()], fps=16, metadata=NASTY)
    assert left(tmp_path) == []


def test_free_disk_is_checked(tmp_path, monkeypatch):
    free_disk_or_error(tmp_path / "not" / "yet" / "out.mp4", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 3 * 2**20))
    free_disk_or_error(tmp_path / "out.mp4", 3 * 2**20)
    with pytest.raises(ResourceError, match=r"out.mp4 needs about 1.5 GiB of disk, .* has 3 MiB free"):
        free_disk_or_error(tmp_path / "out.mp4", 3 * 2**29)


# --- where to write --------------------------------------------------------------------------------------------------


def refused(path, match, **settings):
    with pytest.raises(UsageError, match=match) as error:
        resolve_output(path, overwrite=settings.pop("overwrite", False), **settings)
    assert str(error.value).startswith("--output")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_good_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_output("bare.mp4", overwrite=False) == tmp_path / "bare.mp4"
    assert resolve_output("a/b/c.MP4", overwrite=False) == tmp_path / "a/b/c.MP4"
    assert resolve_output("~/v.mp4", overwrite=False) == tmp_path / "home/v.mp4"
    assert resolve_output("😀 男.png", overwrite=False, extension=".png") == tmp_path / "😀 男.png"
    assert left(tmp_path) == ["a", "home"]  # folders are made, files are not


def test_existing_file_needs_the_flag(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"old")
    refused(tmp_path / "out.mp4", r"out.mp4 exists; .*--overwrite")
    assert resolve_output(tmp_path / "out.mp4", overwrite=True) == tmp_path / "out.mp4"
    (tmp_path / "out.mp4").rename(tmp_path / "config.json")
    refused(tmp_path / "config.mp4", r"config.json \(the record .*\) exists; .*--overwrite")
    assert (tmp_path / "config.json").read_bytes() == b"old"


def test_folder_given(tmp_path):
    refused(tmp_path, "is a folder; give a file in it")
    refused(f"{tmp_path}/new/", "is a folder; give a file in it, .*new/video.mp4")
    (tmp_path / "x.mp4").mkdir()
    refused(tmp_path / "x.mp4", "is a folder", overwrite=True)


@pytest.mark.parametrize("path", ["", "  ", "a\0b.mp4"])
def test_no_name(path):
    refused(path, "give a file name such as video.mp4")


@pytest.mark.parametrize("name", ["video", "video.avi", "video.mp4.txt", ".mp4"])
def test_wrong_extension(tmp_path, name):
    refused(tmp_path / name, r"must end in \.mp4")


@pytest.mark.parametrize("name", ["CON.mp4", "nul.mp4", "Com1.x.mp4", "aux .mp4"])
def test_reserved_names(tmp_path, name):
    refused(tmp_path / name, "device name")


def test_long_names(tmp_path):
    refused(tmp_path / ("x" * 296 + ".mp4"), "too long: a name may have 240 bytes")
    refused(tmp_path / ("字" * 90 + ".mp4"), "too long")  # bytes count, not characters
    refused("/".join([str(tmp_path)] + ["y" * 100] * 50 + ["v.mp4"]), "too long")
    longest = resolve_output(tmp_path / ("x" * 236 + ".mp4"), overwrite=False)
    write_video(longest, [noise(2)], fps=16, metadata={"a": 1})
    assert len(left(tmp_path)) == 2


def test_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    assert resolve_output(tmp_path / "folder" / "out.mp4", overwrite=False).name == "out.mp4"
    for target in ("real/there.mp4", "nowhere.mp4"):
        link = tmp_path / "link.mp4"
        link.symlink_to(tmp_path / target)
        for overwrite in (False, True):
            refused(link, "is a link to", overwrite=overwrite)
        link.unlink()


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "out.mp4", "cannot write in")
    tmp_path.chmod(0o555)
    if not os.access(tmp_path, os.W_OK):  # root may write anywhere
        refused(tmp_path / "out.mp4", r"cannot write in .*\(Permission denied\)")
    tmp_path.chmod(0o755)

    def refuse(error):
        def temporary_file(**arguments):
            raise error

        monkeypatch.setattr(video_file.tempfile, "TemporaryFile", temporary_file)

    refuse(OSError(30, "Read-only file system"))
    refused(tmp_path / "out.mp4", r"cannot write in .*\(Read-only file system\)")
    refuse(OSError(28, "No space left on device"))
    with pytest.raises(ResourceError, match="no space left"):
        resolve_output(tmp_path / "out.mp4", overwrite=False)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_not_a_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "no plain file", overwrite=True)


@pytest.mark.parametrize(
    "text",
    [
        *("../../etc/passwd", "/etc/passwd", "..", ".", "", "a\\..\\b", "C:\\x", "con", "NUL", "-rf *", "a\0b", "\n"),
        *("😀🔥", "x" * 300, "字" * 300, "e\u0301" * 300, "\udcff", "\u202egpj.exe", "~root", "$(rm)", "a/b" * 100),
    ],
)
def test_safe_names(tmp_path, text):
    name = safe_name(text)
    path = (tmp_path / f"{name}.mp4").resolve()
    assert os.path.commonpath([path, tmp_path.resolve()]) == str(tmp_path.resolve())
    assert path.parent == tmp_path.resolve()
    assert 0 < len(name.encode()) <= 86  # the limit, and "video_" before a device name
    assert all(unicodedata.category(c)[0] in "LMN" or c in "-_" for c in name)
    assert not name.startswith("-")
    assert resolve_output(path, overwrite=False) == path


def test_safe_names_keep_what_they_can():
    assert safe_name("A man, reading: “Война и мир” 😀!") == "A_man_reading_Война_и_мир"
    assert safe_name("नमस्ते दुनिया") == "नमस्ते_दुनिया"
    assert safe_name("") == safe_name("///") == "video"
    assert safe_name("con") == "video_con"
    assert safe_name("abcdefghij", limit=8) == "abcdefgh"


# --- reading what others wrote ---------------------------------------------------------------------------------------


def test_rotated_video(tmp_path):
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255  # one white corner
    write_video(tmp_path / "out.mp4", [frames], fps=16)
    turned = [ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", tmp_path / "out.mp4", "-c", "copy"]
    subprocess.run([*turned, tmp_path / "turned.mp4"], check=True)
    assert (probe(tmp_path / "turned.mp4").width, probe(tmp_path / "turned.mp4").height) == (48, 64)
    expected = np.rot90(frames, 1, (1, 2))  # (3, 64, 48, 3)
    assert np.abs(read_frames(tmp_path / "turned.mp4").astype(int) - expected)[:, 8::16, 8::16].max() <= 3


def test_unreadable_videos(tmp_path):
    write_video(tmp_path / "good.mp4", [noise(40)], fps=16)
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("<html>404</html>" * 100)
    (tmp_path / "text.txt").write_text("ffmpeg would draw this" * 100)
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    write_sound(tmp_path / "sound.wav", 1)
    for name in ("empty.mp4", "text.mp4", "text.txt", "cut.mp4", "sound.wav", "missing.mp4", "."):
        with pytest.raises(InputError) as error:
            read_frames(tmp_path / name)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
