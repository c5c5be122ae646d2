"""Video files: frames in, a whole mp4 out (or nothing), and what made it kept inside and beside it.

    path = resolve_output(args.output, overwrite=args.overwrite)               # before anything heavy
    with VideoWriter(path, fps=16, metadata=settings) as video:                # out.mp4 and out.json
        for frames in vae.decode_stream(latents):                              # (1, 3, f, H, W) in [-1, 1]
            video.write(frames)

ffmpeg (the binary that imageio-ffmpeg brings) runs as our own subprocess, fed with raw frames, so memory stays flat.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy

from errors import InputError, ResourceError, UsageError
from preprocess.ffmpeg import ffmpeg_exe, ffmpeg_url, media_input, probe_streams, reasons, run_ffmpeg
from preprocess.output import cannot_write, create_empty, part_of, put_in_place, readable_bytes, write_new
from preprocess.record import read_comment, read_metadata, sidecar_path, to_json, without_folders
from preprocess.video import probe

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are not kept apart there
    fcntl = None

logger = logging.getLogger("selfsame")

ENCODER_THREADS = 4  # fixed, not one per core: x264's output depends on the number of threads

# RGB -> YUV by the BT.709 matrix in limited ("tv") range, and tagged as such. ffmpeg's own default is the BT.601 matrix
# without a tag; players take HD for BT.709 then, and every colour shifts.
TO_BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)

# An mp4 with its index in front, so that a browser plays it while it loads; and without version strings or dates.
MP4 = ["-movflags", "+faststart", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact", "-f", "mp4"]


class VideoWriter:
    """Write an H.264 mp4 (yuv420p, BT.709, index in front) chunk by chunk; it appears whole, or not at all.

    The work goes to `.NAME.part.mp4` in the same folder, which is synced to disk and renamed when the `with` block ends
    well; any exception in it, Ctrl-C included, removes it. While the block is open a lock keeps other runs off `path`.
    Equal frames, settings and ffmpeg give equal bytes.

    Args:
        path: where to write, as `resolve_output` returns it. An existing file is replaced at the end, not before.
        fps: frames per second, 0.1 to 1000 (23.976 is kept as 2997/125).
        quality: 1 (smallest) to 10 (best). imageio's rule for libx264, crf = int((1 - quality / 10) * 51), except that
            10 gives crf 1: crf 0 is lossless, an H.264 profile that browsers and most players do not decode.
        metadata: JSON-like dict of what made the video. Goes into NAME.json, indented, and into the mp4's comment tag,
            there without the folders of the files it names (`without_folders`).
            What JSON does not know (a path, a dtype) is stored as its `str`.
        audio_path: a file whose first audio stream becomes the sound: encoded as AAC, cut to the video's length or
            padded with silence.
        audio_start: where in that file the video begins, in seconds.

    Raises:
        UsageError: fps or quality out of bounds, or another run is writing the same file.
        InputError: `audio_path` has no readable audio.
        ResourceError: ffmpeg died, which is nearly always a full disk; or the file could not be put in place.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        fps: float,
        quality: float = 9,
        metadata: dict | None = None,
        audio_path: str | os.PathLike | None = None,
        audio_start: float = 0.0,
    ):
        if not 0.1 <= fps <= 1000:
            raise UsageError(f"fps is {fps}; a number from 0.1 to 1000 is accepted, 16 for instance")
        if not 1 <= quality <= 10:
            raise UsageError(f"quality is {quality}; 1 (smallest file) to 10 (best picture) is accepted")
        if audio_path is not None and not probe_streams(audio_path).has_audio:
            raise InputError(f"{audio_path} has no sound to put into the video; give a file with an audio stream")
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator()
        self.crf = max(int((1 - quality / 10) * 51), 1)
        self._ffmpeg = None
        self.metadata: dict | None = None
        if metadata is not None:
            self.describe(metadata)  # now, so that a bad value fails early
        self.audio_path, self.audio_start = audio_path, audio_start
        self.num_frames = 0
        self.width = self.height = None  # the file's, known from the first frames on
        self._given_size = None  # (height, width) of the frames; the file's may be one larger
        self.part, self.sound_part = part_of(self.path, "mp4"), part_of(self.path, "sound.mp4")
        self.sidecar, self.sidecar_part = sidecar_path(self.path), part_of(self.path, "json")
        self.comment, self.list = part_of(self.path, "ffmetadata"), part_of(self.path, "ffconcat")

    def __enter__(self) -> "VideoWriter":
        self._resources = contextlib.ExitStack()
        try:
            self._lock()
            for part in (self.sound_part, self.sidecar_part, self.comment, self.list):  # what a killed run left
                part.unlink(missing_ok=True)
        except OSError as error:
            self._resources.close()
            raise cannot_write(self.path, error) from None
        except UsageError:
            self._resources.close()
            raise
        return self

    def _lock(self) -> None:
        """Open the work file, or what a killed run left of it, and keep other runs off it."""
        while True:
            flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            try:
                lock = os.open(self.part, flags, 0o666)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                self._refuse_part("a link")
            self._resources.callback(os.close, lock)
            opened = os.fstat(lock)
            if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
                self._refuse_part("a link" if stat.S_ISREG(opened.st_mode) else "no plain file")
            if fcntl is None:
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another run is writing {self.path}; wait for it or give another --output") from None
            except OSError:
                logger.debug("%s: the file system has no locks", self.path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(opened, os.lstat(self.part)):
                    return
            # Another run has just finished and given it its name; what was locked is that run's video.

    def _refuse_part(self, what: str) -> NoReturn:
        raise UsageError(f"--output {self.path}: {self.part.name} beside it is {what}, not ours; remove it")

    def describe(self, metadata: dict) -> None:
        """Replace the metadata by what is known by now; until the first frame is written."""
        assert self._ffmpeg is None, "the metadata is in the file already"
        to_json(metadata)  # a bad value fails here
        self.metadata = metadata

    def write(self, frames: "numpy.ndarray | Tensor") -> None:
        """Append frames; all calls must agree in size.

        Args:
            frames: (F, H, W, 3) uint8, NumPy or torch; or (1, 3, F, H, W) float in [-1, 1], see `frames_to_uint8`.
        """
        frames = frames_to_uint8(frames)  # (F, H, W, 3)
        height, width = frames.shape[1:3]
        if self._given_size is None:
            self._given_size = (height, width)
            self.height, self.width = height + height % 2, width + width % 2  # 4:2:0 chroma needs even sides
            if (self.height, self.width) != (height, width):
                logger.warning(
                    "frames of %dx%d become %dx%d: H.264 needs even sides, the last row or column is repeated",
                    *(width, height, self.width, self.height),
                )
        if (height, width) != self._given_size:
            raise ValueError(f"frames of {width}x{height} in a video of {self._given_size[1]}x{self._given_size[0]}")
        frames = numpy.pad(frames, ((0, 0), (0, self.height - height), (0, self.width - width), (0, 0)), mode="edge")
        try:
            if self._ffmpeg is None:
                self._start_ffmpeg()
            for frame in frames:
                self._ffmpeg.stdin.write(numpy.ascontiguousarray(frame).data)
        except BrokenPipeError:  # it is dead; the reason is in its stderr
            self._ffmpeg.wait()
            raise self._ffmpeg_error() from None
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.num_frames += len(frames)

    def join(self, videos: Sequence[str | os.PathLike]) -> None:
        """Take the frames of finished videos, one after another, as they are encoded: nothing is encoded again.

        Once, and instead of `write`. They must be of one size and rate, and written by this class (`same_encoding`).
        """
        assert self._ffmpeg is None and not self.num_frames, "frames were written already"
        comment, comment_outputs = self._comment()
        quoted = (os.path.abspath(video).replace("'", "'\\''") for video in videos)
        listed = "ffconcat version 1.0\n" + "".join(f"file 'file:{path}'\n" for path in quoted)
        try:
            write_new(self.list, listed.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise cannot_write(self.path, error) from None
        # Joined files begin a microsecond early or late; the filter puts every frame on its own tick.
        ticks = {"pts": "round(PTS*TB*{0})/({0}*TB)", "dts": "round(DTS*TB*{0})/({0}*TB)", "duration": "1/({0}*TB)"}
        on_ticks = ":".join(f"{name}={formula.format(f'({self.fps})')}" for name, formula in ticks.items())
        inputs = ["-f", "concat", "-safe", "0", "-i", ffmpeg_url(self.list), *comment]
        result = run_ffmpeg(
            *("-y", *inputs, "-map", "0:v:0", *comment_outputs),
            *("-c", "copy", "-bsf:v", f"setts={on_ticks}", *MP4, ffmpeg_url(self.part)),
        )
        if result.returncode != 0:
            raise self._ffmpeg_error(result)
        info = probe(self.part)
        self.num_frames, self.width, self.height = info.num_frames, info.width, info.height

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        done = False
        try:
            if exception_type is None:
                self._finish()
                done = True
        except OSError as error:
            raise cannot_write(self.path, error) from None
        finally:
            if not done:
                self._discard()
            self._resources.close()  # gives up the lock

    def _start_ffmpeg(self) -> None:
        inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}", "-r", str(self.fps)]
        comment, comment_outputs = self._comment()
        inputs += ["-i", "pipe:0", *comment]
        outputs = ["-map", "0:v:0", *comment_outputs]
        outputs += ["-vf", TO_BT709, "-c:v", "libx264", "-crf", str(self.crf), "-threads:v", str(ENCODER_THREADS)]
        outputs += ["-x264-params", "stitchable=1"]  # headers that fit all our videos of this size, see `join`
        outputs += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
        # A pipe that nobody reads could fill up. The file has no name.
        self._stderr = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - _resources closes it
        self._resources.enter_context(self._stderr)
        self._ffmpeg = subprocess.Popen(
            [ffmpeg_exe(), "-v", "error", "-y", *inputs, *outputs, *MP4, ffmpeg_url(self.part)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C reaches us alone; what happens to the file is decided here
        )

    def _comment(self) -> tuple[list[str], list[str]]:
        """ffmpeg's arguments that put the metadata into the file: as its second input, and for its output.

        The comment travels in a file: a long prompt does not fit on a command line.
        """
        tags = {} if self.metadata is None else {"comment": to_json(without_folders(self.metadata))}
        try:
            write_new(self.comment, ffmetadata(tags))
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return ["-f", "ffmetadata", "-i", ffmpeg_url(self.comment)], ["-map_metadata", "1", "-map_chapters", "-1"]

    def _finish(self) -> None:
        if not self.num_frames:
            raise ValueError(f"no frames were written to {self.path}")
        if self._ffmpeg is not None:
            with contextlib.suppress(BrokenPipeError):  # then the exit status says more
                self._ffmpeg.stdin.close()
            if self._ffmpeg.wait() != 0:
                raise self._ffmpeg_error()
        whole = self.part if self.audio_path is None else self._add_sound()
        files = [(whole, self.path)]
        if self.metadata is not None:
            write_new(self.sidecar_part, to_json(self.metadata, indent=2) + b"\n")
            files.insert(0, (self.sidecar_part, self.sidecar))
        put_in_place(*files)
        self._remove_parts()

    def _add_sound(self) -> Path:
        """Join picture and sound, now that the length is known. (-shortest in one go misses by up to seconds.)"""
        create_empty(self.sound_part)
        length = float(self.num_frames / self.fps)
        skip = ["-ss", f"{self.audio_start:.6f}"] if self.audio_start else []
        sound = ["-af", f"apad,atrim=end={length:.9f}", "-c:a", "aac", "-b:a", "192k"]
        result = run_ffmpeg(
            *("-y", "-i", ffmpeg_url(self.part), *skip, *media_input(self.audio_path)),
            *("-map", "0:v:0", "-map", "1:a:0"),
            *("-map_metadata", "0", "-map_chapters", "-1", "-c:v", "copy", *sound, *MP4, ffmpeg_url(self.sound_part)),
        )
        if result.returncode != 0:
            raise self._ffmpeg_error(result)
        return self.sound_part

    def _discard(self) -> None:
        if self._ffmpeg is not None:
            self._ffmpeg.kill()
            with contextlib.suppress(OSError):  # what is still buffered has nowhere to go
                self._ffmpeg.stdin.close()
            self._ffmpeg.wait()
        self._remove_parts()

    def _remove_parts(self) -> None:
        for part in (self.sound_part, self.sidecar_part, self.comment, self.list, self.part):  # the locked one last
            part.unlink(missing_ok=True)

    def _ffmpeg_error(self, result: subprocess.CompletedProcess | None = None) -> ResourceError:
        """The error of a finished process, or of the one that frames were written to."""
        if result is None:
            self._stderr.seek(0)
            result = subprocess.CompletedProcess((), self._ffmpeg.returncode, stderr=self._stderr.read())
        reason = reasons(result.stderr, f"exit status {result.returncode}")[-1]
        free = shutil.disk_usage(self.path.parent).free
        return ResourceError(
            f"ffmpeg stopped while writing {self.path} ({readable_bytes(free)} free there): {reason}; "
            "free some disk space or give --output on another disk"
        )


def write_video(path: str | os.PathLike, chunks: Iterable, **settings) -> None:
    """Write every chunk of frames that `chunks` yields; `settings` and errors are those of `VideoWriter`."""
    with VideoWriter(path, **settings) as video:
        for frames in chunks:
            video.write(frames)


def frames_to_uint8(frames: "numpy.ndarray | Tensor") -> numpy.ndarray:
    """Frames as 8-bit RGB, (F, H, W, 3).

    Integers pass through. Floats, (1, 3, F, H, W) in [-1, 1], become round((x + 1) * 127.5), computed in float32, half
    to even, clamped to 0..255; this is diffusers' rule. (The original Wan code truncates instead, on average half a
    level darker.) NaN becomes 0 with a warning.

    Raises:
        ValueError: another shape or dtype, or a batch of several videos.
    """
    if "uint8" in str(frames.dtype):
        frames = numpy.asarray(frames if isinstance(frames, numpy.ndarray) else frames.cpu())
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"uint8 frames must be (F, H, W, 3), not {tuple(frames.shape)}")
        return frames
    if "float" not in str(frames.dtype) or len(frames.shape) != 5 or frames.shape[:2] != (1, 3):
        raise ValueError(f"float frames must be (1, 3, F, H, W), not {tuple(frames.shape)} {frames.dtype}")
    if not isinstance(frames, numpy.ndarray):
        frames = frames.detach().float().cpu().numpy()  # NumPy has no bfloat16
    frames = frames[0].transpose(1, 2, 3, 0).astype(numpy.float32)  # (F, H, W, 3)
    if numpy.isnan(frames).any():
        logger.warning("the model produced NaN pixels; they are written as black")
        frames = numpy.nan_to_num(frames, nan=-1.0)
    return numpy.rint((frames.clip(-1, 1) + 1) * numpy.float32(127.5)).astype(numpy.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def ffmetadata(tags: dict[str, bytes]) -> bytes:
    """ffmpeg's metadata file (ffmpeg.org/ffmpeg-formats.html, "Metadata"): a backslash before = ; # \\ and newline."""
    lines = [b";FFMETADATA1\n"]
    lines += [key.encode() + b"=" + re.sub(rb"([=;#\\\n])", rb"\\\1", value) + b"\n" for key, value in tags.items()]
    return b"".join(lines)


def add_metadata(path: Path, further: dict) -> None:
    """Add what is known only now to the record in a finished video and beside it. Its streams are copied as they are.

    Raises:
        InputError: the video carries no record.
        ResourceError: the disk is full.
    """
    metadata = read_metadata(path) | further
    inside = (read_comment(path) or metadata) | further  # whichever code wrote it: folders are out of it already
    part, sidecar_part, comment = (part_of(path, kind) for kind in ("mp4", "json", "ffmetadata"))
    try:
        write_new(comment, ffmetadata({"comment": to_json(without_folders(inside))}))
        create_empty(part)
        result = run_ffmpeg(
            *("-y", "-i", ffmpeg_url(path), "-f", "ffmetadata", "-i", ffmpeg_url(comment), "-map", "0", "-c", "copy"),
            *("-map_metadata", "1", *MP4, ffmpeg_url(part)),
        )
        if result.returncode != 0:
            raise ResourceError(
                f"{path}: its record cannot be written: {reasons(result.stderr, 'no reason given')[-1]}"
            )
        write_new(sidecar_part, to_json(metadata, indent=2) + b"\n")
        put_in_place((sidecar_part, sidecar_path(path)), (part, path))
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        for written in (part, sidecar_part, comment):
            written.unlink(missing_ok=True)


def same_encoding(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two videos have one codec, size, clock and header, so that `VideoWriter.join` can put them together."""

    def header(file: str | Path) -> list[str]:
        result = run_ffmpeg(*media_input(file), "-map", "0:V:0", "-c", "copy", "-f", "framehash", "pipe:1")
        names = ("#extradata", "#codec_id", "#dimensions", "#tb")
        return [line for line in result.stdout.decode().splitlines() if line.startswith(names)]

    return header(path) == header(other) != []
