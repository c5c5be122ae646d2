"""Videos as users have them: each is read as its author meant it, and what had to be changed is said."""

import gc
import logging
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

import preprocess.ffmpeg as ffmpeg_module
import preprocess.video as video
from errors import InputError
from preprocess import control
from preprocess.audio import read_audio
from preprocess.ffmpeg import ffmpeg_exe, probe_streams, run_ffmpeg
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames, stream_frames
from preprocess.video_conversion import StreamFormat, constant_rate
from preprocess.video_writer import write_video
from tests.test_video_file import decode_sound, noise

LOSSLESS = ["-c:v", "libx264", "-qp", "0"]


def ffmpeg(*arguments, data=None) -> bytes:
    command = [ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def encode(path, frames, *flags, pix_fmt="gray", rate=10, filters="null") -> Path:
    """Store planes of samples as they are."""
    height, width = frames.shape[1:3]
    raw = ["-f", "rawvideo", "-pix_fmt", pix_fmt, "-s", f"{width}x{height}", "-r", rate, "-i", "pipe:0"]
    ffmpeg(*raw, "-vf", filters, *(flags or LOSSLESS), path, data=frames.tobytes())
    return path


def decoded(path) -> np.ndarray:
    """What ffmpeg gives without any conversion but to RGB."""
    flags = "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    data = ffmpeg("-i", path, "-fps_mode", "passthrough", "-vf", flags, "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1")
    info = probe(path)
    return np.frombuffer(data, np.uint8).reshape(-1, info.height, info.width, 3)


def levels(count, height=32, width=32) -> np.ndarray:
    """Frame i is grey of level 5 i."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 5, height * width).reshape(count, height, width)


# --- a usual video is left alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("b-frames.mp4", ["-c:v", "libx264", "-bf", "3"]),
        ("milliseconds.mkv", ["-c:v", "libx264"]),
        ("broadcast.ts", ["-c:v", "libx264"]),
        ("old.avi", ["-c:v", "mpeg4", "-bf", "2"]),
        ("hidden-frames.webm", ["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "10"]),
    ],
)
def test_every_stored_frame_comes_once_and_as_decoded(tmp_path, caplog, name, flags):
    frames = noise(40).repeat(2, 0)  # compressible, so that B-frames are used
    path = encode(tmp_path / name, frames, *flags, "-pix_fmt", "yuv420p", pix_fmt="rgb24", rate="30000/1001")
    with caplog.at_level(logging.INFO, "selfsame"):
        read = read_frames(path)
    assert (read == decoded(path)).all()
    info = probe(path)
    assert info.num_frames == len(read) == 80
    assert info.fps == pytest.approx(30000 / 1001, rel=1e-3)  # containers round times to milliseconds
    assert not caplog.text


def test_frames_that_a_cut_hides_are_not_counted(tmp_path):
    """Cut without encoding anew: the file starts at a key frame, its edit list says from where on it is shown."""
    encode(tmp_path / "long.mp4", levels(50), "-c:v", "libx264", "-qp", "0", "-g", "25")
    ffmpeg("-ss", 3.5, "-i", tmp_path / "long.mp4", "-c", "copy", tmp_path / "cut.mp4")
    info = probe(tmp_path / "cut.mp4")
    assert (info.num_frames, info.duration) == (15, 1.5)
    assert np.abs(read_frames(tmp_path / "cut.mp4")[:, 0, 0, 0].astype(int) - levels(50)[35:, 0, 0]).max() <= 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_one_frame(tmp_path, suffix):
    codec = ["-c:v", "libvpx-vp9", "-lossless", "1"] if suffix == ".webm" else LOSSLESS
    path = encode(tmp_path / f"one{suffix}", levels(3)[2:], *codec)
    info = probe(path)
    assert info.num_frames == 1
    assert info.fps == pytest.approx(10, abs=0.01)
    assert read_frames(path).shape == (1, 32, 32, 3)


def test_odd_size_and_no_sound(tmp_path):
    path = encode(tmp_path / "odd.mp4", noise(3, 47, 63), *LOSSLESS, "-pix_fmt", "yuv444p", pix_fmt="rgb24")
    assert read_frames(path).shape == (3, 47, 63, 3)
    assert not probe(path).has_audio


@pytest.mark.parametrize("movflags", ["+faststart", "0", "+frag_keyframe+empty_moov"])
def test_cut_off_files_are_refused_before_anything_is_begun(tmp_path, movflags):
    whole = encode(tmp_path / "whole.mp4", noise(30), "-movflags", movflags, pix_fmt="rgb24").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    for read in (probe, read_frames):
        with pytest.raises(InputError, match="cut.mp4") as error:
            read(tmp_path / "cut.mp4")
        assert "\n" not in str(error.value)


def test_an_abandoned_stream_ends_its_ffmpeg(tmp_path, monkeypatch):
    path = encode(tmp_path / "in.mp4", levels(50))
    processes = []
    popen = subprocess.Popen
    record = lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1]  # noqa: E731
    monkeypatch.setattr(video.subprocess, "Popen", record)
    stream = stream_frames(path)
    assert next(stream).shape == (32, 32, 3)
    assert processes[-1].poll() is None
    del stream
    gc.collect()
    assert processes[-1].poll() is not None


# --- variable rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_constant_rate_shows_what_the_video_shows_at_the_middle_of_each_frame(seed):
    random = np.random.default_rng(seed)
    durations = random.choice([1, 2, 3, 7], 40) / 30
    times = np.concatenate([[0], durations.cumsum()])
    fps = len(durations) / times[-1]
    shown = np.repeat(np.arange(40), constant_rate(times[:-1] + 5.0, fps))
    assert len(shown) == 40
    for place, frame in enumerate(shown):
        middle = (place + 0.5) / fps
        assert times[frame] - 1e-4 <= middle <= times[frame + 1] + 1e-4


def test_small_jitter_changes_nothing():
    jitter = np.random.default_rng(0).uniform(-0.4, 0.4, 100)
    assert (constant_rate((np.arange(100) + jitter - jitter[0] * (np.arange(100) == 0)) / 25, 25) == 1).all()
    pulldown = np.cumsum([0] + [2 / 60, 3 / 60] * 50)[:100]  # film on 60 fields a second
    assert (constant_rate(pulldown, 24) == 1).all()


def variable_rate(path) -> Path:
    """One second at 10 frames, one at 30: levels 0, 5, 10, …; frame 19, at 1.3 s, is white."""
    frames = levels(40)
    frames[19] = 255
    flags = ["-fps_mode", "vfr", "-enc_time_base", "1/3000", *LOSSLESS]
    times = "settb=1/3000,setpts='if(lt(N,10),N/10,1+(N-10)/30)/TB'"
    return encode(path, frames, *flags, rate=30, filters=times)


def test_a_variable_rate_becomes_its_mean_and_says_so(tmp_path, caplog):
    path = variable_rate(tmp_path / "vfr.mp4")
    info = probe(path)
    assert (info.num_frames, info.fps, info.duration) == (40, 20, 2)
    with caplog.at_level(logging.INFO, "selfsame"):
        read = read_frames(path)[:, 0, 0, 0].astype(int)
    middles = (np.arange(40) + 0.5) / 20
    due = np.where(middles < 1, np.floor(middles * 10), 10 + np.floor((middles - 1) * 30 + 1e-6)).astype(int)
    expected = levels(40)[:, 0, 0].astype(int)
    expected[19] = 255
    assert np.abs(read - expected[due]).max() <= 2
    assert "vfr.mp4 has a variable frame rate: read at its mean of 20 a second, 10 of 40 frames left" in caplog.text


def test_a_control_map_of_it_has_its_frames_rate_and_length(tmp_path):
    path = variable_rate(tmp_path / "vfr.mp4")
    output = tmp_path / "gray.mp4"
    control.main(control.parse_arguments(["gray", "--video", str(path), "--output", str(output)]))
    made = probe(output)
    assert (made.num_frames, made.fps, made.duration) == (40, 20, 2)
    assert np.abs(read_frames(output).astype(int) - read_frames(path)).max() <= 3


@pytest.mark.parametrize("late", [0.0, 0.6])
def test_picture_and_sound_stay_together(tmp_path, late):
    """A click with the white frame; the picture may begin later than the sound."""
    click = f"aevalsrc=if(between(t\\,{1.3 + late}\\,{1.34 + late})\\,0.9\\,0):s=16000:d={2 + late}"
    variable_rate(tmp_path / "silent.mp4")
    sources = ["-itsoffset", late, "-i", tmp_path / "silent.mp4", "-f", "lavfi", "-i", click]
    ffmpeg(*sources, "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", tmp_path / "vfr.mp4")
    info = probe(tmp_path / "vfr.mp4")
    assert info.start == pytest.approx(late, abs=0.002)
    output, sound = tmp_path / "out.mp4", tmp_path / "vfr.mp4"
    write_video(output, [read_frames(sound)], fps=info.fps, audio_path=sound, audio_start=info.start)
    made = probe(output)
    assert (made.num_frames, made.fps, made.duration) == (40, 20, 2)
    white = np.flatnonzero(read_frames(output)[:, 0, 0, 0] > 240)[0] / 20
    loud = np.flatnonzero(np.abs(decode_sound(output)) > 8000)[0] / 16000
    assert abs(loud - white) < 0.5 / 20 + 0.01
    assert abs(len(decode_sound(output)) / 16000 - 2) < 0.07  # one AAC frame


# --- interlaced ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_fields_become_whole_frames(tmp_path, caplog, first):
    """A bar moves to the right by 4 pixels a field: where the fields meet it is combed."""
    fields = np.full((24, 64, 128), 40, np.uint8)
    for time, field in enumerate(fields):
        field[:, 10 + 4 * time : 26 + 4 * time] = 200
    mine, other = (0, 1) if first == "tff" else (1, 0)  # the rows of the field that comes first
    stored = np.empty((12, 64, 128), np.uint8)
    stored[:, mine::2], stored[:, other::2] = fields[0::2, mine::2], fields[1::2, other::2]
    chroma = np.full((12, 64, 64), 128, np.uint8).reshape(12, -1)
    planes = np.concatenate([stored.reshape(12, -1), chroma[:, : 2 * 32 * 64]], axis=1)
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", "128x64", "-r", 25, "-i", "pipe:0"]
    path = tmp_path / "fields.mp4"
    flags = [*LOSSLESS, "-flags", "+ildct+ilme", "-x264-params", f"{first}=1"]
    ffmpeg(*raw, "-vf", f"setfield={first}", *flags, path, data=planes.tobytes())

    combed = decoded(path).astype(int)
    with caplog.at_level(logging.INFO, "selfsame"):
        read = read_frames(path).astype(int)
    assert "fields.mp4 is interlaced: each pair of fields becomes one whole frame (bwdif)" in caplog.text
    assert read.shape == (12, 64, 128, 3)
    assert probe(path).fps == 25
    assert (read[:, mine::2] == combed[:, mine::2]).all()  # the first field's rows stay, the others are made for it
    steps = np.abs(np.diff(read, axis=1)).mean()
    assert np.abs(np.diff(combed, axis=1)).mean() > 10
    assert steps < 1


# --- more than 8 bits, HDR -------------------------------------------------------------------------------------------


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084: cd/m² -> signal 0 to 1."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    y = (light / 10000) ** m1
    return ((c1 + c2 * y) / (1 + c3 * y)) ** m2


def hlg(light: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100: cd/m² on a display of 1000 -> the scene's light by the inverse OOTF -> signal 0 to 1."""
    display = light / 1000
    luminance = display @ [0.2627, 0.6780, 0.0593]
    scene = display * (luminance ** (1 / 1.2 - 1))[..., None]
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def hdr_file(path, signal: np.ndarray, transfer: str) -> Path:
    """R'G'B' of BT.2020 (P, 3) as patches of 32x32 in a 10-bit HEVC file."""
    r, g, b = np.moveaxis(signal, -1, 0)
    y = 0.2627 * r + 0.6780 * g + 0.0593 * b
    ycc = np.stack([64 + 876 * y, 512 + 896 * (b - y) / 1.8814, 512 + 896 * (r - y) / 1.4746])
    planes = np.rint(ycc).astype("<u2").repeat(32, 1)[:, None].repeat(32, 1)  # (3, 32, 32 P)
    data = np.stack([planes] * 3)  # three frames
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv444p10le", "-s", f"{data.shape[3]}x32", "-r", 10, "-i", "pipe:0"]
    tags = f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc:range=limited"
    filters = f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}:range=tv"
    ffmpeg(
        *(*raw, "-vf", filters, "-c:v", "libx265", "-pix_fmt", "yuv444p10le"),
        *("-x265-params", f"lossless=1:log-level=none:{tags}", path),
        data=data.tobytes(),
    )
    return path


