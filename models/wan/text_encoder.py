"""The text encoder: prompt -> umT5 hidden states, (tokens, 4096) each.

The network is transformers' UMT5 stack; this file loads the original file (`models_t5_umt5-xxl-enc-bf16.pth`), a
Diffusers folder or ComfyUI's single file into it, and cleans and cuts prompts as the transformer was trained with.

Source: Wan2.1 `wan/modules/t5.py`, `wan/modules/tokenizers.py`; ComfyUI `comfy/text_encoders/spiece_tokenizer.py`.
"""

import html
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import ftfy
import torch
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from errors import WeightsError
from models.wan.checkpoint import (
    assign_tensors,
    convert_names,
    part_of_release,
    read_tensors,
    safetensors_header,
    split_scales,
)

logger = logging.getLogger("selfsame")

PLACE = ("text_encoder", "models_t5*")  # its name in a Diffusers repository, and in an original one
MAX_TOKENS = 512  # the transformer's text length, the closing </s> included
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")  # the first one in a tokenizer's folder is read
SPIECE_KEY = "spiece_model"  # ComfyUI's files bring their tokenizer as a tensor of bytes

# Original name -> transformers' name, in whole path components; blocks are `blocks.N` -> `block.N`.
_OUTSIDE_BLOCKS = {"token_embedding": "embed_tokens", "norm": "final_layer_norm"}
_INSIDE_BLOCKS = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (also doubly escaped ones), and make every gap one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class TextEncoder(nn.Module):
    """umT5 with its tokenizer."""

    def __init__(self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase | None):
        super().__init__()
        self.encoder = encoder  # transformers' UMT5Stack
        self.tokenizer = tokenizer

    @property
    def dim(self) -> int:
        return self.encoder.config.d_model

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, L) -> final hidden states (B, L, D). Keys with mask 0 are not attended to."""
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state

    def encode_prompts(self, prompts: list[str]) -> list[torch.Tensor]:
        """Encode prompts, each to (tokens, D), tokens ≤ 512; the transformer pads with zeros itself.

        Every prompt is run by itself: there is no padding to mask, and its result cannot depend on its neighbours.
        A longer prompt is cut at 512 tokens, and a warning says what is lost.
        """
        device = self.encoder.embed_tokens.weight.device
        return [self(torch.tensor([self.tokenize(prompt)], device=device))[0] for prompt in prompts]

    def tokenize(self, prompt: str) -> list[int]:
        """The ids of the cleaned prompt, closed by </s>, at most 512."""
        text = clean_prompt(prompt)
        ids = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids
        if len(ids) == MAX_TOKENS:
            # An untruncated run tells whether something was lost; `verbose` is about the model's limit, which we keep.
            whole = self.tokenizer(text, truncation=False, verbose=False).input_ids
            if lost := len(whole) - len(ids):
                logger.warning(
                    "prompt of %d tokens is cut at %d: %d tokens are ignored, from %r on",
                    len(whole),
                    MAX_TOKENS,
                    lost,
                    self.tokenizer.decode(whole[MAX_TOKENS - 1 :], skip_special_tokens=True),
                )
        return ids


def transformers_key(key: str) -> str:
    """The name in transformers' UMT5Stack of a tensor of the original file, or of a UMT5EncoderModel."""
    if key == "shared.weight":
        return "embed_tokens.weight"
    key = key.removeprefix("encoder.")
    match key.split("."):
        case ["blocks", index, *names, last]:
            name = ".".join(names)
            return ".".join(["block", index, _INSIDE_BLOCKS.get(name, name), last])
        case [name, last]:
            return f"{_OUTSIDE_BLOCKS.get(name, name)}.{last}"
    return key


def detect_text_config(shapes: Mapping[str, tuple[int, ...]]) -> UMT5Config:
    """Read the configuration off a state dict with the names of `transformers_key`.

    Raises:
        KeyError: a tensor that every umT5 encoder has is missing.
    """
    attention = "block.0.layer.0.SelfAttention"
    vocab_size, d_model = shapes["embed_tokens.weight"]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes[f"{attention}.q.weight"][0] // heads,
        d_ff=shapes["block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("block.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        is_encoder_decoder=False,
        use_cache=False,
    )


