"""Sound files, time and loudness, against what ffmpeg was told to write and what the standards say."""

import itertools
import os
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from errors import InputError, UsageError
from preprocess.audio import (
    AudioTimeline,
    cut_samples,
    exact_fps,
    integrated_loudness,
    k_weighting,
    main,
    normalize_loudness,
    num_features,
    parse_arguments,
    read_audio,
    write_wav,
)
from preprocess.ffmpeg import run_ffmpeg

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / "assets" / "speech.wav"


def tone(hertz, seconds=1.0, rate=16000, peak=0.5):
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def ffmpeg(*arguments):
    result = run_ffmpeg("-y", *map(str, arguments))
    assert result.returncode == 0, result.stderr.decode()


def level(samples):
    """Of the strongest frequency: (hertz, amplitude), for one second at 16 kHz."""
    spectrum = np.abs(np.fft.rfft(samples[:16000] * np.hanning(16000))) / 4000
    return int(spectrum.argmax()), spectrum.max()


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "name, settings",
    [
        ("8khz.wav", ("-ar", "8000")),
        ("24bit.wav", ("-ar", "48000", "-c:a", "pcm_s24le")),
        ("float.wav", ("-ar", "44100", "-c:a", "pcm_f32le")),
        ("stereo.wav", ("-ar", "48000", "-af", "pan=stereo|c0=c0|c1=c0")),
        ("surround.wav", ("-ar", "48000", "-af", "pan=5.1|c0=c0|c1=c0|c2=c0|c3=c0|c4=c0|c5=c0")),
        ("a.mp3", ("-ar", "44100")),
        ("a.m4a", ("-ar", "44100")),
        ("a.ogg", ("-c:a", "libvorbis", "-ar", "44100")),
        ("a.opus", ("-ar", "48000")),
        ("a.flac", ()),
        ("an odd: näme.wav", ()),
    ],
)
def test_every_format_gives_the_same_samples(tmp_path, name, settings):
    source = tone(440, 1.5)
    write_wav(tmp_path / "source.wav", source, 16000)
    ffmpeg("-i", tmp_path / "source.wav", *settings, f"file:{tmp_path / name}")
    samples = read_audio(tmp_path / name)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 24000) <= 2
    hertz, amplitude = level(samples[4000:])
    assert hertz == 440
    assert amplitude == pytest.approx(0.5, rel=0.06)  # LAME writes 5 % less
    assert np.abs(samples[1000:23000] - source[1000:23000]).max() < 0.05  # in phase: nothing is late


def test_channels_are_averaged_and_never_added_up(tmp_path):
    left, right = tone(440, peak=0.8), tone(1000, peak=0.2)
    write_wav(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-4)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", channels=2), np.stack([left, right], 1), atol=1e-4)
    write_wav(tmp_path / "mono.wav", left, 16000)
    np.testing.assert_allclose(read_audio(tmp_path / "mono.wav", channels=2), np.stack([left, left], 1), atol=1e-4)


def test_resampling_keeps_speech_and_folds_nothing_back(tmp_path):
    for hertz, expected in ((100, 0.5), (3000, 0.5), (7000, 0.5), (9000, 0), (12000, 0)):
        write_wav(tmp_path / "a.wav", tone(hertz, 1.5, 48000), 48000)
        assert level(read_audio(tmp_path / "a.wav")[4000:])[1] == pytest.approx(expected, abs=2e-3), hertz


def test_sound_of_a_video_with_the_silence_before_it(tmp_path):
    write_wav(tmp_path / "a.wav", tone(440), 16000)
    picture = ("-f", "lavfi", "-i", "color=c=red:s=64x64:r=25:d=2")
    ffmpeg(*picture, "-itsoffset", "0.5", "-i", tmp_path / "a.wav", "-c:a", "pcm_s16le", tmp_path / "late.mkv")
    samples = read_audio(tmp_path / "late.mkv")
    assert not samples[:7900].any()
    assert level(samples[8000:])[0] == 440
    ffmpeg(*picture, "-i", tmp_path / "a.wav", tmp_path / "a.mp4")
    assert level(read_audio(tmp_path / "a.mp4"))[0] == 440


