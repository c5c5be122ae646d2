"""Every released file layout -> tensors with original Wan key names -> a module, all or error.

Nothing here runs code from a file: safetensors, or `torch.load(weights_only=True)`.
Tensors are mapped from disk; a model is built on the meta device and filled tensor by tensor, so that it is
never in memory twice.

Layouts (Wan2.1 and Wan2.2 repositories, VideoX-Fun, Diffusers, ComfyUI, DiffSynth-Studio):
single files, shards with and without an index, `.pth`, `.ckpt` with a wrapper around the state dict,
prefixed keys, Diffusers' names, fp8 with scales.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from errors import WeightsError
from models.wan.config import WanConfig, detect_config, variant_name
from models.wan.float8 import KEPT, STORAGE, use_float8
from models.wan.transformer import WanTransformer

logger = logging.getLogger("selfsame")

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
_WRAPPERS = ("state_dict", "model_state", "model", "module")
_GGUF = "GGUF weights are not read yet; give safetensors, or the released files"
# What a file of another kind begins with, from this byte on. Of what is none of these torch.load says what is wrong.
_OTHER_KINDS = (
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"GIF8", "a GIF picture"),
    (4, b"ftyp", "an mp4 or mov video"),
    (8, b"WAVE", "a wav sound"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (0, b"Rar!", "a RAR archive: unpack it"),
)
_SHOWN = 3  # how many keys of each kind an error names


# ---------------------------------------------------------------------------------------------- reading


def read_tensors(path: str | Path, *, hint: str = "", nested: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a weights file, or of a folder that holds one set of weights, mapped from disk.

    Args:
        path: `.safetensors`, `.pth`, `.pt`, `.ckpt`, `.bin`, or a folder (index, shards, or one file).
        hint: what to do when the file is missing or damaged, e.g. the download command; ends the message.
        nested: keys of state dicts within the state dict; their names are put before those of their tensors.

    Raises:
        WeightsError: missing, truncated, not a weights file, would run code, or an incomplete set of shards.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, hint=hint):
        found = _read_file(file, hint, nested)
        if twice := tensors.keys() & found.keys():
            raise WeightsError(f"{file}: {_name_some(twice)} is also in another shard; remove the stale file")
        tensors |= found
    _check_index(Path(path), tensors, hint)
    return tensors


def weight_files(path: str | Path, *, hint: str = "") -> list[Path]:
    """The files `read_tensors` reads for `path`: itself, all shards, or the one weights file of a folder."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(_with_hint(f"{path}: no such file or folder", hint))
    if index := _index_file(path):
        names = sorted(set(_read_index(index).values()))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise WeightsError(_with_hint(f"{path}: {_name_some(missing)} of {len(names)} shards missing", hint))
        return [path / name for name in names]
    for suffix in SUFFIXES:  # safetensors first: a Wan folder holds the VAE and the text encoder as .pth beside it
        files = sorted(path.glob(f"*{suffix}"))
        shards = [match for file in files if (match := _SHARD.match(file.name))]
        if shards:
            return _complete_shards(path, shards, hint)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise WeightsError(f"{path}: holds several weights files ({names}); name one of them")
        if files:
            return files
    if found := sorted(path.glob("*.gguf")):
        raise WeightsError(f"{found[0]}: {_GGUF}")
    raise WeightsError(_with_hint(f"{path}: no weights in this folder ({', '.join(SUFFIXES)})", hint))


