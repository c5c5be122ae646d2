"""The text encoder: prompt -> umT5 hidden states, (tokens, 4096) each.

The network is transformers' UMT5 stack; this file loads the original file (`models_t5_umt5-xxl-enc-bf16.pth`) or a
Diffusers folder into it, and cleans and cuts prompts as the transformer was trained with.

Source: Wan2.1 `wan/modules/t5.py`, `wan/modules/tokenizers.py`.
"""

import html
import logging
from collections.abc import Mapping
from pathlib import Path

import ftfy
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, convert_names, part_of_release, read_tensors, split_scales

logger = logging.getLogger("selfsame")

PLACE = ("text_encoder", "models_t5*")  # in a Diffusers repository, and in an original one
MAX_TOKENS = 512  # the transformer's text length, the closing </s> included

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
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    source: str | Path = "state dict",
) -> TextEncoder:
    """Build the encoder around a state dict with original or transformers' names.

    Raises:
        WeightsError: not the weights of a umT5 encoder; `source` names them.
    """
    tensors, scales = split_scales(tensors)
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
    assign_tensors(encoder, tensors, dtype=dtype, device=device, source=source, scales=scales)
    return TextEncoder(encoder, tokenizer).eval().requires_grad_(False)


def load_text_encoder(
    path: str | Path,
    tokenizer_path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    hint: str = "",
) -> TextEncoder:
    """Read umT5 and its tokenizer.

    Args:
        path: a weights file; a Diffusers repository or its `text_encoder` folder; or an original repository.
        tokenizer_path: default: `google/umt5-xxl` or `tokenizer`, beside the weights or one folder above.
        dtype: of the weights and activations; the release is bfloat16.
        device: None leaves the weights mapped from disk where they need no cast.
        hint: what to do about missing files; ends the message.

    Raises:
        WeightsError: missing, unreadable, several candidates, or not umT5.
    """
    weights = part_of_release(path, *PLACE)
    tokenizer = load_tokenizer(Path(tokenizer_path) if tokenizer_path else find_tokenizer(weights, hint), hint)
    return text_encoder_from_tensors(
        read_tensors(weights, hint=hint), tokenizer, dtype=dtype, device=device, source=weights
    )


def find_tokenizer(weights: Path, hint: str = "") -> Path:
    """The tokenizer folder that belongs to a weights file or folder.

    Raises:
        WeightsError: there is none in the places where releases have it.
    """
    folders = [weights, weights.parent] if weights.is_dir() else [weights.parent]
    places = [folder / name for folder in folders for name in ("google/umt5-xxl", "tokenizer")]
    for place in places:
        if place.is_dir():
            return place
    looked = " or ".join(str(place) for place in places)
    raise WeightsError(f"{weights}: no tokenizer beside it (looked for {looked}){hint and f'; {hint}'}")


def load_tokenizer(folder: Path, hint: str = "") -> PreTrainedTokenizerBase:
    """Read a tokenizer from a local folder; nothing is fetched, and no code of the folder is run."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such tokenizer folder{hint and f'; {hint}'}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{folder}: not a tokenizer ({reason}){hint and f'; {hint}'}") from error