def text_encoder_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str | None = None,
    source: str | Path = "state dict",
) -> TextEncoder:
    """Build the encoder around a state dict with original or transformers' names; for `dtype` see `load_text_encoder`.

    Raises:
        WeightsError: not the weights of a umT5 encoder; `source` names them.
    """
    tensors, scales = split_scales({key: tensor for key, tensor in tensors.items() if key != SPIECE_KEY})
    if "shared.weight" in tensors:  # the same table is also stored as encoder.embed_tokens
        tensors = {key: tensor for key, tensor in tensors.items() if key != "encoder.embed_tokens.weight"}
    tensors = convert_names(tensors, transformers_key)
    scales = {transformers_key(key): scale for key, scale in scales.items()}
    try:
        config = detect_text_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except KeyError as error:
        raise WeightsError(f"{source}: not the weights of a umT5 encoder (no {error})") from error
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config).encoder
    if dtype is None:
        dtype = torch.float32 if tensors["embed_tokens.weight"].dtype == torch.float32 else torch.bfloat16
    assign_tensors(encoder, tensors, dtype=dtype, device=device, source=source, scales=scales)
    return TextEncoder(encoder, tokenizer).eval().requires_grad_(False)


def load_text_encoder(
    path: str | Path,
    tokenizer_path: str | Path | None = None,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str | None = None,
    hint: str = "",
) -> TextEncoder:
    """Read umT5 and its tokenizer.

    Args:
        path: a weights file; a Diffusers repository or its `text_encoder` folder; or an original repository.
        tokenizer_path: `load_tokenizer`. Default: the one within the weights; or `google/umt5-xxl` or `tokenizer`,
            beside the weights or one folder above.
        dtype: of the weights and activations. None: the file's, so that it stays mapped, but bfloat16 for narrower
            ones, whose range umT5 leaves.
        device: None leaves the weights mapped from disk where they need no cast.
        hint: what to do about missing files; ends the message.

    Raises:
        WeightsError: missing, unreadable, several candidates, or not umT5.
    """
    weights = part_of_release(path, *PLACE)
    tensors = read_tensors(weights, hint=hint)
    if tokenizer_path is None and SPIECE_KEY in tensors:
        tokenizer = parse_tokenizer(tensors[SPIECE_KEY].numpy().tobytes(), f"{SPIECE_KEY} of {weights}", hint)
    else:
        tokenizer = load_tokenizer(Path(tokenizer_path) if tokenizer_path else find_tokenizer(weights, hint), hint)
    return text_encoder_from_tensors(tensors, tokenizer, dtype=dtype, device=device, source=weights)


def find_tokenizer(weights: Path, hint: str = "") -> Path:
    """The tokenizer that belongs to a weights file or folder: a folder, or the file itself where it holds its own.

    Raises:
        WeightsError: there is none in the places where releases have it.
    """
    if weights.suffix == ".safetensors" and weights.is_file() and SPIECE_KEY in safetensors_header(weights, hint):
        return weights
    folders = [weights, weights.parent] if weights.is_dir() else [weights.parent]
    places = [folder / name for folder in folders for name in ("google/umt5-xxl", "tokenizer")]
    for place in places:
        if place.is_dir():
            return place
    looked = " or ".join(str(place) for place in places)
    advice = f"name one by --tokenizer_path{hint and f', or {hint}'}"
    raise WeightsError(f"{weights}: no tokenizer beside it (looked for {looked}); {advice}")


