"""wav2vec2: released layouts against transformers' own loading, the two read-outs, and what is no encoder."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
)

from configs import download_command, load_config, part_path
from errors import WeightsError
from models import audio_encoder
from models.audio_encoder import AudioEncoder, load_audio_encoder
from pipelines.tiny import fill_from_seed, tiny_audio_encoder
from preprocess.audio import num_features

SHAPE = load_config("tiny-i2v")["audio_encoder"]


def speech(seconds=1.0, seed=0):
    noise = np.random.default_rng(seed).standard_normal(round(seconds * 16000)).astype(np.float32)
    return (0.1 * noise * np.sin(np.arange(len(noise)) / 2000) + 0.02).astype(np.float32)


def release(folder, kind=Wav2Vec2ForCTC, *, pickled=False, weight_norm_names=("weight_g", "weight_v")):
    """A folder as facebook/wav2vec2-base-960h (CTC) or chinese-wav2vec2-base (pre-training): original names."""
    network = fill_from_seed(kind(Wav2Vec2Config(vocab_size=32, codevector_dim=16, proj_codevector_dim=16, **SHAPE)), 5)
    names = {f"parametrizations.weight.original{i}": name for i, name in enumerate(weight_norm_names)}
    tensors = {}
    for name, tensor in network.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor.clone()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 16000}))
    torch.save(tensors, folder / "pytorch_model.bin") if pickled else save_file(tensors, folder / "model.safetensors")
    return network


@pytest.mark.parametrize(
    "kind, settings",
    [
        (Wav2Vec2ForCTC, {}),
        (
            Wav2Vec2ForCTC,
            {"weight_norm_names": ("parametrizations.weight.original0", "parametrizations.weight.original1")},
        ),
        (Wav2Vec2ForPreTraining, {"pickled": True}),
        (Wav2Vec2Model, {}),
    ],
)
def test_released_folders_give_what_transformers_gives(tmp_path, kind, settings):
    network = release(tmp_path / "wav2vec2", kind, **settings)
    encoder = load_audio_encoder(tmp_path / "wav2vec2")
    samples = speech()
    given = Wav2Vec2FeatureExtractor(do_normalize=True)(samples, sampling_rate=16000, return_tensors="pt")
    torch.testing.assert_close(encoder.input_values(samples), given.input_values, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        inner = network.wav2vec2 if kind is not Wav2Vec2Model else network
        expected = inner(given.input_values).last_hidden_state
    features = encoder.last_hidden_state(samples)
    assert features.shape == (1, num_features(len(samples)), encoder.width)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert not features.is_inference()  # training differentiates through what uses them


def test_hidden_states_at_the_features_own_rate_are_transformers():
    """With as many frames as features, the interpolation changes nothing: all layers after the embedding."""
    encoder = tiny_audio_encoder(load_config("tiny-i2v"))
    samples = speech()
    with torch.no_grad():
        states = encoder.model(encoder.input_values(samples), output_hidden_states=True).hidden_states
    ours = encoder.hidden_states(samples, num_features(len(samples)))
    assert ours.shape == (num_features(len(samples)), 2, 32)
    torch.testing.assert_close(ours, torch.stack([state[0] for state in states[1:]], dim=1), rtol=1e-4, atol=1e-4)


def test_hidden_states_are_one_a_video_frame():
    """The layers see interpolated features: a stretched copy of them gives the same."""
    encoder = tiny_audio_encoder(load_config("tiny-i2v"))
    samples = speech(2.0)
    ours = encoder.hidden_states(samples, 50)
    assert ours.shape == (50, encoder.num_layers, encoder.width)
    with torch.no_grad():
        features = encoder.model.feature_extractor(encoder.input_values(samples))  # (1, channels, 99)
        places = torch.linspace(0, features.shape[2] - 1, 50)
        left, share = places.long().clamp(max=features.shape[2] - 2), places - places.long().clamp(max=97)
        features = features[:, :, left] * (1 - share) + features[:, :, left + 1] * share
        hidden, _ = encoder.model.feature_projection(features.transpose(1, 2))
        expected = encoder.model.encoder(hidden).last_hidden_state[0]
    torch.testing.assert_close(ours[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_loudness_does_not_change_the_features():
    encoder = tiny_audio_encoder(load_config("tiny-i2v"))
    torch.testing.assert_close(
        encoder.last_hidden_state(speech()), encoder.last_hidden_state(0.25 * speech()), rtol=1e-3, atol=1e-3
    )


def test_long_sound_goes_through_in_sections(monkeypatch):
    """Every frame once, and no forward pass longer than a section with its context."""
    encoder = tiny_audio_encoder(load_config("tiny-i2v"))
    samples, lengths, forward = speech(7.3), [], encoder._layers
    whole = encoder.hidden_states(samples, 182)

    def recording(values, num_frames):
        lengths.append(values.shape[1])
        return forward(values, num_frames)

    monkeypatch.setattr(encoder, "_layers", recording)
    monkeypatch.setattr(audio_encoder, "SECTION", 2 * 16000)
    monkeypatch.setattr(audio_encoder, "CONTEXT", 16000)
    sections = encoder.hidden_states(samples, 182)
    assert sections.shape == whole.shape
    assert len(lengths) == 4
    assert max(lengths) <= 4 * 16000 + 640

    # Attention spans all of the sound, so sections differ a little; a frame out of place would not look alike at all.
    def likeness(a, b):
        return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean()

    assert likeness(sections, whole) > likeness(sections[1:], whole[:-1]) + 0.05


def test_tiny_encoder_comes_from_its_seed():
    config = load_config("tiny-i2v")
    samples = speech()
    torch.manual_seed(1)
    first = tiny_audio_encoder(config).last_hidden_state(samples)
    torch.manual_seed(2)
    assert torch.equal(first, tiny_audio_encoder(config).last_hidden_state(samples))
    assert not torch.equal(first, tiny_audio_encoder(config | {"seed": 9}).last_hidden_state(samples))


def test_do_normalize_of_the_folder_is_heeded(tmp_path):
    release(tmp_path / "wav2vec2")
    (tmp_path / "wav2vec2" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    samples = speech()
    assert torch.equal(load_audio_encoder(tmp_path / "wav2vec2").input_values(samples)[0], torch.from_numpy(samples))


def test_what_is_no_encoder_is_said(tmp_path):
    hint = "run: python download_models.py --only wav2vec2-base-960h"
    with pytest.raises(WeightsError, match=f"none.config.json.*{hint}"):
        load_audio_encoder(tmp_path / "none", hint=hint)

    folder = tmp_path / "wav2vec2"
    release(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=f"model.safetensors.*{hint}"):
        load_audio_encoder(folder, hint=hint)
    (folder / "model.safetensors").write_bytes(weights[:5000])
    with pytest.raises(WeightsError, match="model.safetensors"):
        load_audio_encoder(folder)
    (folder / "model.safetensors").write_bytes(weights)

    config = json.loads((folder / "config.json").read_text())
    for change, words in (({"num_hidden_layers": 3}, "16 missing"), ({"num_hidden_layers": 1}, "16 unexpected"),
                          ({"hidden_size": 16}, "of another shape"), ({"model_type": "hubert"}, "hubert"),
                          ({"do_stable_layer_norm": True}, "wav2vec2 base")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=words):
            load_audio_encoder(folder)
    (folder / "config.json").write_text("{half")
    with pytest.raises(WeightsError, match="not JSON"):
        load_audio_encoder(folder)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return logging.error, ("boom",)

    release(tmp_path / "wav2vec2", pickled=True)
    torch.save({"wav2vec2.x": Bomb()}, tmp_path / "wav2vec2" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin"):
        load_audio_encoder(tmp_path / "wav2vec2")


@pytest.mark.parametrize("name", ["wav2vec2-base-960h", "chinese-wav2vec2-base"])
def test_configs_lead_to_a_folder(name):
    config = load_config(name)
    assert part_path(config, "audio_encoder").name == name
    assert download_command(config).endswith(f"--only {name}")


def test_encoder_is_a_module_of_frozen_float32():
    encoder = tiny_audio_encoder(load_config("tiny-i2v"))
    assert isinstance(encoder, AudioEncoder)
    assert not encoder.training
    assert all(parameter.dtype == torch.float32 and not parameter.requires_grad for parameter in encoder.parameters())
