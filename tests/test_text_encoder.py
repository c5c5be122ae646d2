"""umT5 on a tiny network with a word tokenizer: cleaning, cutting, and every layout."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from errors import WeightsError
from models.wan.text_encoder import (
    clean_prompt,
    detect_text_config,
    load_text_encoder,
    text_encoder_from_tensors,
    transformers_key,
)
from tests.conftest import GOLDENS

WORDS = ["<pad>", "</s>", "<unk>", "a", "person", "walks", "on", "the", "beach", "slowly"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture(scope="module")
def weights():
    return load_file(GOLDENS / "wan-umt5-encoder" / "weights.safetensors")


@pytest.fixture(scope="module")
def encoder(weights, tokenizer):
    return text_encoder_from_tensors(weights, tokenizer, dtype=torch.float32)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  a  person\n\twalks\u3000on ", "a person walks on"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),  # escaped twice
        ("&lt;b&gt;", "<b>"),
        ("cafÃ© au lait", "café au lait"),  # UTF-8 once read as Latin-1
        ("ｗｉｄｅ", "wide"),  # full-width letters
        ("“quoted”", '"quoted"'),
        ("", ""),
        ("一个人在海边走", "一个人在海边走"),
    ],
)
def test_clean_prompt(text, expected):
    assert clean_prompt(text) == expected


def test_prompts_are_cut_to_their_length(encoder):
    states = encoder.encode_prompts(["a person walks", "a person  walks on the beach", ""])
    assert [state.shape for state in states] == [(4, encoder.dim), (7, encoder.dim), (1, encoder.dim)]


def test_batch_is_its_prompts(encoder):
    """Together or alone, padded or not: a prompt's states are the same."""
    prompts = ["a person walks", "the beach", "a person walks slowly on the beach"]
    together = encoder.encode_prompts(prompts)
    for prompt, state in zip(prompts, together, strict=True):
        assert torch.equal(encoder.encode_prompts([prompt])[0], state)
    padded = encoder.tokenizer(prompts, padding=True, return_tensors="pt")
    hidden = encoder(padded.input_ids, padded.attention_mask)
    for row, mask, state in zip(hidden, padded.attention_mask, together, strict=True):
        torch.testing.assert_close(row[: mask.sum()], state, rtol=1e-5, atol=2e-5)


def test_long_prompt_is_cut_aloud(encoder, caplog):
    fitting, long = "walks " * 511, "walks " * 511 + "on the beach"
    with caplog.at_level(logging.WARNING, logger="selfsame"):
        assert len(encoder.tokenize(fitting)) == 512
        assert not caplog.records
        ids = encoder.tokenize(long)
    assert len(ids) == 512
    assert ids[-1] == 1, "the cut prompt is still closed by </s>"
    assert "3 tokens are ignored" in caplog.text
    assert "'on the beach'" in caplog.text
    assert encoder.encode_prompts([long])[0].shape == (512, encoder.dim)


def test_every_layout_loads_alike(tmp_path, weights, tokenizer, encoder):
    original, folder = tmp_path / "original", tmp_path / "diffusers"
    (original / "google").mkdir(parents=True)
    torch.save(weights, original / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer.save_pretrained(original / "google" / "umt5-xxl")

    names = {transformers_key(key): tensor for key, tensor in weights.items()}
    model = UMT5EncoderModel(detect_text_config({key: tuple(tensor.shape) for key, tensor in names.items()}))
    model.encoder.load_state_dict(names)
    model.shared = model.encoder.embed_tokens
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")

    prompt = "a person walks on the beach"
    expected = encoder.encode_prompts([prompt])[0]
    for path in (original, original / "models_t5_umt5-xxl-enc-bf16.pth", folder, folder / "text_encoder"):
        loaded = load_text_encoder(path, dtype=torch.float32)
        assert torch.equal(loaded.encode_prompts([prompt])[0], expected), path
    explicit = load_text_encoder(folder / "text_encoder", folder / "tokenizer")
    assert explicit.encode_prompts([prompt])[0].dtype == torch.bfloat16


def test_bfloat16_is_close(weights, tokenizer, encoder):
    half = text_encoder_from_tensors(weights, tokenizer, dtype=torch.bfloat16)
    prompt = ["a person walks on the beach"]
    expected = encoder.encode_prompts(prompt)[0]
    assert (half.encode_prompts(prompt)[0] - expected).norm() / expected.norm() < 0.05


def test_wrong_weights_are_refused(tmp_path, weights):
    with pytest.raises(WeightsError, match="not the weights of a umT5"):
        text_encoder_from_tensors({"patch_embedding.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="1 missing"):
        text_encoder_from_tensors({key: tensor for key, tensor in weights.items() if key != "norm.weight"})
    torch.save(weights, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(WeightsError, match="no tokenizer beside it"):
        load_text_encoder(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(WeightsError, match="not a tokenizer"):
        load_text_encoder(tmp_path)


def test_released_shape_is_recognised():
    released = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**released)).encoder
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == 242
    detected = detect_text_config(shapes)
    assert {key: getattr(detected, key) for key in released} == released
