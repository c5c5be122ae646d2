"""LoRA files of every dialect -> changes of a Wan transformer's weights, merged or live; all keys or error.

    W' = W + scale · alpha/rank · B @ A          alpha/rank is 1 where a file has no alpha

Dialects, in any mixture; `0` stands for the block:

    diffusion_model.blocks.0.self_attn.q.lora_A.weight          ComfyUI; without the prefix: bare
    blocks.0.self_attn.q.lora_A.default.weight                  PEFT, DiffSynth, SVI 2; after `pipe.dit.`: SVI 1
    lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha     kohya, musubi; `lora_unet__blocks…`: VideoX-Fun;
                                                                `lora_transformer__blocks…`: StableAvatar
    transformer.blocks.0.attn1.to_q.lora_A.weight               Diffusers
    diffusion_model.blocks.0.….lora_down.weight, .alpha         LightX2V's distilled models, with changes in full:
                          .diff, .diff_b, .diff_m               of a weight (norms too), a bias, a modulation

Source: Stand-In `lora/__init__.py`, DiffSynth-Studio `utils/lora/general.py`, VideoX-Fun `utils/lora_utils.py`,
diffusers `loaders/lora_conversion_utils.py`.
"""

import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import InputError
from models.wan.checkpoint import read_tensors, to_diffusers_name, weight_files
from models.wan.config import VARIANTS
from models.wan.transformer import WanTransformer

logger = logging.getLogger("selfsame")

# What follows a module's name in a key. After A and B may come the name of a PEFT adapter.
_PARTS = {
    "down": re.compile(r"\.lora(_A|_down|\.down)(\.[^.]+)?\.weight$"),
    "up": re.compile(r"\.lora(_B|_up|\.up)(\.[^.]+)?\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
    "weight": re.compile(r"\.diff$"),
    "bias": re.compile(r"\.diff_b$"),
    "modulation": re.compile(r"\.diff_m$"),
}
# What may precede it, also several in a row. Longer ones first.
_PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "_orig_mod.", "pipe.dit.", "module.", "model.", "dit."),
    *("lora_transformer__", "lora_transformer_", "lora_unet__", "lora_unet_"),
)
_SHOWN = 3  # how many keys of each kind an error names


# ------------------------------------------------------------------------------------------------- what a file holds


@dataclass(frozen=True)
class Pair:
    """The low-rank change of one weight."""

    down: Tensor  # A (rank, in)
    up: Tensor  # B (out, rank)
    scale: float  # alpha / rank

    def delta(self, device: torch.device) -> Tensor:
        """(out, in) in float32."""
        up, down = (factor.to(device, torch.float32).flatten(1) for factor in (self.up, self.down))
        return self.scale * (up @ down)


