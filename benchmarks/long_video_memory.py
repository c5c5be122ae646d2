"""Peak memory and time of a long video, few clips against many: the one must not grow with the clips, the other only
as they do.

    python -m benchmarks.long_video_memory
    python -m benchmarks.long_video_memory --clips 3 20 --variant 2.0-pro --config tiny-i2v-a14b

Each video is made by infer_long_video.py in a process of its own, whose peak resident memory the system reports (its
ffmpeg processes are not counted). Seconds are of the clips alone: loading is the same for both.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parent.parent


def make_in_this_process(flags: list[str]) -> None:
    """Make the video, and print the peak in MB."""
    import logging

    import infer_long_video

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    infer_long_video.main(infer_long_video.parse_args(flags))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak", peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs=2, default=[3, 20])
    parser.add_argument("--variant", default="shot")
    parser.add_argument("--config", default="tiny-i2v")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=9, help="of each clip")
    args = parser.parse_args()

    peaks, seconds = [], []
    for count in args.clips:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--variant", args.variant, "--config", args.config, "--num_clips", str(count)]
            flags += ["--height", str(args.size), "--width", str(args.size), "--num_frames", str(args.frames)]
            flags += ["--num_inference_steps", "2", "--output", f"{folder}/out.mp4"]
            child = [sys.executable, "-c", CHILD, *flags]
            result = subprocess.run(child, cwd=PROJECT, check=True, capture_output=True, text=True)
        peaks.append(float(re.search(r"^peak (.*)$", result.stdout, re.MULTILINE)[1]))
        seconds.append(float(re.search(r"frames in ([\d.]+) s", result.stderr)[1]))
        print(f"{count:4d} clips: peak {peaks[-1]:6.0f} MB, {seconds[-1]:6.1f} s, {seconds[-1] / count:.2f} s a clip")
    per_clip = [time / count for time, count in zip(seconds, args.clips, strict=True)]
    print(f"ratio: peak {peaks[1] / peaks[0]:.3f}, seconds a clip {per_clip[1] / per_clip[0]:.3f}")


CHILD = "import sys; from benchmarks.long_video_memory import make_in_this_process as m; m(sys.argv[1:])"

if __name__ == "__main__":
    main()
