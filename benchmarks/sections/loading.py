"""Seconds to read a transformer from files of the released layout onto the device."""

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.sections.bench import GIB, Bench, Row
from benchmarks.sections.models import num_parameters, random_transformer
from models.wan.checkpoint import load_transformer
from models.wan.config import WanConfig

SHARD_BYTES = 10 * GIB  # the released shards' size
DISK = 5e8  # bytes/s, from below, of writing, and of reading three times


def measure(bench: Bench) -> None:
    """Files are written to a temporary folder and dropped from the system's cache (where it has a call for that) before
    the first reading. 1.3B is released in float32 and 14B too, whose files are written in bf16 here.
    """
    for name, config in bench.sizes.transformers.items():
        dtype = torch.bfloat16 if name == "14B" else torch.float32
        size = dtype.itemsize * num_parameters(config)
        bench.free()
        # Files of 14B are of least worth here: they may take half of the time that is left.
        needed = 4 * size / DISK * (2 if name == "14B" else 1)
        bench.attempt(
            f"{name}, {str(dtype).removeprefix('torch.')} files",
            functools.partial(_row, bench, config, dtype, size),
            seconds=needed,
            disk=size,
            host=min(size, 2 * SHARD_BYTES) if bench.on_gpu else 2 * size,
            device=2 * num_parameters(config),
        )


def _row(bench: Bench, config: WanConfig, dtype: torch.dtype, size: int) -> Row:
    with tempfile.TemporaryDirectory(dir=bench.folder, prefix="selfsame-") as folder:
        write_release(Path(folder), config, dtype, bench.device)
        bench.free()
        bench.forget_peak()

        def load(fp8: bool = False) -> None:
            load_transformer(folder, dtype=torch.bfloat16, device=bench.device, expect=config, fp8=fp8)

        cold = bench.seconds(load)
        bench.free()
        warm = bench.seconds(load)
        peak = bench.peak()
        bench.free()
        bench.forget_peak()
        to_fp8 = bench.seconds(functools.partial(load, fp8=True))
        peak |= {f"{name}, --fp8": value for name, value in bench.peak().items()}
    found = {"GB": size / 1e9, "seconds, first": cold, "GB/s": size / 1e9 / cold, "seconds, again": warm}
    return found | {"seconds, --fp8": to_fp8} | peak


def write_release(folder: Path, config: WanConfig, dtype: torch.dtype, device: torch.device) -> None:
    """A transformer of random weights as Wan's repositories hold it: one file, or shards and their index."""
    tensors = random_transformer(config, device, dtype).state_dict()
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    stem, count = "diffusion_pytorch_model", len(shards)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        save_file({name: tensors[name].to("cpu", dtype) for name in shard}, folder / file)
        forget(folder / file)
    if count > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def forget(file: Path) -> None:
    """Write a file to the disk and drop it from the system's cache."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