PATCHES = np.array(  # cd/m² of red, green and blue, BT.2020
    [[0.1, 0.1, 0.1], [5, 5, 5], [25, 25, 25], [100, 100, 100], [203, 203, 203], [600, 600, 600]]
    + [[40, 25, 18], [20, 60, 30], [15, 20, 70], [300, 240, 200]],
    float,
)


def tone_mapped(light: np.ndarray) -> np.ndarray:
    """cd/m² of BT.2020 -> 8-bit R'G'B' of BT.709; the peak where a file names none is 1000 cd/m²."""
    to_709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    x = light / 100 @ np.transpose(to_709)
    highest = np.maximum(x.max(axis=-1, keepdims=True), 1e-6)
    j, peak = 0.3, 10.0  # mobius: a straight line to j, then bent so that the peak becomes 1
    a = -(j**2) * (peak - 1) / (j**2 - 2 * j + peak)
    b = (j**2 - 2 * j * peak + peak) / (peak - 1)
    bent = (b**2 + 2 * b * j + j**2) / (b - a) * (highest + a) / (highest + b)
    x = x * np.where(highest > j, bent, highest) / highest
    return 255 * np.clip(x, 0, 1) ** (1 / 2.4)


@pytest.mark.parametrize(("transfer", "curve", "name"), [("smpte2084", pq, "PQ"), ("arib-std-b67", hlg, "HLG")])
def test_hdr_is_tone_mapped(tmp_path, caplog, transfer, curve, name):
    path = hdr_file(tmp_path / "hdr.mp4", curve(PATCHES), transfer)
    with caplog.at_level(logging.INFO, "selfsame"):
        read = read_frames(path)
    assert read.shape == (3, 32, 32 * len(PATCHES), 3)
    assert f"hdr.mp4 is HDR ({name}): tone-mapped to BT.709" in caplog.text
    assert "hdr.mp4 has more than 8 bits a sample (yuv444p10le): rounded to 8" in caplog.text
    np.testing.assert_allclose(read[1, 16, 16::32], tone_mapped(PATCHES), atol=3)


