"""Video files read: what a video is, and its frames, upright, 8-bit BT.709 and at one rate.

info = probe("walk.mp4")                               # size, rate, length; damage is found here
for frame in stream_frames("walk.mp4"):                # (H, W, 3) uint8 RGB, info.num_frames of them
    …
"""

import functools
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy

from errors import InputError
from preprocess.ffmpeg import (
    check_frame_size,
    ffmpeg_exe,
    has_filter,
    media_input,
    probe_streams,
    readable_file,
    reasons,
    run_ffmpeg,
)
from preprocess.video_conversion import constant_rate, conversion_filters

logger = logging.getLogger("selfsame")


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, as `read_frames` gives it."""

    width: int  # what is shown, a phone's rotation applied
    height: int
    fps: float  # mean over the file
    num_frames: int
    has_audio: bool
    duration: float  # seconds of the video stream
    pix_fmt: str
    start: float = 0.0  # seconds from the file's start, where the sound may begin, to the first frame


def probe(path: str | os.PathLike) -> VideoInfo:
    """Measure a video by decoding it once: what is damaged is found here, before anything else is begun.

    Raises:
        InputError: missing, damaged (also a file cut off in the middle), without video, or with frames of more than
            `MAX_PIXELS`, none of which is decoded.
    """
    return measure(path)[0]


def measure(path: str | os.PathLike) -> tuple[VideoInfo, numpy.ndarray]:
    """What a video is, and how often each stored frame is shown at its mean rate (`constant_rate`)."""
    about = readable_file(path).stat()
    return measure_version(os.fspath(path), about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=16)
def measure_version(path: str, mtime_ns: int, size: int) -> tuple[VideoInfo, numpy.ndarray]:
    """`measure`, once for each version of a file."""
    streams = probe_streams(path)
    if streams.video is None:
        raise InputError(f"{path} has no video stream; give a video file")
    # framecrc: a header "#key 0: value", then one line a frame: stream, dts, pts, duration, bytes, checksum.
    # Packets would be quicker to count, but a cut file has some that are never shown, and older codecs hide others.
    command = ["-xerror", *media_input(path), "-map", "0:V:0", "-fps_mode", "passthrough"]
    result = run_ffmpeg(*command, "-enc_time_base", "demux", "-f", "framecrc", "pipe:1")
    lines = result.stdout.decode().splitlines()
    header = dict(line[1:].split(": ", 1) for line in lines if line.startswith("#") and ": " in line)
    frames = [line.split(",") for line in lines if not line.startswith("#")]
    if result.returncode != 0 or not frames:
        check_frame_size(path, result.stderr.decode(errors="replace"))
        raise InputError(f"{path} cannot be read as a video: {reasons(result.stderr, 'no frames in it')[0]}")
    times = [int(frame[2]) * Fraction(header["tb 0"]) for frame in frames]
    last = int(frames[-1][3]) * Fraction(header["tb 0"])
    if last <= 0:  # not every container says how long its last frame is shown
        last = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / streams.stated_fps
    duration = times[-1] - times[0] + last
    if duration <= 0:
        raise InputError(f"{path} cannot be read as a video: its {len(frames)} frames are all shown at the same time")
    width, height = map(int, header["dimensions 0"].split("x"))
    fps = float(len(frames) / duration)
    info = VideoInfo(
        width,
        height,
        fps,
        len(frames),
        streams.has_audio,
        float(duration),
        streams.video.pix_fmt,
        max(float(times[0]), 0.0),
    )
    return info, constant_rate([float(time) for time in times], fps)


def read_frames(path: str | os.PathLike) -> numpy.ndarray:
    """A whole video in memory, (F, H, W, 3) uint8 RGB; see `stream_frames`."""
    info = probe(path)
    frames = numpy.empty((info.num_frames, info.height, info.width, 3), numpy.uint8)
    for i, frame in enumerate(stream_frames(path)):
        frames[i] = frame
    return frames


def stream_frames(path: str | os.PathLike) -> Iterator[numpy.ndarray]:
    """The frames of a video one by one, (H, W, 3) uint8 RGB: `num_frames` of them at `fps`, as `probe` says.

    From a progressive SDR video of a constant rate every stored frame comes once, just as decoded. Others are
    converted, with a message about each conversion: see `preprocess.video_conversion`.

    Raises:
        InputError: missing, damaged, or without video.
    """
    info, shown = measure(path)
    filters, messages = conversion_filters(probe_streams(path).video, has_filter)
    for message in messages:
        logger.warning("%s %s", path, message)
    if (shown != 1).any():
        logger.warning(
            "%s has a variable frame rate: read at its mean of %.5g a second, %d of %d frames left out, %d repeated",
            *(path, info.fps, (shown == 0).sum(), info.num_frames, (shown > 1).sum()),
        )
    filters = [*filters, "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp,format=rgb24"]
    command = ["-xerror", *media_input(path), "-map", "0:V:0", "-fps_mode", "passthrough", "-vf", ",".join(filters)]
    frame_bytes = info.height * info.width * 3
    process = subprocess.Popen(
        [ffmpeg_exe(), "-nostdin", "-v", "error", *command, "-f", "rawvideo", "pipe:1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=frame_bytes,
    )
    said = []
    listener = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)  # an unread pipe could fill up
    listener.start()
    try:
        for times in shown:
            data = process.stdout.read(frame_bytes)
            if len(data) < frame_bytes:
                break
            for _ in range(times):
                yield numpy.frombuffer(data, numpy.uint8).reshape(info.height, info.width, 3)
        else:
            data = process.stdout.read(1)  # nothing may be left
            if process.wait() == 0 and not data:
                return
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        listener.join()
        process.stderr.close()
    raise InputError(f"{path} cannot be decoded: {reasons(b''.join(said), 'its size changes')[0]}")
