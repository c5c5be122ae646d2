"""umT5 on a tiny network with a word tokenizer: cleaning, cutting, and every layout."""

import io
import json
import logging

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from errors import WeightsError
from models.wan.text_encoder import (
    check_tokenizer,
    clean_prompt,
    detect_text_config,
    first_pieces,
    load_text_encoder,
    load_tokenizer,
    text_encoder_from_tensors,
    tokenizer_from_sentencepiece,
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


# Ordinary text, emoji (also joined ones), rare glyphs, Chinese, letters that are normalised, and nothing.
TEXTS = ["a person walks", "a person 🙂 walks", "👩‍👩‍👧 ☃☃ 龘", "一个人在海边走", "ﬁne ½ Ａ１ ¨ e\u0301", ""]


@pytest.fixture(scope="module")
def spiece():
    """A small SentencePiece model of umT5's kind: the four special pieces in its order, then 256 bytes."""
    text = ["a person walks on the beach slowly", "the quick brown fox jumps over the dog", "一个人在海边走"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=320, hard_vocab_limit=False, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def ids(spiece):
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    assert processor.unk_id() == 3 and processor.id_to_piece(4) == "<0x00>" and processor.id_to_piece(259) == "<0xFF>"
    ids = [processor.encode(text, add_eos=True) for text in TEXTS]
    assert [4 + byte for byte in "🙂".encode()] == ids[1][-11:-7], "what the vocabulary lacks is spelled in bytes"
    return ids


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_tokenizer_json_is_taken_as_it_is(tmp_path, spiece, ids, byte_fallback):
    """The released files name `T5Tokenizer`, of which transformers 5 makes one with <unk> 2 and without bytes."""
    backend = tokenizer_from_sentencepiece(spiece)
    backend.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (content["model"]["unk_id"], content["model"]["byte_fallback"]) == (3, True)
    content["model"]["byte_fallback"] = byte_fallback
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **special}), encoding="utf-8"
    )
    (tmp_path / "spiece.model").write_bytes(spiece)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 3)
    found = [tokenizer(text).input_ids for text in TEXTS]
    if byte_fallback:
        assert found == ids
    else:
        assert found[0] == ids[0] and found[1].count(3) == 1 and 2 not in sum(found, [])


def test_sentencepiece_models_give_their_own_ids(tmp_path, spiece, ids):
    (tmp_path / "spiece.model").write_bytes(spiece)
    for path in (tmp_path, tmp_path / "spiece.model"):
        tokenizer = load_tokenizer(path)
        assert [tokenizer(text).input_ids for text in TEXTS] == ids
        assert tokenizer.decode(ids[2], skip_special_tokens=True) == TEXTS[2]


def test_comfyui_file_brings_its_tokenizer(tmp_path, weights, spiece, ids):
    """umt5_xxl_fp16.safetensors: transformers' names, and the SentencePiece model as a tensor of bytes."""
    names = {f"encoder.{transformers_key(key)}": tensor.contiguous() for key, tensor in weights.items()}
    names["shared.weight"] = names.pop("encoder.embed_tokens.weight")
    table = names["shared.weight"]
    names["shared.weight"] = torch.cat([table, table, table])[: 4 + 256 + 100]  # as many rows as there are pieces
    file = tmp_path / "umt5_xxl_fp16.safetensors"
    save_file(names | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, file)
    encoder = load_text_encoder(file, dtype=torch.float32)
    assert [encoder.tokenize(text) for text in TEXTS[:4]] == ids[:4]
    assert encoder.encode_prompts(TEXTS[1:2])[0].shape == (len(ids[1]), encoder.dim)
    expected = text_encoder_from_tensors(names, dtype=torch.float32)(torch.tensor([ids[1]]))[0]
    assert torch.equal(encoder.encode_prompts(TEXTS[1:2])[0], expected)

    save_file(names | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, file)
    with pytest.raises(WeightsError, match=r"spiece_model of .*fp16.safetensors: not a tokenizer of umT5"):
        load_text_encoder(file)
    (tmp_path / "spiece.model").write_bytes(spiece)
    given = load_text_encoder(file, tmp_path / "spiece.model", dtype=torch.float32)
    assert given.tokenize(TEXTS[3]) == ids[3], "a tokenizer that is named takes the place of the file's"


def test_a_sentencepiece_model_is_tried_by_its_first_pieces(tmp_path, spiece):
    file = tmp_path / "spiece.model"
    model = ModelProto()
    model.ParseFromString(spiece)
    for number in range(2000):
        model.pieces.add(piece=f"▁{number}", score=-1)
    file.write_bytes(model.SerializeToString())
    model.ParseFromString(first_pieces(file.read_bytes()))
    assert len(model.pieces) == 512
    check_tokenizer(file)
    for damaged in (spiece[: len(spiece) // 2 + 1], b"", b"no model"):
        file.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"spiece.model: not a tokenizer of umT5 \(.+\)"):
            check_tokenizer(file)


def test_tokenizer_of_another_model(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}), encoding="utf-8")
    with pytest.raises(WeightsError, match="does not close a prompt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(WeightsError, match="not a tokenizer of umT5"):
        load_tokenizer(tmp_path)
    with pytest.raises(WeightsError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


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
