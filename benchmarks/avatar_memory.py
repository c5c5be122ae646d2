"""Peak memory of a talking video, ten seconds against a minute: it should differ by the latents alone.

    python -m benchmarks.avatar_memory
    python -m benchmarks.avatar_memory --seconds 10 600 --size 256
    python -m benchmarks.avatar_memory --modes                       # ten seconds in every memory mode

Each video is made by infer_audio_avatar.py in a process of its own, with the tiny model; the peak is of that process
(the system's resident set, in which the memory-mapped latents count too), not of the ffmpeg it writes through.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

from benchmarks.vae_memory import peak_mb
from preprocess.audio import SAMPLE_RATE, write_wav

MODES = ("model_full_load", "model_cpu_offload", "model_cpu_offload_and_qfloat8", "sequential_cpu_offload")


def make_in_this_process(flags: list[str]) -> None:
    """Make a video and print: MB at the peak of making it, of which imports, seconds."""
    import pipelines.audio_avatar.pipeline  # noqa: F401 - so that its size is known apart
    from infer_audio_avatar import main, parse_args

    before, start = peak_mb(), time.perf_counter()
    main(parse_args(flags))
    print(peak_mb(), before, time.perf_counter() - start)


def measure(seconds: float, size: int, steps: int, *flags: str) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        sound, output = Path(folder, "in.wav"), Path(folder, "out.mp4")
        write_wav(sound, 0.1 * numpy.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE)), SAMPLE_RATE)
        flags = (*flags, "--audio", sound, "--output", output, "--height", size, "--width", size)
        command = [sys.executable, "-m", "benchmarks.avatar_memory", "--one", *flags, "--sample_steps", steps]
        result = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    return tuple(map(float, result.stdout.split()[-3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs=2, default=[10, 60], help="lengths of sound (default 10 60)")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--modes", action="store_true", help="compare memory modes on the first length")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # the child: these flags
    args = parser.parse_args()
    if args.one is not None:
        make_in_this_process(args.one)
        return
    if args.modes:
        for mode in MODES:
            peak, before, spent = measure(args.seconds[0], args.size, args.steps, "--GPU_memory_mode", mode)
            print(f"{mode:30s} peak {peak:6.0f} MB, of which imports {before:5.0f} MB, {spent:5.0f} s")
        return
    peaks = []
    for seconds in args.seconds:
        peak, before, spent = measure(seconds, args.size, args.steps)
        latents = (seconds * 25 / 4) * 16 * (args.size / 8) ** 2 * 4 / 2**20
        peaks.append(peak)
        print(
            f"{seconds:5g} s of sound: peak {peak:6.0f} MB, of which imports {before:5.0f} MB; "
            f"latents {latents:5.1f} MB; {spent:.0f} s"
        )
    print(f"ratio of the peaks: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