def part_of_release(path: str | Path, subfolder: str, pattern: str) -> Path:
    """Where one part of a release lies: `path` itself if it is a file; in a Diffusers repository the subfolder; in an
    original repository the one file that fits the pattern. Otherwise `path`, for the reader to judge.

    Raises:
        WeightsError: several files fit.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / subfolder).is_dir():
        return path / subfolder
    files = sorted(path.glob(pattern))
    if len(files) > 1:
        raise WeightsError(f"{path}: holds {_name_some(f.name for f in files)} files {pattern}; name one of them")
    return files[0] if files else path


def _index_file(folder: Path) -> Path | None:
    indices = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    if len(indices) > 1:
        raise WeightsError(f"{folder}: several indices ({', '.join(i.name for i in indices)}); keep one")
    return indices[0] if indices else None


def _read_index(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: not a shard index ({error!r}); download it again") from error


def _check_index(folder: Path, tensors: Mapping[str, Tensor], hint: str) -> None:
    if folder.is_dir() and (index := _index_file(folder)):
        missing = _read_index(index).keys() - tensors.keys()
        if missing:
            raise WeightsError(
                _with_hint(f"{folder}: {_name_some(missing)} listed in {index.name} but in no shard", hint)
            )


def _complete_shards(folder: Path, shards: list[re.Match], hint: str) -> list[Path]:
    sets = {(shard["stem"], shard["count"]) for shard in shards}
    if len(sets) > 1:
        names = ", ".join(f"{stem}-*-of-{count}" for stem, count in sorted(sets))
        raise WeightsError(f"{folder}: holds several sets of shards ({names}); keep one")
    found = {int(shard["number"]): folder / shard.string for shard in shards}
    count = int(shards[0]["count"])
    if missing := [number for number in range(1, count + 1) if number not in found]:
        names = [f"{shards[0]['stem']}-{n:05d}-of-{count:05d}{shards[0]['suffix']}" for n in missing]
        raise WeightsError(_with_hint(f"{folder}: {_name_some(names)} of {count} shards missing", hint))
    return [found[number] for number in sorted(found)]


_headers_only: ContextVar[bool] = ContextVar("headers_only", default=False)


@contextmanager
def headers_only() -> Iterator[None]:
    """Within this block all that is read from files has names, shapes and dtypes, but no values (the meta device): the
    very code that loads a model tells in milliseconds whether it could. Mapping a 14B model alone takes seconds.
    """
    token = _headers_only.set(True)
    try:
        yield
    finally:
        _headers_only.reset(token)


def _read_file(file: Path, hint: str, nested: Iterable[str]) -> dict[str, Tensor]:
    """One file, its kind told by its first bytes: names lie (renamed downloads, error pages, LFS pointers)."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        where = f"a link to {os.readlink(file)}, and there is " if file.is_symlink() else ""
        raise WeightsError(_with_hint(f"{file}: {where}{(error.strerror or str(error)).lower()}", hint)) from error
    if not start:
        raise WeightsError(_with_hint(f"{file}: empty file", hint))
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", start)
        expected = f" of a file of {int(size[1])} bytes" if size else ""
        raise WeightsError(_with_hint(f"{file}: a git-lfs pointer{expected}, not the weights; run git lfs pull", hint))
    if start.lstrip()[:1] == b"<" and b"\0" not in start[:8]:  # the length of a header may begin with a < as well
        raise WeightsError(_with_hint(f"{file}: a web page, not weights (a failed download)", hint))
    if start.startswith(b"GGUF"):
        raise WeightsError(f"{file}: {_GGUF}")
    has_header = start[8:9] == b"{"  # whose length, before it, may be any bytes
    kind = next((kind for at, magic, kind in _OTHER_KINDS if start.startswith(magic, at)), None)
    if kind is not None and not has_header:
        raise WeightsError(_with_hint(f"{file}: {kind}, not weights", hint))
    if file.suffix == ".safetensors" or has_header:
        header = safetensors_header(file, hint)
        if _headers_only.get():
            types = safetensors.torch._TYPES
            return {name: torch.empty(e["shape"], dtype=types[e["dtype"]], device="meta") for name, e in header.items()}
        try:
            return safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(_with_hint(f"{file}: damaged ({error})", hint)) from error
    return _unwrap(_torch_load(file, hint), file, nested)


# Name -> bytes an element takes, of the types that torch knows.
_DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit


def safetensors_header(file: str | Path, hint: str = "") -> dict[str, dict]:
    """The header of a safetensors file without its metadata: name -> {"dtype", "shape", "data_offsets"}, each checked.

    Format: 8 bytes little-endian header length, JSON header, then the tensors' bytes, without gap or overlap.

    Raises:
        WeightsError: truncated or damaged; one line that says where.
    """
    file = Path(file)
    found = file.stat().st_size
    with open(file, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if length > _MAX_HEADER:
            raise WeightsError(_with_hint(f"{file}: damaged, its header would take {length} bytes", hint))
        if length > found - 8:
            raise WeightsError(
                _with_hint(f"{file}: truncated, its header alone needs {length + 8} bytes, found {found}", hint)
            )
        try:
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_doubles)
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
            header.pop("__metadata__", None)
            for name, entry in header.items():
                _check_entry(name, entry)
        except (ValueError, RecursionError) as error:
            raise WeightsError(_with_hint(f"{file}: damaged safetensors header ({error})", hint)) from error
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, next_end = entry["data_offsets"]
        if begin != end:
            fault = "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes before it unused"
            raise WeightsError(_with_hint(f"{file}: damaged safetensors header ({name[:80]!r} {fault})", hint))
        end = next_end
    if found != (expected := 8 + length + end):
        state = "truncated" if found < expected else "damaged"
        raise WeightsError(_with_hint(f"{file}: {state}, expected {expected} bytes, found {found}", hint))
    return header


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} is in it twice")
    return content