@dataclass(frozen=True)
class Lora:
    """The changes in one file, by the transformer's parameter names. Tensors stay mapped from disk until applied.

    pairs: weight -> A and B.
    full:  weight, bias or modulation -> what is added to it.
    left_out: keys that do not apply; only where they were accepted.
    """

    source: str
    pairs: dict[str, Pair]
    full: dict[str, Tensor]
    left_out: tuple[str, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        transformer: WanTransformer,
        source: str = "LoRA",
        partial: bool = False,
        stated_scale: "StatedScale | None" = None,
        unused: Sequence[str] = (),
    ) -> "Lora":
        """Give every key its parameter, and check shapes and values.

        Args:
            tensors: key -> tensor, of any dialect.
            transformer: what they will be applied to; may be on the meta device.
            source: names the file in errors.
            partial: leave out what does not apply, and say so, instead of raising.
            stated_scale: what the file's metadata says of alpha, for pairs without an alpha key.
            unused: glob patterns of keys that the file is known to carry in vain; they are left out, and listed.

        Raises:
            InputError: keys without a target, of another shape, with NaN, of rank 0, incomplete pairs.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
        spellings = _spellings(shapes)
        problems: dict[str, list[str]] = {}

        def refuse(kind: str, *keys: str) -> None:
            problems.setdefault(kind, []).extend(keys)

        known: list[str] = []  # keys that are known to be of no use
        found: dict[str, dict[str, str]] = {}  # parameter -> part -> key
        for key in tensors:
            name, part = _target(key, spellings, shapes)
            if name is None and any(fnmatchcase(key, pattern) for pattern in unused):
                known.append(key)
            elif name is None:
                refuse("unknown", key)
            elif part in found.setdefault(name, {}):
                refuse("given twice", key)
            elif not tensors[key].is_floating_point() and part != "alpha":
                refuse("not floating-point numbers", key)
            elif not torch.isfinite(tensors[key].float()).all():
                refuse("with NaN or infinity", key)
            else:
                found[name][part] = key

        with_alpha = any("alpha" in parts for parts in found.values())
        pairs, full = {}, {}
        for name, parts in found.items():
            if (key := parts.get("full")) is not None:
                if tensors[key].shape == shapes[name]:
                    full[name] = tensors[key]
                else:
                    refuse("of another shape", key)
            keys = [parts[part] for part in ("down", "up", "alpha") if part in parts]
            if not keys:
                continue
            if "down" not in parts or "up" not in parts:
                refuse("without their other half", *keys)
                continue
            down, up = tensors[parts["down"]], tensors[parts["up"]]
            alpha = tensors[parts["alpha"]] if "alpha" in parts else None
            if 0 in down.shape[:1]:
                refuse("of rank 0", *keys)
            elif not _fits(down, up, shapes[name]):
                refuse("of another shape", *keys)
            elif alpha is None and with_alpha:  # a file has alphas or has none; in between, strength would be a guess
                refuse("without the alpha that others have", *keys)
            elif alpha is not None and (alpha.numel() != 1 or alpha.item() <= 0):
                refuse("with an alpha that is not one number above 0", *keys)
            else:
                rank = down.shape[0]
                scale = stated_scale.of(rank) if stated_scale else 1.0
                pairs[name] = Pair(down, up, scale if alpha is None else alpha.item() / rank)

        left_out = [key for keys in problems.values() for key in keys] + known
        lora = cls(source, pairs, full, tuple(left_out))
        if not tensors or (not pairs and not full) or (problems and not partial):
            raise InputError(_refusal(lora, tensors, problems, shapes))
        if known:
            logger.info("%s: %d keys are left out, as known of it: %s", source, len(known), _by_pattern(known))
        if problems:
            listed = "; ".join(f"{kind}: {_by_pattern(keys)}" for kind, keys in problems.items())
            count = len(left_out) - len(known)
            logger.warning("%s: %d of %d keys are left out: %s", source, count, len(tensors), listed)
        logger.info("%s: %d keys change %d weights", source, len(tensors) - len(lora.left_out), len(lora.targets))
        return lora

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that change."""
        return list(dict.fromkeys([*self.pairs, *self.full]))


@dataclass(frozen=True)
class StatedScale:
    """alpha as the metadata of PEFT and Diffusers give it, once for the whole file."""

    alpha: float
    rank_stabilized: bool = False

    def of(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_lora(
    path: str | Path,
    transformer: WanTransformer,
    partial: bool = False,
    other_part: str | None = None,
    unused: Sequence[str] = (),
) -> Lora:
    """Read a LoRA file, or the folder that holds one, for this transformer.

    Args:
        transformer, partial, unused: see `Lora.from_tensors`.
        other_part: keys with this in them belong to another part in the same file, which the caller reads on its own.

    Raises:
        WeightsError: missing, damaged, or no weights file.
        InputError: see `Lora.from_tensors`.
    """
    file = weight_files(path)[0]
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if other_part is None or other_part not in key}
    return Lora.from_tensors(tensors, transformer, str(path), partial, _read_stated_scale(file), unused)


def _read_stated_scale(file: Path) -> StatedScale | None:
    """From the header that Diffusers writes, or PEFT's adapter_config.json beside adapter_model.safetensors."""
    stated = {}
    try:
        with safe_open(file, "pt") as opened:
            stated = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not stated and file.name.startswith("adapter_model."):
            config = file.with_name("adapter_config.json")
            stated = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        stated = {key.removeprefix("transformer."): value for key, value in stated.items()}
        alpha, per_module = stated.get("lora_alpha"), stated.get("alpha_pattern")
    except SafetensorError:  # a .pt file
        return None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: its LoRA metadata cannot be read ({error})") from error
    if per_module:
        raise InputError(f"{file}: its metadata give alpha module by module; save it with alpha keys, or merged into B")
    return None if alpha is None else StatedScale(float(alpha), bool(stated.get("use_rslora")))


