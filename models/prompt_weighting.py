"""Weights in SDXL prompts: (word) counts 1.1 times, [word] 1/1.1, (word:1.4) as much as it says; prompts of any length.

    embeds = weighted_embeddings(pipeline, "a (red:1.5) cat", "(lowres:1.2), ugly")
    pipeline(**embeds, …)

Source: InstantID `pipeline_stable_diffusion_xl_instantid_full.py` (LongPromptWeight), after Stable Diffusion web UI.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

START, END = 49406, 49407  # CLIP's own tokens around a text
BLOCK = 75  # tokens between them
ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies its content by

# An escaped character, a bracket, the weight that closes a bracket, or a run of text.
_PIECE = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")

# Token ids (1, n) -> hidden states (1, n, width) before the last layer, and the pooled vector (1, width), if any.
Encoder = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The prompt as pieces of text with a weight each. A bracket that is never closed reaches to the end; BREAK becomes
    a piece of its own with weight -1, as in InstantID's code.
    """
    pieces: list[list] = []
    round_brackets, square_brackets = [], []  # where each open one began

    def multiply_from(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _PIECE.finditer(prompt):
        text, weight = match[0], match[1]
        if text.startswith("\\"):
            pieces.append([text[1:], 1.0])
        elif text == "(":
            round_brackets.append(len(pieces))
        elif text == "[":
            square_brackets.append(len(pieces))
        elif weight is not None and round_brackets:
            multiply_from(round_brackets.pop(), float(weight))
        elif text == ")" and round_brackets:
            multiply_from(round_brackets.pop(), ROUND)
        elif text == "]" and square_brackets:
            multiply_from(square_brackets.pop(), SQUARE)
        else:
            for number, part in enumerate(_BREAK.split(text)):
                pieces += [["BREAK", -1.0]] * (number > 0) + [[part, 1.0]]
    for start in round_brackets:
        multiply_from(start, ROUND)
    for start in square_brackets:
        multiply_from(start, SQUARE)

    merged: list[tuple[str, float]] = []
    for text, weight in pieces or [["", 1.0]]:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def split_blocks(
    tokens: Sequence[int], weights: Sequence[float], pad_last_block: bool = False
) -> list[tuple[list[int], list[float]]]:
    """Blocks of at most 75 tokens, each with CLIP's start and end around it. The last may be shorter (empty, if the one
    before is full), or is padded with ends.
    """
    blocks = []
    for begin in range(0, len(tokens) + 1, BLOCK):
        inside, their_weights = list(tokens[begin : begin + BLOCK]), list(weights[begin : begin + BLOCK])
        padding = BLOCK - len(inside) if pad_last_block else 0
        blocks.append(([START, *inside, *[END] * (padding + 1)], [1.0, *their_weights, *[1.0] * (padding + 1)]))
    return blocks


def encode_weighted(
    tokens: Sequence[int], weights: Sequence[float], encoders: Sequence[Encoder]
) -> tuple[Tensor, Tensor]:
    """Block by block through both encoders: states (1, tokens, both widths), and the last block's pooled vector.

    A weighted token is moved along the line from the block's last state: e <- last + weight · (e - last).
    """
    embedded = []
    for ids, block_weights in split_blocks(tokens, weights):
        encoded = [encode(torch.tensor([ids])) for encode in encoders]
        states = torch.cat([hidden for hidden, _ in encoded], dim=-1)  # (1, n, 768 + 1280)
        pooled = encoded[-1][1]
        # The original keeps weights in float16: 1.3 is 1.2998.
        factors = torch.tensor(block_weights, dtype=torch.float16).to(states)[None, :, None]
        last = states[:, -1:]
        embedded.append(torch.where(factors == 1, states, last + (states - last) * factors))
    return torch.cat(embedded, dim=1), pooled


def pad_to_equal(tokens: Sequence[int], weights: Sequence[float], length: int) -> tuple[list[int], list[float]]:
    """The shorter of prompt and negative prompt is filled up with ends."""
    padding = length - len(tokens)
    return [*tokens, *[END] * padding], [*weights, *[1.0] * padding]


def tokenize(prompt: str, tokenizer) -> tuple[list[int], list[float]]:
    """Token ids without start and end, and the weight of each."""
    tokens, weights = [], []
    for text, weight in parse_weights(prompt):
        ids = tokenizer(text, truncation=False).input_ids[1:-1]
        tokens += ids
        weights += [weight] * len(ids)
    return tokens, weights


@torch.no_grad()
def weighted_embeddings(pipeline, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
    """The four embeddings that an SDXL pipeline takes in place of `prompt` and `negative_prompt`. One tokenizer serves
    both encoders, as in the original: the second one would pad with exclamation marks.
    """

    def encoder(model) -> Encoder:
        def encode(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            output = model(ids.to(pipeline._execution_device), output_hidden_states=True)
            return output.hidden_states[-2], output[0]

        return encode

    encoders = [encoder(pipeline.text_encoder), encoder(pipeline.text_encoder_2)]
    texts = [tokenize(text, pipeline.tokenizer) for text in (prompt, negative_prompt or "")]
    length = max(len(tokens) for tokens, _ in texts)
    (states, pooled), (negative_states, negative_pooled) = (
        encode_weighted(*pad_to_equal(*text, length), encoders) for text in texts
    )
    return {
        "prompt_embeds": states,
        "negative_prompt_embeds": negative_states,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