def test_wide_colors_of_sdr_are_converted(tmp_path, caplog):
    """What is within BT.709 looks the same: its colours, stored by BT.2020's primaries, come back."""
    wanted = np.array([[200, 120, 90], [60, 140, 70], [128, 128, 128], [250, 250, 250]])
    from_709 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    signal = ((wanted / 255) ** 2.4 @ np.transpose(from_709)) ** (1 / 2.4)
    path = hdr_file(tmp_path / "wide.mp4", signal, "bt2020-10")
    with caplog.at_level(logging.INFO, "selfsame"):
        read = read_frames(path)
    np.testing.assert_allclose(read[0, 16, 16::32], wanted, atol=2)
    assert "wide.mp4 has wide colours (bt2020): converted to BT.709" in caplog.text


def test_ten_bits_are_rounded(tmp_path, caplog):
    samples = np.arange(0, 1000, 5, dtype="<u2")
    planes = np.broadcast_to(samples, (3, 32, 200)).copy()
    flags = ["-c:v", "libx265", "-x265-params", "lossless=1:log-level=none", "-pix_fmt", "yuv420p10le"]
    path = encode(tmp_path / "ten.mp4", planes, *flags, pix_fmt="gray10le")
    with caplog.at_level(logging.INFO, "selfsame"):
        read = read_frames(path)[1, 16]  # (200, 3)
    np.testing.assert_allclose(read, (samples / 1023 * 255)[:, None].repeat(3, 1), atol=1.1)
    assert "ten.mp4 has more than 8 bits a sample (yuv420p10le): rounded to 8" in caplog.text