# ----------------------------------------------------------------------------------------------- names


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Every spelling of a module (or of a parameter that is no module's weight or bias) -> its own name."""
    targets = set()
    for name in names:
        owner, _, last = name.rpartition(".")
        targets |= {owner} if last in ("weight", "bias") else {owner, name}
    spellings = {}
    for target in targets:
        for dotted in (target, to_diffusers_name(target)):
            # kohya's underscores cannot be undone (self_attn, time_embedding): so they are done to what there is.
            for spelling in (dotted, dotted.replace(".", "_")):
                assert spellings.setdefault(spelling, target) == target, f"{spelling} names two modules"
    return spellings


def _target(key: str, spellings: Mapping[str, str], names: Mapping[str, object]) -> tuple[str | None, str]:
    """The parameter that a key changes, or None, and the key's part in it: down, up, alpha or full."""
    for part, suffix in _PARTS.items():
        if (match := suffix.search(key)) is None:
            continue
        target = _resolve(key[: match.start()], spellings)
        if part in ("down", "up", "alpha"):
            name = f"{target}.weight"
        else:  # the change in full of a module's parameter, or of the parameter itself
            part, name = "full", target if target in names else f"{target}.{part}"
        return (name, part) if target is not None and name in names else (None, "")
    return None, ""


def _resolve(stem: str, spellings: Mapping[str, str]) -> str | None:
    if "pipe.dit." in stem:
        stem = stem.partition("pipe.dit.")[2]
    while stem not in spellings:
        prefix = next((p for p in _PREFIXES if stem.startswith(p)), None)
        if prefix is None:
            return None
        stem = stem.removeprefix(prefix)
    return spellings[stem]


def _fits(down: Tensor, up: Tensor, shape: Sequence[int]) -> bool:
    """Whether B @ A has the weight's shape; a convolution's kernel is in A, flat or not."""
    rows, columns = shape[0], math.prod(shape[1:])
    return (
        min(down.ndim, up.ndim) > 1
        and down[0].numel() == columns
        and up.shape[0] == rows
        and up.numel() == rows * down.shape[0]
    )


# ----------------------------------------------------------------------------------------------- messages


def _refusal(lora: Lora, tensors: Mapping, problems: Mapping[str, list[str]], shapes: Mapping[str, tuple]) -> str:
    """One line: counts, first keys, the likely reason, what to do."""
    kinds = ", ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN])}{', …' if len(keys) > _SHOWN else ''})"
        for kind, keys in problems.items()
    )
    applicable = len(tensors) - len(lora.left_out)
    refused = sum(len(keys) for keys in problems.values())
    message = f"{lora.source}: {refused} of {len(tensors)} LoRA keys do not apply: {kinds or 'an empty file'}"
    if reason := _likely_reason(tensors, problems, shapes):
        message += f"; {reason}"
    if lora.pairs or lora.full:
        message += f"; --lora_partial applies the other {applicable} and lists these"
    return message


def _likely_reason(tensors: Mapping[str, Tensor], problems: Mapping, shapes: Mapping[str, tuple]) -> str:
    unknown = problems.get("unknown", [])

    def seen(*words: str) -> bool:
        return any(word in key for key in unknown for word in words)

    if seen("_loras."):
        return "these are Stand-In's own weights: give them to --stand_in_path"
    if seen("dwpose_embedding."):
        return "it holds the pose embedder of SVI-Dance beside a LoRA: use infer_long_video.py --variant dance"
    if seen("down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks"):
        return "it is a LoRA for Stable Diffusion (a U-Net: SD, SDXL), not for Wan"
    if seen("double_blocks", "single_blocks", "single_transformer_blocks", "joint_blocks"):
        return "it is a LoRA for another transformer (Flux, HunyuanVideo, SD3), not for Wan"
    if seen("lokr_", "hada_", "oft_", "dora_scale", "lora_magnitude_vector"):
        return "it holds LoKr, LoHa, OFT or DoRA factors, which are not plain LoRA"
    if seen("lora_te", "text_encoder", "text_model"):
        return "a part of it is for a text encoder, which a Wan LoRA does not change"
    if seen("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj"):
        return "it was trained on Wan2.1 image-to-video, whose attention to the picture this model does not have"
    if seen("vace_"):
        return "it was trained on a VACE model, whose branch this model does not have"
    if seen("transformer_2."):
        return "it holds LoRAs for both experts of Wan2.2: split it, and use --lora_path_high and --lora_path_low"
    width, layers = shapes["patch_embedding.weight"][0], 1 + max(_block_indices(shapes))
    file_width = _width(tensors)
    if problems.get("of another shape") and file_width not in (None, width):
        return f"it is for {_models_of(file_width)}, width {file_width}; this is {_models_of(width)}, width {width}"
    if (blocks := 1 + max(_block_indices(unknown), default=-1)) > layers:
        return f"it is for a model of {blocks} or more blocks; this one has {layers}"
    if len(unknown) == len(tensors):
        return "it does not look like a LoRA for Wan"
    return ""


def _block_indices(names: Iterable[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := re.search(r"(?<![a-z])blocks[._](\d+)[._]", name))]


