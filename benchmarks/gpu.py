"""What this project does on the GPU at hand, as tables for RESULTS.md: one command, under ten minutes, no downloads.

    python -m benchmarks.gpu > gpu.md                  all sections, released shapes with random weights
    python -m benchmarks.gpu --quick                   1.3B alone, fewer runs
    python -m benchmarks.gpu --only steps vae --minutes 20
    python -m benchmarks.gpu --device cpu              tiny shapes: shows that it runs, its times mean nothing

Sections run in order of worth. What time or memory do not suffice for is skipped by name, and what fails is named with
its reason; the rest goes on. Each table is printed as it is done; progress goes to standard error.

Needs torch (of another version too), diffusers, transformers, accelerate and safetensors, and what these bring.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import logging
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers.utils import logging as diffusers_logging

from benchmarks.sections import loading, memory, plugins, precision, steps, vae
from benchmarks.sections.bench import RELEASED, TINY, Bench, table

logger = logging.getLogger("selfsame")

# In order of worth: what comes first is least likely to be skipped.
SECTIONS = {
    "steps": ("One step against the limit and against diffusers", steps.measure),
    "precision": ("Distance from float32", precision.measure),
    "vae": ("VAE", vae.measure),
    "plugins": ("What plug-ins add to a step", plugins.measure),
    "loading": ("Loading a transformer", loading.measure),
    "memory": ("Memory modes", memory.measure),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="default: the accelerator that torch finds")
    parser.add_argument("--minutes", type=float, default=9.0, help="what would end later is skipped (default 9)")
    parser.add_argument("--quick", action="store_true", help="the smallest model alone, one run after the warm-up")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--runs", type=int, default=3, help="of which each figure is the median (default 3)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where weights to load are written for a while")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict]]:
    """Print the report. Returns the rows of each section."""
    args = parse_args(arguments)
    started = time.monotonic()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    diffusers_logging.set_verbosity_error()
    if args.device != "cpu" and not torch.accelerator.is_available():
        raise SystemExit("torch finds no GPU here; --device cpu runs tiny shapes, to show that everything runs")
    device = torch.device(args.device or torch.accelerator.current_accelerator())
    sizes = TINY if device.type == "cpu" else RELEASED
    if args.quick:
        first = next(iter(sizes.transformers))
        sizes = dataclasses.replace(sizes, transformers={first: sizes.transformers[first]})
    bench = Bench(device, sizes, 1 if args.quick else max(1, args.runs), started + 60 * args.minutes, Path(args.folder))

    out = sys.stdout
    given = sys.argv[1:] if arguments is None else arguments
    out.write(f"## On {device_name(device)}\n\n`{shlex.join(['python', '-m', 'benchmarks.gpu', *given])}`\n")
    out.write(f"({datetime.date.today()}; {versions(device)})\n\n")
    product = bench.measure_rate()
    side = sizes.product_side
    out.write(
        f"The limit: a bf16 product of two {side}x{side} matrices takes {product['ms']:.3g} ms, "
        f"{product['TFLOP/s']:.4g} TFLOP/s.\n"
    )
    if device.type == "cpu":
        out.write("\nTiny shapes on a CPU: this shows that every section runs. Its times and shares mean nothing.\n")
    results = {}
    for name in args.only or SECTIONS:
        title, measure = SECTIONS[name]
        logger.info("-- %s (%.0f s left)", title, bench.seconds_left())
        results[name] = bench.rows = []
        try:
            bench.attempt("this section", lambda measure=measure: measure(bench))
        finally:  # stopped by hand, what was measured is shown
            note = " ".join((measure.__doc__ or "").split())
            out.write(f"\n### {title}\n\n{note}\n\n{table(bench.rows)}\n")
            out.flush()
        bench.free()
    out.write(f"\nAll of it took {time.monotonic() - started:.0f} s.\n")
    return results


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return platform.processor() or platform.machine() if device.type == "cpu" else str(device)


def versions(device: torch.device) -> str:
    """Driver, CUDA, cuDNN, and the packages that matter; those that are not here are left out."""
    found = [f"Python {platform.python_version()}"]
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            driver = []
        found += [f"driver {driver[0] if driver else 'unknown'}", f"CUDA {torch.version.cuda}"]
        found.append(f"cuDNN {torch.backends.cudnn.version()}")
    for package in ("torch", "diffusers", "transformers", "accelerate", "flash_attn", "flash_attn_3", "sageattention"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
