"""Peak memory of a streaming VAE decode, short clip against long: it should not depend on the length.

    python -m benchmarks.vae_memory
    python -m benchmarks.vae_memory --frames 81 1281 --size 256 --base-dim 96

Each clip is decoded in a process of its own, whose peak resident memory the system reports. The network has the
released shape at a chosen width, with random weights; latents are made as the decoder asks for them.
"""

import argparse
import resource
import subprocess
import sys
import time


def decode_in_this_process(frames: int, size: int, base_dim: int, chunk: int) -> None:
    """Decode and print: MB before the first frame, MB at the peak, seconds."""
    import torch
    from diffusers import AutoencoderKLWan

    from models.wan.vae import WanVAE

    torch.manual_seed(0)
    vae = WanVAE(AutoencoderKLWan(base_dim=base_dim)).eval()
    side = size // vae.spatial_factor
    before, start, decoded = peak_mb(), time.perf_counter(), 0
    latents = (torch.randn(1, vae.latent_channels, 1, side, side) for _ in range((frames - 1) // 4 + 1))
    for part in vae.decode_stream(latents, chunk):
        decoded += part.shape[2]
    assert decoded == frames
    print(before, peak_mb(), time.perf_counter() - start)


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, kilobytes elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs=2, default=[81, 321], help="lengths, 4·n + 1 (default 81 321)")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--base-dim", type=int, default=16, help="width of the network; the released one has 96")
    parser.add_argument("--chunk", type=int, default=1, help="latent frames at a time")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the child: decode this many frames
    args = parser.parse_args()
    if args.one:
        return decode_in_this_process(args.one, args.size, args.base_dim, args.chunk)

    options = ["--size", str(args.size), "--base-dim", str(args.base_dim), "--chunk", str(args.chunk)]
    peaks, needed = [], []
    for frames in args.frames:
        command = [sys.executable, "-m", "benchmarks.vae_memory", "--one", str(frames), *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        before, peak, seconds = map(float, output.split()[-3:])
        peaks.append(peak)
        needed.append(peak - before)
        print(f"{frames:5d} frames: peak {peak:7.0f} MB, of which decoding {peak - before:6.0f} MB, {seconds:.0f} s")
    print(f"ratio: peak {peaks[1] / peaks[0]:.3f}, decoding alone {needed[1] / needed[0]:.3f}")
    return None


if __name__ == "__main__":
    main()
