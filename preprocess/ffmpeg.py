"""ffmpeg: the binary that imageio-ffmpeg brings, how files are named to it, and what it says of a file's streams."""

import functools
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from errors import InputError, ResourceError
from preprocess.video_conversion import StreamFormat


def ffmpeg_exe() -> str:
    """The ffmpeg binary: the one of imageio-ffmpeg, or what IMAGEIO_FFMPEG_EXE names."""
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ResourceError(f"no ffmpeg: {error}; run `pip install imageio-ffmpeg`") from None


def run_ffmpeg(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([ffmpeg_exe(), "-nostdin", "-v", "error", *arguments], capture_output=True)


@functools.lru_cache
def has_filter(name: str) -> bool:
    """Whether this ffmpeg has a filter: builds differ."""
    return f" {name} ".encode() in run_ffmpeg("-filters").stdout


def ffmpeg_url(path: str | os.PathLike) -> str:
    """A path as ffmpeg must be told it: `-y`, `a:b.mp4` and `concat:x` are files, no flags or protocols."""
    return f"file:{os.path.abspath(path)}"


MAX_PIXELS = 2**26  # a video's frame may have them: twice what 8K has

# Demuxers that read one file and nothing beside it. Not here: playlists and lists of files (hls, dash, concat, imf),
# scripts (avisynth), numbered pictures (image2), drawings with links (svg), and text drawn as pictures (tty).
FORMATS = (
    "3g2,3gp,aac,ac3,aiff,amr,ape,apng,asf,au,av1,avi,caf,dnxhd,dsf,dts,dv,eac3,flac,flv,gif,gxf,h264,hevc,ivf,loas,"
    "m4a,m4v,matroska,mj2,mjpeg,mov,mp3,mp4,mpc,mpc8,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,oma,rm,tak,truehd,tta,vc1,"
    "voc,vvc,w64,wav,webm,webp_anim,wtv,wv,yuv4mpegpipe"
)


def media_input(path: str | os.PathLike) -> list[str]:
    """ffmpeg's arguments for a file from outside, read as one of `FORMATS`: no other file and no address is opened, and
    no frame of more than `MAX_PIXELS` is decoded.
    """
    limits = ["-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-max_pixels", str(MAX_PIXELS)]
    return [*limits, "-i", ffmpeg_url(path)]


def readable_file(path: str | os.PathLike) -> Path:
    if not os.path.isfile(path):
        raise InputError(f"{str(path)[:300]} is {'a folder' if os.path.isdir(path) else 'missing'}; give a media file")
    return Path(path)


def reasons(stderr: bytes, otherwise: str) -> list[str]:
    """ffmpeg's error lines without the "[component @ address]" in front; `otherwise` if there are none."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return [re.sub(r"^(\[[^]]*\] *)+", "", line.strip()) for line in lines] or [otherwise]


def check_frame_size(path: str | os.PathLike, said: str) -> None:
    """Whether ffmpeg refused frames for their size. said: its messages.

    Raises:
        InputError: it did.
    """
    if size := re.search(r"Picture size (\d+x\d+) (is invalid|exceeds)", said):
        raise InputError(
            f"{path} has frames of {size[1]}, at most {MAX_PIXELS / 1e6:.0f} megapixels are accepted; make it smaller"
        )


@dataclass(frozen=True)
class Streams:
    """What ffmpeg's banner tells about a file."""

    video: StreamFormat | None
    has_audio: bool
    stated_fps: float


def probe_streams(path: str | os.PathLike) -> Streams:
    """Which streams a media file has. imageio-ffmpeg brings no ffprobe, so this reads ffmpeg's banner.

    Raises:
        InputError: missing, nothing that ffmpeg can read, or with frames of more than `MAX_PIXELS`.
    """
    command = [ffmpeg_exe(), "-nostdin", "-hide_banner", *media_input(readable_file(path))]
    banner = subprocess.run(command, capture_output=True).stderr.decode(errors="replace")
    if "Input #0" not in banner:
        raise InputError(f"{path} is no audio or video that ffmpeg can read; give an mp4, webm, wav, mp3 or the like")
    lines = [line for line in banner.splitlines() if re.match(r"\s*Stream #0:", line)]
    video = [line for line in lines if ": Video:" in line and "(attached pic)" not in line]  # no album covers
    size = re.search(r", (\d+)x(\d+)\b", video[0]) if video else None
    if size and int(size[1]) * int(size[2]) > MAX_PIXELS:  # the header says so
        check_frame_size(path, f"Picture size {size[1]}x{size[2]} exceeds")
    if video and not size:
        check_frame_size(path, banner)
    rate = re.search(r", ([\d.]+) fps", video[0]) if video else None
    return Streams(
        video=StreamFormat.from_banner(video[0]) if video else None,
        has_audio=any(": Audio:" in line for line in lines),
        stated_fps=float(rate[1]) if rate and float(rate[1]) > 0 else 25.0,
    )