def unusable(folder):
    """name -> what the message must say; the files are made."""

    def floats(name, value):
        samples = tone(440)
        samples[100] = value
        (folder / "raw").write_bytes(samples.tobytes())
        ffmpeg("-f", "f32le", "-ar", 16000, "-ac", 1, "-i", folder / "raw", "-c:a", "pcm_f32le", folder / name)

    floats("nan.wav", np.nan)
    floats("infinite.wav", np.inf)
    floats("loud.wav", 1e30)
    (folder / "text.wav").write_text("RIFF? No, only words.\n" * 50)
    (folder / "empty.wav").touch()
    write_wav(folder / "no_samples.wav", np.zeros(0), 16000)
    write_wav(folder / "short.wav", tone(440, 0.03), 16000)
    ffmpeg("-f", "lavfi", "-i", "color=c=red:s=64x64:r=25:d=1", folder / "mute.mp4")
    ffmpeg("-i", SPEECH, folder / "whole.m4a")
    (folder / "cut.m4a").write_bytes((folder / "whole.m4a").read_bytes()[:5000])
    return {
        "nan.wav": "NaN", "infinite.wav": "infinite", "loud.wav": "up to 1e+30",
        "text.wav": "ffmpeg can read", "empty.wav": "ffmpeg can read",
        "no_samples.wav": "0 s of sound", "short.wav": "0.03 s of sound; give 0.04 s", "mute.mp4": "no sound track",
        "cut.m4a": "ffmpeg can read", "none.wav": "missing", ".": "a folder",
    }  # fmt: skip


def test_what_cannot_be_used_is_said_with_its_argument(tmp_path):
    for name, words in unusable(tmp_path).items():
        with pytest.raises(InputError) as error:
            read_audio(tmp_path / name, argument="--speech")
        assert str(error.value).startswith(f"--speech {tmp_path}"), name
        assert words in str(error.value), name
        assert "\n" not in str(error.value)