def _width(tensors: Mapping[str, Tensor]) -> int | None:
    """The width of the model a LoRA was made for: the commonest input of its attention projections."""
    widths = Counter(
        tensor.shape[-1]
        for key, tensor in tensors.items()
        if tensor.ndim == 2 and _PARTS["down"].search(key) and re.search(r"(attn|attn1|attn2)[._](to_)?[qkv]\.", key)
    )
    return widths.most_common(1)[0][0] if widths else None


def _models_of(width: int) -> str:
    sizes = sorted({name.rpartition("-")[2] for name, config in VARIANTS.items() if config.dim == width})
    return f"Wan {' / '.join(sizes)}" if sizes else "another model"


def _by_pattern(keys: Iterable[str]) -> str:
    """Keys with the number of the block left open, each with its count: every key is listed, none twice."""
    counts = Counter(re.sub(r"(?<=blocks[._])\d+(?=[._])", "N", key) for key in keys)
    return ", ".join(f"{pattern} ({count})" if count > 1 else pattern for pattern, count in counts.items())


# ----------------------------------------------------------------------------------------------- applying


def merge_loras(
    transformer: WanTransformer, loras: Sequence[tuple[Lora, float]], device: torch.device | None = None
) -> None:
    """Add the changes to the weights. Each weight is summed in float32 over all LoRAs and rounded once.

    One weight at a time: beside the model there is never more than that weight in float32 and its change.

    Args:
        loras: each with its scale.
        device: where the sums are computed; the weights stay where they are.
    """
    parameters = dict(transformer.named_parameters())
    for name, change in lora_changes(loras, device).items():
        parameters[name].data = change(parameters[name].data)


def lora_changes(
    loras: Sequence[tuple[Lora, float]], device: torch.device | None = None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Parameter name -> what makes the changed weight of a weight, as `merge_loras` does: for those that are changed as
    they are read, before they are stored in float8.
    """

    def change(weight: Tensor, name: str) -> Tensor:
        place = device or weight.device
        changed = weight.to(place, torch.float32)
        for lora, scale in loras:
            if name in lora.pairs:
                changed = changed + scale * lora.pairs[name].delta(place).view(changed.shape)
            if name in lora.full:
                changed = changed + scale * lora.full[name].to(place, torch.float32)
        return changed.to(weight.device, weight.dtype)

    return {name: partial(change, name=name) for name in dict.fromkeys(n for lora, _ in loras for n in lora.targets)}


def attach_loras(transformer: WanTransformer, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add the changes at run time: x @ W.T + scale · alpha/rank · x @ A.T @ B.T. The weights keep their values.

    For weights that cannot take a small change (fp8), and to switch off between two steps (`switch_loras`) or change
    the scales (`transformer.set_adapters(["lora0", …], scales)`). What was computed with the old weights and kept (a
    `Prompt`'s keys and values, an `Identity`) has to be made anew then. Changes given in full (`Lora.full`) have no low
    rank to compute with: they are merged, and stay when the rest is switched off. Call it before the weights are cast
    to their storage dtype or offloaded.
    """
    merge_loras(transformer, [(Lora(lora.source, {}, lora.full), scale) for lora, scale in loras])
    kinds = {name: (parameter.dtype, parameter.shape) for name, parameter in transformer.named_parameters()}
    names = {}
    for number, (lora, scale) in enumerate(loras):
        if not lora.pairs:
            continue
        tensors = {}
        for weight, pair in lora.pairs.items():
            module = weight.removesuffix(".weight")
            dtype, shape = kinds[weight]
            if dtype.itemsize == 1:  # the weight is in float8
                dtype = transformer.compute_dtype
            down = pair.down.reshape(-1, *shape[1:])
            up = (pair.up.float() * pair.scale).reshape(shape[0], -1, *[1] * len(shape[2:]))
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down.to(dtype), up.to(dtype)
        names[f"lora{number}"] = scale
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is meant
            transformer.load_lora_adapter(tensors, prefix=None, adapter_name=f"lora{number}", low_cpu_mem_usage=True)
        for key, tensor in tensors.items():  # peft would have them in the dtype of the weight, which may be float8
            module, part, _ = key.rsplit(".", 2)
            factor = getattr(transformer.get_submodule(module), part)[f"lora{number}"].weight
            factor.data = tensor.to(factor.device)
    if names:
        transformer.set_adapters(list(names), list(names.values()))
        transformer.requires_grad_(False)


def switch_loras(transformer: WanTransformer, on: bool) -> None:
    """Have attached LoRAs work or not; off, the transformer is the base, bit for bit (but for changes in full)."""
    if on:
        transformer.enable_lora()
        transformer.requires_grad_(False)  # enabling is meant for training, too
    else:
        transformer.disable_lora()