def test_an_ffmpeg_without_the_filters_says_what_comes_of_it(tmp_path, caplog, monkeypatch):
    path = hdr_file(tmp_path / "hdr.mp4", pq(PATCHES), "smpte2084")
    assert video.has_filter("zscale")
    assert not video.has_filter("no_such_filter")
    monkeypatch.setattr(video, "has_filter", lambda name: name != "zscale")
    with caplog.at_level(logging.INFO, "selfsame"):
        flat = read_frames(path)
    assert "hdr.mp4 is HDR (PQ), and this ffmpeg has no zscale: colours will look flat" in caplog.text
    assert (flat == decoded(path)).all()


def test_what_the_banner_says():
    line = "  Stream #0:0[0x1](eng): Video: {}, 720x576 [SAR 64:45 DAR 16:9], 5 kb/s, 25 fps"
    mpeg2 = StreamFormat.from_banner(line.format("mpeg2video (Main), yuv420p(tv, smpte170m/bt470bg/bt709, top first)"))
    assert mpeg2 == StreamFormat("yuv420p", True, "smpte170m", "bt470bg", "bt709", "64:45")
    swapped = StreamFormat.from_banner(line.format("dvvideo, yuv420p(tv, bottom coded first (swapped))"))
    assert swapped.interlaced
    assert not StreamFormat.from_banner(line.format("h264, yuv420p(tv, bt709, progressive)")).interlaced
    assert StreamFormat.from_banner(line.format("prores (HQ) (apch), yuv422p10le")).pix_fmt == "yuv422p10le"