def test_silence_and_damage_are_warned_of(tmp_path, caplog):
    write_wav(tmp_path / "silent.wav", np.zeros(16000), 16000)
    assert not read_audio(tmp_path / "silent.wav").any()
    assert "silent" in caplog.text
    ffmpeg("-i", SPEECH, tmp_path / "a.mp3")
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(data[: len(data) // 2] + b"no mp3 frame" * 50)
    assert len(read_audio(tmp_path / "b.mp3")) > 16000
    assert "damaged" in caplog.text


def test_written_wav_is_whole_or_absent(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([0.0, 1.0, -1.0, 2.0, 0.5]), 8000)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 5)
        assert np.frombuffer(file.readframes(5), "<i2").tolist() == [0, 32767, -32767, 32767, 16384]
    with pytest.raises(wave.Error):
        write_wav(tmp_path / "b.wav", np.zeros((4, 2)), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


# ------------------------------------------------------------------------------------------ the command


def test_extract_keeps_rate_and_channels(tmp_path):
    write_wav(tmp_path / "a.wav", np.stack([tone(440, rate=44100), tone(1000, rate=44100)], axis=1), 44100)
    ffmpeg("-f", "lavfi", "-i", "color=c=red:s=64x64:r=25:d=1", "-i", tmp_path / "a.wav", "-c:a", "pcm_s16le",
           tmp_path / "a.mkv")  # fmt: skip
    main(parse_arguments(["extract", str(tmp_path / "a.mkv"), "--output", str(tmp_path / "b.wav")]))
    assert (tmp_path / "b.wav").read_bytes()[44:] == (tmp_path / "a.wav").read_bytes()[44:]
    with pytest.raises(UsageError, match="--overwrite"):
        main(parse_arguments(["extract", str(tmp_path / "a.mkv"), "--output", str(tmp_path / "b.wav")]))
    with pytest.raises(UsageError, match="must end in .wav"):
        main(parse_arguments(["extract", str(tmp_path / "a.mkv"), "--output", str(tmp_path / "b.mp3")]))


def test_extract_leaves_nothing_of_what_cannot_be_read(tmp_path):
    (tmp_path / "text.mp4").write_text("words " * 100)
    ffmpeg("-f", "lavfi", "-i", "color=c=red:s=64x64:r=25:d=1", tmp_path / "mute.mp4")
    for name in ("text.mp4", "mute.mp4", "none.mp4"):
        with pytest.raises(InputError, match=name):
            main(parse_arguments(["extract", str(tmp_path / name), "--output", str(tmp_path / "b.wav")]))
    assert not list(tmp_path.glob("*.wav"))
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize(
    "given, expected",
    [(25, 25), ("25", 25), (29.97, Fraction(30000, 1001)), ("30000/1001", Fraction(30000, 1001)),
     (23.976, Fraction(24000, 1001)), (59.94, Fraction(60000, 1001)), (12.5, Fraction(25, 2)), (30, 30),
     (29.97002997, Fraction(30000, 1001)), (Fraction(24000, 1001), Fraction(24000, 1001))],
)  # fmt: skip
def test_frame_rates_are_the_fractions_that_are_meant(given, expected):
    assert exact_fps(given) == expected


@pytest.mark.parametrize("given", ["fast", "", "1/0", 0, -25, float("nan"), float("inf"), 5000])
def test_what_is_no_frame_rate(given):
    with pytest.raises(UsageError, match="--fps"):
        exact_fps(given)


@pytest.mark.parametrize("fps", [10, 12.5, 16, 23.976, 24, 25, 29.97, 30, 50, 60])
def test_video_is_as_long_as_its_sound_to_half_a_frame(fps):
    for samples in (1600, 16000, 51840, 54399, 56000, 166860, 960_000, 3600 * 16000 + 7):
        timeline = AudioTimeline(samples, fps)
        difference = Fraction(timeline.num_frames) / exact_fps(fps) - Fraction(samples, 16000)
        assert abs(difference) <= Fraction(1, 2) / exact_fps(fps)
        decoded = 4 * (timeline.num_latent_frames - 1) + 1
        assert 0 <= decoded - timeline.num_frames <= 3


def test_frames_share_the_samples_out_without_gap_or_drift():
    timeline = AudioTimeline(30 * 60 * 16000, 29.97)
    ranges = [timeline.sample_range(frame, frame + 1) for frame in range(timeline.num_frames)]
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert {end - first for first, end in ranges} == {533, 534}  # 533.87
    assert ranges[30000][0] == 1001 * 16000  # after 1001 s


def test_upstreams_arithmetic_drifts_as_upstreams():
    half_an_hour = AudioTimeline(30 * 60 * 16000, 24, legacy=True)
    assert half_an_hour.samples_per_frame == 666
    assert half_an_hour.sample_range(0, 30 * 60 * 24)[1] / 16000 == pytest.approx(1800 - 1.8)
    assert AudioTimeline(53759, 25, legacy=True).num_frames == 81  # 83 whole frames, 4 * 20 + 1 are made
    assert AudioTimeline(53759, 25).num_frames == 84


def test_windows_hear_what_they_show():
    timeline = AudioTimeline(160_000, 25)
    assert timeline.window_samples(0, 21) == (0, 84 * 640)  # as upstream
    assert timeline.window_samples(0, 21, exact=True) == (0, 81 * 640)
    assert timeline.window_samples(16, 37, exact=True) == (64 * 640, 145 * 640)
    assert num_features(84 * 640) == 167
    assert num_features(81 * 640) == 161


def test_features_are_where_the_convolutions_look():
    """Each feature's place, against the samples that a chain of ones reaches."""
    timeline = AudioTimeline(16000, 25)
    kernel_and_stride = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
    first = last = feature = 7
    for kernel, stride in reversed(kernel_and_stride):
        first, last = first * stride, last * stride + kernel - 1
    center = Fraction(first + last + 1, 2)  # in samples
    frame = center / 640 - Fraction(1, 2)
    assert timeline.feature_at(frame) == feature
    assert num_features(last + 1) == feature + 1
    assert num_features(last) == feature
    assert num_features(100) == 0


def test_less_than_a_frame_is_refused():
    with pytest.raises(InputError, match="less than one frame of 10"):
        AudioTimeline(1599, 10)
    assert AudioTimeline(1600, 10).num_frames == 1


def test_samples_beyond_the_end_are_silence():
    samples = np.arange(1, 6, dtype=np.float32)
    assert cut_samples(samples, 1, 3).tolist() == [2, 3]
    assert cut_samples(samples, 3, 8).tolist() == [4, 5, 0, 0, 0]
    assert cut_samples(samples, 7, 9).tolist() == [0, 0]


# ------------------------------------------------------------------------------------------ loudness


def test_k_weighting_is_the_table_of_bs1770():
    (b1, a1), (b2, a2) = k_weighting(48000)
    np.testing.assert_allclose(b1, [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-10)
    np.testing.assert_allclose(a1, [1, -1.69065929318241, 0.73248077421585], atol=1e-10)
    np.testing.assert_allclose(b2, [1, -2, 1])
    np.testing.assert_allclose(a2, [1, -1.99004745483398, 0.99007225036621], atol=1e-10)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_loudness_of_ebu_tech_3341(rate):
    """Its cases 1 to 4 are stereo tones of 1 kHz; and a full-scale sine of one channel is -3.01 LUFS (BS.1770)."""

    def stereo(*parts):
        tones = [tone(1000, seconds, rate, 10 ** (decibels / 20)) for decibels, seconds in parts]
        return np.repeat(np.concatenate(tones)[:, None], 2, axis=1)

    assert integrated_loudness(stereo((-23, 20)), rate) == pytest.approx(-23, abs=0.1)
    assert integrated_loudness(stereo((-33, 20)), rate) == pytest.approx(-33, abs=0.1)
    assert integrated_loudness(stereo((-36, 10), (-23, 60), (-36, 10)), rate) == pytest.approx(-23, abs=0.1)
    assert integrated_loudness(stereo((-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)), rate) == pytest.approx(
        -23, abs=0.1
    )
    assert integrated_loudness(tone(997, 5, rate, 1.0), rate) == pytest.approx(-3.01, abs=0.05)


def test_normalized_speech_has_the_loudness_asked_for():
    speech = read_audio(SPEECH)
    louder = normalize_loudness(speech, 16000, -23)
    assert louder.dtype == np.float32
    assert integrated_loudness(louder, 16000) == pytest.approx(-23, abs=0.01)
    np.testing.assert_allclose(louder / louder[20000], speech / speech[20000], rtol=1e-4, atol=1e-5)
    assert integrated_loudness(normalize_loudness(speech[:3000], 16000), 16000) == pytest.approx(-23, abs=0.01)


def test_silence_has_no_loudness_and_stays():
    silence = np.zeros(16000, np.float32)
    assert normalize_loudness(silence, 16000) is silence


# ------------------------------------------------------------------------------------------ as a user runs it


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("extract", "text.mp4", "--output", "a.wav"), 3, "ffmpeg can read"),
        (("extract", "text.mp4", "--output", "a.mp3"), 2, "must end in .wav"),
        (("separate", "text.mp4", "--output", "a.wav"), 4, "download_models.py --only kim-vocal-2"),
        (("separate", "text.mp4"), 2, "--output"),
        (("extract", str(SPEECH), "--output", "a.wav"), 0, "a.wav written"),
    ],
)
def test_exit_codes(tmp_path, arguments, code, words):
    (tmp_path / "text.mp4").write_text("words " * 100)
    command = [sys.executable, "-m", "preprocess.audio", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert result.returncode == code
    assert words in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()
    assert (tmp_path / "a.wav").exists() == (code == 0)