def _check_entry(name: str, entry: object) -> None:
    """One tensor's entry in a header.

    Raises:
        ValueError: what is wrong with it.
    """
    name = repr(name[:80])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} is not dtype, shape and data_offsets")
    if not isinstance(dtype := entry["dtype"], str) or dtype not in _DTYPES:
        raise ValueError(f"{name} is of type {str(dtype)[:40]!r}, which is none of {', '.join(_DTYPES)}")
    for field in ("shape", "data_offsets"):
        numbers = entry[field]
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{field} of {name} is {str(numbers)[:80]}, no list of natural numbers")
    if len(entry["shape"]) > 64:
        raise ValueError(f"{name} has {len(entry['shape'])} dimensions")
    if len(offsets := entry["data_offsets"]) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets of {name} are {str(offsets)[:80]}, no begin and end")
    needed = math.prod(entry["shape"]) * _DTYPES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{name} of type {dtype} and shape {str(entry['shape'])[:80]} takes {needed} bytes, its data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )


def _torch_load(file: Path, hint: str) -> object:
    """`torch.load` without code execution. The zip format is mapped; the format before torch 1.6 cannot be."""
    is_zip = zipfile.is_zipfile(file)
    with open(file, "rb") as stream:
        if not is_zip and stream.read(1) != b"\x80":  # no pickle, of which torch would say that it is not to be trusted
            raise WeightsError(_with_hint(f"{file}: damaged or not a weights file", hint))
    try:
        where = "meta" if _headers_only.get() else "cpu"
        return torch.load(file, map_location=where, weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "weights only" not in str(error).lower():
            raise WeightsError(_with_hint(f"{file}: damaged or not a weights file ({error})", hint)) from error
        raise WeightsError(
            f"{file}: holds Python objects beside tensors, and loading them could run code; if you trust its source, "
            f"convert it once in an isolated place: torch.load it with weights_only=False and write its tensors "
            f"with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
        first_sentence = str(error).partition("\n")[0].partition(". ")[0]
        reason = f"{type(error).__name__}: {first_sentence}"
        raise WeightsError(_with_hint(f"{file}: damaged or not a weights file ({reason})", hint)) from error


def _unwrap(content: object, file: Path, nested: Iterable[str]) -> dict[str, Tensor]:
    """The state dict inside the dicts that trainers put around it."""
    while isinstance(content, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{file}: no state dict inside (found {type(content).__name__})")
    for name in nested:
        if isinstance(inner := content.get(name), Mapping):
            content = {key: value for key, value in content.items() if key != name}
            content |= {f"{name}.{key}": value for key, value in inner.items()}
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{file}: {_name_some(others)} in its state dict not a tensor")
    return dict(content)


# ------------------------------------------------------------------------------------------- assigning


def assign_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keep_float32: Iterable[str] = (),
    source: str | Path = "",
    scales: Mapping[str, Tensor] | None = None,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Replace every parameter and persistent buffer of `module` by the tensor of its name; all or error.

    A tensor that needs neither a cast nor a move stays mapped from disk; but where most of a file is cast, the rest is
    copied, so that nothing holds the file. Tied parameters stay tied, and one name of them is enough. The module is
    usually on the meta device; buffers that are not saved must already be real.

    Args:
        tensors: name -> tensor, exactly the names of `module.state_dict()`.
        dtype: of floating tensors; None keeps the file's.
        device: None leaves them where they are (mapped, on the CPU).
        keep_float32: substrings of names that become float32 whatever `dtype` says.
        source: names the file in errors.
        scales: name -> scale of an fp8 tensor; the value is `tensor * scale`. A `Float8Linear` keeps both as they are.
        changes: name -> what is made of the value, once it has its dtype and is on its device (a merged LoRA).

    Raises:
        WeightsError: missing, unexpected or misshapen tensors: one message with counts and first names.
    """
    targets = module.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = {}  # one target object -> all its names: tied parameters have several
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)
    missing = [names[0] for names in names_of.values() if not any(name in tensors for name in names)]
    unexpected = tensors.keys() - targets.keys()
    misshapen = {
        f"{name} {list(tensors[name].shape)} instead of {list(target.shape)}"
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    }
    mistyped = {
        f"{name} {str(tensors[name].dtype).removeprefix('torch.')}"
        for name, target in targets.items()
        if name in tensors and target.is_floating_point() and not tensors[name].is_floating_point()
    }
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "quantised in a way this loader does not read": mistyped,
    }
    if problems := [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]:
        place = f"{source}: " if source else ""
        raise WeightsError(f"{place}not the weights of {type(module).__name__}: " + "; ".join(problems))

    keep_float32, scales, changes = tuple(keep_float32), scales or {}, changes or {}
    mapped: list[Tensor] = []
    for names in names_of.values():
        name = next(name for name in names if name in tensors)
        kept = any(part in name for part in keep_float32)
        target, change = targets[name], changes.get(name)
        if target.dtype == STORAGE:
            owner = module.get_submodule(name.rpartition(".")[0])
            value, owner.scale = _to_float8(tensors[name], dtype, device, scales.get(name), change)
        else:
            value = _place(tensors[name], torch.float32 if kept else dtype, device, scales.get(name))
            value = change(value) if change is not None else value
        if isinstance(target, nn.Parameter):
            value = nn.Parameter(value, requires_grad=target.requires_grad)
        if not value.is_meta and value.data_ptr() == tensors[name].data_ptr():
            mapped.append(value)
        for alias in names:
            owner, _, attribute = alias.rpartition(".")
            setattr(module.get_submodule(owner), attribute, value)
    if 2 * sum(value.nbytes for value in mapped) < sum(tensor.nbytes for tensor in tensors.values()):
        for value in mapped:
            value.data = value.data.clone()
    for name, buffer in module.named_buffers():
        if name in targets:  # it comes from the file, and a check reads headers alone
            continue
        assert not buffer.is_meta, f"buffer {name} is not saved in checkpoints: build it on a real device"
        if device is not None:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, buffer.to(device))


def _place(
    tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None, scale: Tensor | None
) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(device=device)
    if tensor.dtype.itemsize == 1:  # fp8 is a storage format: values are only right after scaling, in a wider type
        dtype = dtype or torch.bfloat16
    if scale is None:
        return tensor.to(device=device, dtype=dtype)
    scale = _shape_scale(scale, tensor).to(device=device)
    return (tensor.to(device=device, dtype=torch.float32) * scale).to(dtype)


def _to_float8(
    tensor: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    scale: Tensor | None,
    change: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """A weight and its scale as a `Float8Linear` holds them: the file's own where it has them, else cast, without one.

    By way of the compute dtype, as if the model had been read first and cast then.
    """
    shaped = None if scale is None else _shape_scale(scale, tensor).to(device=device)
    storage = tensor.dtype if tensor.dtype in KEPT else STORAGE
    if tensor.dtype == storage and change is None:
        return tensor.to(device=device), shaped
    value = _place(tensor, dtype, device, scale)
    value = change(value) if change is not None else value
    if shaped is not None:
        largest = torch.finfo(storage).max
        value = (value.float() / shaped).clamp(-largest, largest)
    return value.to(storage), shaped


def _shape_scale(scale: Tensor, tensor: Tensor) -> Tensor:
    """One number, or one per output row, as it multiplies the tensor."""
    scale = scale.float()
    return scale.reshape(-1, *[1] * (tensor.ndim - 1)) if scale.numel() > 1 else scale.reshape(())


# ------------------------------------------------------------------------------- names of a transformer

# Original name -> Diffusers' name, in whole path components. Diffusers numbers the norms in the order they run.
_OUTSIDE_BLOCKS = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_INSIDE_BLOCKS = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{name}": f"attn1.{theirs}" for name, theirs in _ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{theirs}" for name, theirs in _ATTENTION.items()},
    **{f"self_attn.{name}": f"attn1.{name}" for name in ("norm_q", "norm_k")},
    **{f"cross_attn.{name}": f"attn2.{name}" for name in ("norm_q", "norm_k")},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}

# ComfyUI's single files, trainers' and other toolkits' prefixes.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "pipe.dit.", "dit.", "module.")


def to_diffusers_name(name: str) -> str:
    """`blocks.0.self_attn.q.weight` -> `blocks.0.attn1.to_q.weight`; names outside the table stay."""
    return _rename(name, _OUTSIDE_BLOCKS, _INSIDE_BLOCKS)


def to_original_name(name: str) -> str:
    """The inverse of `to_diffusers_name`."""
    return _rename(name, _invert(_OUTSIDE_BLOCKS), _invert(_INSIDE_BLOCKS))


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _rename(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    parts = name.split(".")
    start = 2 if parts[0] in ("blocks", "vace_blocks") else 0  # keep `blocks.<index>`
    table = inside if start else outside
    for end in range(len(parts), start, -1):
        if (new := table.get(".".join(parts[start:end]))) is not None:
            return ".".join([*parts[:start], new, *parts[end:]])
    return name


def convert_names(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Rename all keys, e.g. by `to_diffusers_name` for an export; two names must not become one."""
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise WeightsError(f"{len(tensors) - len(renamed)} tensors have the same name after renaming")
    return renamed


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's state dict of any layout -> original Wan names. Tensors are not touched."""
    prefix = next((p for p in _PREFIXES if f"{p}patch_embedding.weight" in tensors), "")
    if prefix == "model.diffusion_model.":  # an all-in-one file: the VAE and the text encoder are in it too
        others = [name for name in tensors if not name.startswith(prefix)]
        if others:
            logger.info("left %s outside the transformer", _name_some(others))
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    tensors = convert_names(tensors, lambda name: name.removeprefix(prefix))
    if any(name.startswith("condition_embedder.") for name in tensors):
        tensors = convert_names(tensors, to_original_name)
    return tensors


def split_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate the scales of fp8 files (ComfyUI, both its spellings) from the weights.

    Returns (weights, scales by weight name). Scales of activations are dropped: we compute in a wider type.
    """
    weights, scales, dropped = {}, {}, []
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale"):
            scales[f"{module}.weight"] = tensor
        elif last in ("scale_input", "input_scale", "comfy_quant", "scaled_fp8"):
            dropped.append(name)
        else:
            weights[name] = tensor
    if dropped:
        logger.info("activations are not scaled to fp8; left %s", _name_some(dropped))
    if orphans := scales.keys() - weights.keys():
        raise WeightsError(f"scales without their weights: {_name_some(orphans)}")
    return weights, scales


# --------------------------------------------------------------------------------- loading a transformer


def load_transformer(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
    expect: WanConfig | None = None,
    fp8: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    hint: str = "",
) -> WanTransformer:
    """Read a Wan transformer of any released layout and variant, told by its tensors.

    Args:
        path: a file, a folder of shards, or a Diffusers folder (its `transformer` is taken).
        dtype: of the linears; `WanTransformer._keep_in_fp32_modules` are float32 in any case.
        device: each tensor goes there as it is read; None leaves uncast tensors mapped from disk.
        num_heads: for head widths other than 128, where no config.json beside the file says it.
        expect: the variant that the caller can run.
        fp8: store the blocks' linears in float8, cast, or kept with their scales, as they are read.
        changes: as for `assign_tensors`.
        hint: what to do about missing files; ends the message.

    Raises:
        WeightsError: unreadable (`read_tensors`), not this network, another variant than expected, or a
            config.json beside the file that contradicts its tensors.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    stored = read_tensors(path, hint=hint)
    return transformer_from_tensors(
        stored, path, dtype=dtype, device=device, num_heads=num_heads, expect=expect, fp8=fp8, changes=changes
    )


def transformer_from_tensors(
    stored: Mapping[str, Tensor],
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
    expect: WanConfig | None = None,
    fp8: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> WanTransformer:
    """`load_transformer` for tensors that were read already; `path` is where from (messages, config.json)."""
    path = Path(path)
    settings = _read_config_json(path if path.is_dir() else path.parent)
    try:
        tensors, scales = split_scales(original_names(stored))
        config = _resolve_config({name: tensor.shape for name, tensor in tensors.items()}, settings, num_heads, expect)
    except (KeyError, ValueError, WeightsError) as error:
        detail = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{path}: not a Wan transformer this project can run: {detail}") from error
    if expect is not None and config != expect:
        raise WeightsError(f"{path}: holds {variant_name(config)}, expected {variant_name(expect)}")

    with torch.device("meta"):
        transformer = WanTransformer(**config.as_dict())
    if fp8:
        use_float8(transformer)
    assign_tensors(
        transformer,
        tensors,
        dtype=dtype,
        device=device,
        keep_float32=WanTransformer._keep_in_fp32_modules,
        source=path,
        scales=scales,
        changes=changes,
    )
    logger.info("loaded %s from %s", variant_name(config), path)
    return transformer.eval()


def _resolve_config(
    shapes: Mapping[str, tuple[int, ...]], settings: dict, num_heads: int | None, expect: WanConfig | None
) -> WanConfig:
    """What the tensors tell, completed by what they cannot: heads, eps and text length."""
    stated_heads = settings.get("num_heads")
    if num_heads and stated_heads and num_heads != stated_heads:
        raise ValueError(f"config.json beside it says {stated_heads} heads, asked for {num_heads}")
    config = detect_config(shapes, num_heads or stated_heads or (expect and expect.num_heads))
    if expect is not None:
        config = replace(config, eps=expect.eps, text_len=expect.text_len, patch_size=expect.patch_size)
    elif settings:
        config = replace(config, **{name: settings[name] for name in ("eps", "text_len") if name in settings})
    found = config.as_dict()
    for name, value in settings.items():
        if found[name] != value:
            raise ValueError(f"config.json beside it says {name} {value}, its tensors say {found[name]}")
    return config


def _read_config_json(folder: Path) -> dict:
    """WanConfig fields from a config.json in the original or Diffusers' spelling; {} if there is none for Wan."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file}: not valid JSON ({error})") from error
    same = ("ffn_dim", "num_layers", "freq_dim", "text_dim", "eps")
    if "num_attention_heads" in content and "attention_head_dim" in content:
        settings = {"num_heads": content["num_attention_heads"]}
        settings["dim"] = content["num_attention_heads"] * content["attention_head_dim"]
        settings |= {"in_dim": content["in_channels"], "out_dim": content["out_channels"]}
    elif "num_heads" in content:
        settings = {
            name: content[name] for name in ("num_heads", "dim", "in_dim", "out_dim", "text_len") if name in content
        }
    else:
        return {}  # it belongs to another model in the same folder
    return settings | {name: content[name] for name in same if name in content}


# -------------------------------------------------------------------------------------------- fingerprint

_WHOLE_BELOW = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**18
_SMALL_TENSOR, _END_BYTES = 2**17, 2**12  # read whole up to that; of larger ones each end


def fingerprint(path: str | Path) -> str:
    """A short name for exactly these weights, for a video's metadata.

    `sha256:…` is the plain SHA-256 of one file below 64 MiB. `sampled-sha256:…` covers larger files and folders:
    of each file its size, its first MiB or whole safetensors header, 64 pieces of 256 KiB spread evenly from start to
    end, and of each tensor all where it is small (a bias, a norm), else both ends: a fine-tune, a merge or one changed
    layer differs. It is no proof against somebody who hides a change.

    Raises:
        WeightsError: missing, or a safetensors file whose header is damaged.
    """
    files = weight_files(path)
    if len(files) == 1 and files[0].stat().st_size < _WHOLE_BELOW:
        with open(files[0], "rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(struct.pack("<Q", size))
        with open(file, "rb") as stream:
            head = stream.read(8)
            is_safetensors = file.suffix == ".safetensors" and len(head) == 8
            digest.update(head + stream.read(min(struct.unpack("<Q", head)[0], size) if is_safetensors else 2**20))
            for piece in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * piece // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
            for begin, end in _tensor_ranges(file):
                is_small = end - begin <= _SMALL_TENSOR
                for start in (begin,) if is_small else (begin, end - _END_BYTES):
                    stream.seek(start)
                    digest.update(stream.read(end - begin if is_small else _END_BYTES))
    return f"sampled-sha256:{digest.hexdigest()}"


def _tensor_ranges(file: Path) -> list[tuple[int, int]]:
    """Where each tensor's bytes begin and end, in order: of a safetensors file, or of the archive that torch writes.

    Of other formats, as torch wrote them before 1.6, none.
    """
    if file.suffix == ".safetensors":
        offsets = [entry["data_offsets"] for entry in safetensors_header(file).values()]
        data = file.stat().st_size - max((end for _, end in offsets), default=0)
        return sorted((data + begin, data + end) for begin, end in offsets)
    try:
        with zipfile.ZipFile(file) as archive:
            begins = sorted(record.header_offset for record in archive.infolist())
            return list(itertools.pairwise([*begins, archive.start_dir]))
    except (zipfile.BadZipFile, OSError, ValueError):
        return []


# -------------------------------------------------------------------------------------------- messages


def _first(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _name_some(names: Iterable[str]) -> str:
    """`1 (a)`, `5 (a, b, c, …)`."""
    names = list(names)
    return f"{len(names)} ({_first(names)})"


def _with_hint(message: str, hint: str) -> str:
    return f"{message}; {hint}" if hint else message