def test_pixels_that_are_not_square_are_said(tmp_path, caplog):
    path = encode(tmp_path / "wide.mp4", levels(2), *LOSSLESS, filters="setsar=4/3")
    with caplog.at_level(logging.INFO, "selfsame"):
        read_frames(path)
    assert "wide.mp4 has pixels of 4:3 that are taken as square" in caplog.text
    assert run_ffmpeg("-i", path, "-f", "null", "-").returncode == 0


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat", "drawing.svg", "0%d.png", "x.wav"])
def test_a_media_file_opens_no_other(tmp_path, name):
    """Playlists and lists, by any name, and pictures that stand for others: what they name is never read."""
    secret = encode(tmp_path / "secret.mp4", levels(3), *LOSSLESS)
    texts = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile {secret.name}\n",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><image href="{secret}"/></svg>',
    }
    for kind in ("m3u8", "ffconcat") if name != "drawing.svg" else ("svg",):
        (tmp_path / name).write_text(texts[kind])
        for read in (probe, probe_streams, read_audio, read_metadata):
            with pytest.raises(InputError):
                read(tmp_path / name)


# --- frames too large ------------------------------------------------------------------------------------------------


def with_frames_of(path: Path, size: int, header: bool) -> Path:
    """An AVI of PNGs that say they are size x size; `header`: and it says so itself."""
    data = bytearray(path.read_bytes())
    at = data.find(b"IHDR")
    while at >= 0:
        data[at + 4 : at + 12] = struct.pack(">II", size, size)
        data[at + 17 : at + 21] = struct.pack(">I", zlib.crc32(data[at : at + 17]))
        at = data.find(b"IHDR", at + 1)
    if header:
        for name, offset in ((b"avih", 40), (b"strf", 12)):
            at = data.index(name) + offset
            data[at : at + 8] = struct.pack("<II", size, size)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [9000, 40_000])  # ffmpeg itself would take the smaller one
@pytest.mark.parametrize("header", [False, True], ids=["frames", "header"])
def test_a_frame_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, size, header):
    path = with_frames_of(encode(tmp_path / "a.avi", levels(3), "-c:v", "png"), size, header)
    for read in (probe, lambda path: next(stream_frames(path))):
        with pytest.raises(InputError, match=f"has frames of {size}x{size}, at most 67 megapixels are accepted"):
            read(path)


def test_a_size_in_the_header_is_enough(tmp_path, monkeypatch):
    """Of H.264 nothing is decoded to learn it."""
    encode(tmp_path / "a.mp4", levels(3, 64, 64))
    monkeypatch.setattr(ffmpeg_module, "MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(video, "run_ffmpeg", None)
    with pytest.raises(InputError, match="has frames of 64x64, at most 0 megapixels are accepted; make it smaller"):
        probe(tmp_path / "a.mp4")