def load_tokenizer(path: Path, hint: str = "") -> PreTrainedTokenizerBase:
    """Read a tokenizer: `tokenizer.json`, `spiece.model`, or a folder with one of them. Nothing is fetched.

    The file is taken as it is. transformers 5 would build a `T5Tokenizer`, which the released tokenizer_config.json
    names, anew from its vocabulary, with T5's <unk> (2) and without byte pieces; umT5 has <unk> 3 and 256 of them.

    Raises:
        WeightsError: missing, damaged, or another tokenizer.
    """
    if not path.exists():
        raise WeightsError(f"{path}: no such tokenizer{hint and f'; {hint}'}")
    file = path
    if path.is_dir():
        file = next((path / name for name in TOKENIZER_FILES if (path / name).is_file()), None)
        if file is None:
            raise WeightsError(f"{path}: not a tokenizer (no {' or '.join(TOKENIZER_FILES)}){hint and f'; {hint}'}")
    return parse_tokenizer(file.read_bytes(), file, hint)


def check_tokenizer(file: Path) -> None:
    """Whether a file is a tokenizer that `load_tokenizer` takes. Only its first pieces are tried: the tables of all, a
    quarter of a million, take seconds to build.

    Raises:
        WeightsError: it is not.
    """
    if file.is_dir():
        raise WeightsError(f"{file}: no {' nor '.join(TOKENIZER_FILES)} there")
    if file.suffix == ".safetensors":  # the weights, which bring it as a tensor
        return
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{file}: a git-lfs pointer, not the tokenizer; run git lfs pull")
    try:
        content = first_pieces(content)
    except (ValueError, TypeError, LookupError, AttributeError, DecodeError) as error:
        raise WeightsError(f"{file}: not a tokenizer of umT5 ({' '.join(str(error).split())[:160]})") from error
    parse_tokenizer(content, file)


def first_pieces(content: bytes, count: int = 512) -> bytes:
    """A tokenizer.json or SentencePiece model with its first pieces alone; whole, if its special tokens come later.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, DecodeError: it is neither.
    """
    if content.lstrip()[:1] != b"{":
        model = ModelProto()
        model.ParseFromString(content)
        if model.trainer_spec.unk_id < count and "</s>" in {piece.piece for piece in model.pieces[:count]}:
            del model.pieces[count:]
        return model.SerializeToString()
    document = json.loads(content)
    model = document["model"]
    pieces = model["vocab"][:count] if isinstance(model["vocab"], list) else []
    if model.get("unk_id", 0) < count and {"<pad>", "</s>", "<unk>"} <= {piece for piece, _ in pieces}:
        model["vocab"] = pieces
        document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < count]
    return json.dumps(document).encode()


def parse_tokenizer(content: bytes, source: str | Path, hint: str = "") -> PreTrainedTokenizerBase:
    """A tokenizer.json, or a SentencePiece model, with the special tokens of umT5.

    Raises:
        WeightsError: neither, or it lacks those tokens, or does not close a text; `source` names it.
    """
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    try:
        is_json = content.lstrip()[:1] == b"{"
        backend = Tokenizer.from_str(content.decode("utf-8")) if is_json else tokenizer_from_sentencepiece(content)
        backend.no_truncation()
        backend.no_padding()
        if missing := [token for token in special.values() if backend.token_to_id(token) is None]:
            raise ValueError(f"without {', '.join(missing)}")
        if backend.encode("").ids != [backend.token_to_id("</s>")]:
            raise ValueError("it does not close a prompt by </s>")
    except Exception as error:  # the tokenizers library raises no narrower class
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{source}: not a tokenizer of umT5 ({reason}){hint and f'; {hint}'}") from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_TOKENS, **special)


def tokenizer_from_sentencepiece(model: bytes) -> Tokenizer:
    """A SentencePiece unigram model as a tokenizer of the tokenizers library, closed by </s>.

    Raises:
        ValueError: other bytes, or another kind of model.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError("no SentencePiece model") from error
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    trainer = proto.trainer_spec
    if trainer.model_type != trainer.UNIGRAM or "</s>" not in ids:
        raise ValueError(f"a SentencePiece model of kind {trainer.model_type} with {len(pieces)} pieces")
    tokenizer = Tokenizer(Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    charsmap = proto.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    # Not split at spaces: SentencePiece finds the best pieces of the whole text.
    metaspace = {"prepend_scheme": "always", "split": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**metaspace)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return tokenizer
