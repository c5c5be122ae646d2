"""Vocal separation with tiny networks of known effect."""

import wave

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from configs import load_config
from errors import WeightsError
from preprocess.audio import main, parse_arguments, write_wav
from preprocess.vocal_separation import SAMPLE_RATE, VocalSeparator, load_separator

SMALL = {"n_fft": 256, "hop_length": 64, "compensate": 1.0}  # of networks that take 100 bins and 33 frames


def network(path, gains, bins=100, frames=33):
    """A network that multiplies: by one number, or by (1, 4, bins, 1)."""
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, bins, frames]) for name in ("in", "out")
    )
    gains = numpy_helper.from_array(np.asarray(gains, np.float32), "gains")
    graph = helper.make_graph([helper.make_node("Mul", ["in", "gains"], ["out"])], "graph", [given], [made], [gains])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def chord(*hertz, seconds=0.5):
    """Stereo tones that fade in and out, so that nothing lies in the lowest or the highest frequencies."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    fade = np.sin(np.pi * time / seconds) ** 2
    left = sum(np.sin(2 * np.pi * f * time) for f in hertz)
    right = sum(np.sin(2 * np.pi * f * time + 1) for f in hertz)
    return (0.3 * fade[:, None] * np.stack([left, right], axis=1)).astype(np.float32)


def test_the_released_shape_is_rebuilt_exactly(tmp_path):
    """Kim_Vocal_2's sizes: a network that changes nothing gives the sound back, sections, fades and ends included."""
    settings = load_config("kim-vocal-2")["separator"] | {"compensate": 1.0}
    separator = VocalSeparator(network(tmp_path / "same.onnx", 1.0, 3072, 256), **settings)
    assert separator.section == 261_120
    mixture = chord(440, 3000, 12_000, seconds=8)
    np.testing.assert_allclose(separator(mixture), mixture, atol=1e-4)


@pytest.mark.parametrize("length", [1, 63, 2000, 2048, 2049, 12_345])
def test_any_length_comes_back(tmp_path, length):
    separator = VocalSeparator(network(tmp_path / "same.onnx", 1.0), **SMALL)
    mixture = chord(3000, 8000, seconds=12_345 / SAMPLE_RATE)[:length]
    vocals = separator(mixture)
    assert vocals.shape == mixture.shape
    np.testing.assert_allclose(vocals[:-300], mixture[:-300], atol=2e-3)  # the end is cut off sharply


def test_gain_and_compensation_multiply(tmp_path):
    mixture = chord(3000, 8000)
    half = VocalSeparator(network(tmp_path / "half.onnx", 0.5), **SMALL)(mixture)
    np.testing.assert_allclose(half, mixture / 2, atol=1e-3)
    compensated = VocalSeparator(tmp_path / "half.onnx", **SMALL | {"compensate": 1.5})(mixture)
    np.testing.assert_allclose(compensated, 1.5 * half, atol=1e-6)


def test_bins_and_channels_are_where_the_network_expects_them(tmp_path):
    """Removing bins removes their tones; zeros in the last two channels (right: real, imaginary) silence that side."""
    mixture = chord(3000) + chord(12_000)
    gains = np.ones((1, 4, 100, 1))
    gains[:, :, 12_000 // 172 - 6 :] = 0  # 172 Hz a bin
    low = VocalSeparator(network(tmp_path / "low.onnx", gains), **SMALL)(mixture)
    np.testing.assert_allclose(low, chord(3000), atol=5e-3)
    left = VocalSeparator(network(tmp_path / "left.onnx", np.array([1, 1, 0, 0]).reshape(1, 4, 1, 1)), **SMALL)(mixture)
    np.testing.assert_allclose(left[:, 0], mixture[:, 0], atol=1e-3)
    assert not left[:, 1].any()


def test_what_the_network_does_not_see_becomes_silent(tmp_path):
    separator = VocalSeparator(network(tmp_path / "same.onnx", 1.0), **SMALL)
    assert np.abs(separator(chord(20_000))).max() < 1e-3  # above the 100th bin, 17.2 kHz
    assert np.abs(separator(chord(10, seconds=2))).max() < 0.02  # rumble


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network(tmp_path / "half.onnx", 0.5, 3072, 256)
    mixture = chord(440, seconds=1)
    write_wav(tmp_path / "song.wav", mixture, SAMPLE_RATE)
    main(parse_arguments(["separate", "song.wav", "--output", "vocals.wav", "--model_path", "half.onnx"]))
    with wave.open("vocals.wav") as file:
        assert file.getparams()[:4] == (2, 2, SAMPLE_RATE, SAMPLE_RATE)
        vocals = np.frombuffer(file.readframes(SAMPLE_RATE), "<i2").reshape(-1, 2) / 32767
    np.testing.assert_allclose(vocals, 0.5 * 1.009 * mixture, atol=1e-3)

    with pytest.raises(WeightsError, match=r"checkpoints/Kim_Vocal_2.onnx.*--only kim-vocal-2"):
        main(parse_arguments(["separate", "song.wav", "--output", "other.wav"]))
    assert not (tmp_path / "other.wav").exists()


def test_what_is_no_separator_is_said(tmp_path):
    with pytest.raises(WeightsError, match="none.onnx.*--only kim-vocal-2"):
        load_separator(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(WeightsError, match="cannot be read.*--only kim-vocal-2"):
        load_separator(tmp_path / "bad.onnx")
    with pytest.raises(WeightsError, match="5000 bins"):
        load_separator(network(tmp_path / "large.onnx", 1.0, 5000, 16))
    with pytest.raises(WeightsError, match="an MDX-Net takes"):
        load_separator(network(tmp_path / "open.onnx", 1.0, "bins", 16))
