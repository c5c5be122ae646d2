"""Sound: any audio file, or a video's sound track, as the samples that audio encoders are given.

    python -m preprocess.audio extract interview.mp4 --output speech.wav      # a video's sound track, as it is
    python -m preprocess.audio separate song.mp3 --output vocals.wav          # the voice without the music

    samples = read_audio("speech.mp3")                   # (N,) float32, mono, 16 kHz
    timeline = AudioTimeline(len(samples), fps=25)
    first, last = timeline.sample_range(0, 81)           # what the first 81 video frames show

Decoding, mixing and resampling are ffmpeg's. The encoder is in models/audio_encoder.py.
"""

import argparse
import contextlib
import logging
import sys
import wave
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy

from errors import InputError, ResourceError, UsageError, exit_codes
from preprocess.ffmpeg import ffmpeg_url, media_input, probe_streams, reasons, run_ffmpeg
from preprocess.output import whole_file

logger = logging.getLogger("selfsame")

SAMPLE_RATE = 16000  # what wav2vec2 takes
SHORTEST = Fraction(1, 25)  # seconds: one video frame
SILENCE = 1e-4  # a share of full scale: -80 dB
LOUDEST = 100  # a multiple of full scale: floats may overshoot it, but not by 40 dB

# Filters of ffmpeg: the mean of all channels (names of absent ones are skipped), or of those of each side.
MIX = {
    1: "pan=mono|c0<" + "+".join(f"c{i}" for i in range(63)),
    2: "pan=stereo|FL<FL+FC+BL+SL+LFE|FR<FR+FC+BR+SR+LFE",
}

# Wan's causal VAE: latent frame 0 is video frame 0, latent frame i >= 1 the frames 4i-3 .. 4i.
FRAMES_PER_LATENT = 4

# wav2vec2's convolutions: one feature every 320 samples, each seeing 400.
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernel, stride
FEATURE_STRIDE, FEATURE_WIDTH = 320, 400


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_audio(
    path: str | Path, sample_rate: int = SAMPLE_RATE, argument: str = "--audio", *, channels: int = 1
) -> numpy.ndarray:
    """The first sound track of any audio or video file.

    Channels are mixed to one by their mean, as librosa does. A track that begins after its video is given the silence
    before it.

    Args:
        argument: the name of the argument `path` came from, for error messages.
        channels: 1 or 2.

    Returns:
        (N,) float32 for one channel, (N, 2) for two; full scale is 1.

    Raises:
        InputError: no such file, no sound track, undecodable, samples that are NaN, infinite or no sound by their size,
            or less than one video frame.
    """
    try:
        streams = probe_streams(path)
    except InputError as error:
        raise InputError(f"{argument} {error}") from error
    if not streams.has_audio:
        raise InputError(f"{argument} {path} has no sound track; give an audio file, or a video with sound")
    # Not ffmpeg's own mix, which adds up channels at 0.7 each: 3 dB too loud, and over full scale. Nor its default
    # filter, which already takes 3 dB at 7.5 kHz.
    resample = f"{MIX[channels]},aresample={sample_rate}:filter_size=64:cutoff=0.97:first_pts=0"
    result = run_ffmpeg(*media_input(path), "-map", "0:a:0", "-af", resample, "-f", "f32le", "pipe:1")
    if result.returncode != 0:
        reason = reasons(result.stderr, f"exit status {result.returncode}")[0]
        raise InputError(f"{argument} {path} cannot be decoded: {reason}; give another file")
    if result.stderr:
        reason = reasons(result.stderr, "")[0]
        logger.warning("%s %s is damaged (%s); what can be decoded is used", argument, path, reason)
    samples = numpy.frombuffer(result.stdout, numpy.float32).reshape(-1, channels)
    if len(samples) < SHORTEST * sample_rate:
        raise InputError(
            f"{argument} {path} has {len(samples) / sample_rate:g} s of sound; give {float(SHORTEST)} s or more"
        )
    if not numpy.isfinite(samples).all():
        raise InputError(f"{argument} {path} has samples that are no numbers (NaN or infinite); export it again")
    if (peak := numpy.abs(samples).max()) > LOUDEST:
        raise InputError(
            f"{argument} {path} has samples of up to {peak:.3g}, where full scale is 1; export it again, with 16 bits"
        )
    if peak < SILENCE:
        logger.warning("%s %s is silent: the mouth will stay still", argument, path)
    return samples[:, 0] if channels == 1 else samples


def write_wav(path: str | Path, samples: numpy.ndarray, sample_rate: int) -> None:
    """(N,) or (N, channels) floats -> a 16-bit wav; beside it first, then renamed. Above full scale it is clipped.

    Raises:
        ResourceError: the disk is full.
    """
    samples = numpy.atleast_2d(numpy.asarray(samples).T).T  # (N, channels)
    levels = numpy.rint(samples.clip(-1, 1) * 32767).astype("<i2")
    with whole_sound(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(levels.tobytes())


@contextlib.contextmanager
def whole_sound(path: str | Path) -> Iterator[Path]:
    """`whole_file`, with what a full disk is told of."""
    try:
        with whole_file(Path(path)) as part:
            yield part
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}; give --output on another disk") from error


def extract_sound(path: str | Path, output: str | Path) -> None:
    """A file's first sound track as 16-bit wav, its rate and channels kept.

    Raises:
        InputError: no such file, no sound track, or undecodable.
        ResourceError: the disk is full.
    """
    if not probe_streams(path).has_audio:
        raise InputError(f"{path} has no sound track; give a video with sound")
    with whole_sound(output) as part:
        plain = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:a", "+bitexact")
        sound = ("-map", "0:a:0", "-c:a", "pcm_s16le", *plain, "-f", "wav")
        result = run_ffmpeg("-y", *media_input(path), *sound, ffmpeg_url(part))
        reason = reasons(result.stderr, f"exit status {result.returncode}")[-1]
        if "No space left" in reason:
            raise ResourceError(f"cannot write {output}: {reason}; give --output on another disk")
        if result.returncode != 0:
            raise InputError(f"the sound of {path} cannot be decoded: {reason}; give another file")


# ---------------------------------------------------------------------------------------------------------------------
# Time


def exact_fps(fps: float | Fraction) -> Fraction:
    """Frames per second as the fraction that is meant: 29.97 is 30000/1001.

    Args:
        fps: a number, or text such as "25" or "30000/1001".

    Raises:
        UsageError: not a number, or out of the bounds of a video file.
    """
    try:
        exact = Fraction(str(fps))
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--fps {fps}: a number is accepted, 25 or 30000/1001 for instance") from None
    if not Fraction(1, 10) <= exact <= 1000:
        raise UsageError(f"--fps {fps}: 0.1 to 1000 is accepted, 25 for instance")
    television = Fraction(round(exact * Fraction(1001, 1000)) * 1000, 1001)  # 23.976, 29.97, 59.94
    return television if exact.denominator != 1 and abs(exact - television) < Fraction(1, 2000) else exact


@dataclass(frozen=True)
class AudioTimeline:
    """Where samples, video frames, latent frames and wav2vec2 features lie in time: in whole numbers and fractions.

    `legacy` counts as StableAvatar does: int(16000 / fps) samples a frame, which drifts by 1.8 s in half an hour at
    24 fps, and a video that ends up to three frames before the sound.

    Raises:
        InputError: less than one frame of sound.
    """

    num_samples: int
    fps: Fraction
    sample_rate: int = SAMPLE_RATE
    legacy: bool = False

    def __post_init__(self):
        object.__setattr__(self, "fps", exact_fps(self.fps))
        if self.num_samples < self.samples_per_frame:
            raise InputError(
                f"the sound is {self.num_samples / self.sample_rate:g} s, less than one frame of {float(self.fps):g} "
                "per second; give a longer one"
            )

    @property
    def samples_per_frame(self) -> Fraction:
        exact = self.sample_rate / self.fps
        return Fraction(int(exact)) if self.legacy else exact

    @property
    def num_frames(self) -> int:
        """Of the video: the nearest to the sound's length."""
        if self.legacy:
            return FRAMES_PER_LATENT * (self.num_latent_frames - 1) + 1
        return round_half_up(self.num_samples / self.samples_per_frame)

    @property
    def num_latent_frames(self) -> int:
        """That hold the video: it may use one to three frames less than they decode to."""
        if self.legacy:
            return (self.num_samples // self.samples_per_frame - 1) // FRAMES_PER_LATENT + 1
        return ceil(Fraction(self.num_frames - 1, FRAMES_PER_LATENT)) + 1

    def sample_range(self, first_frame: int, end_frame: int) -> tuple[int, int]:
        """(first sample, end sample) of the video frames first_frame .. end_frame - 1; may lie beyond the sound."""
        return int(first_frame * self.samples_per_frame), int(end_frame * self.samples_per_frame)

    def window_samples(self, start: int, end: int, *, exact: bool = False) -> tuple[int, int]:
        """(first sample, end sample) for a window of the latent frames start .. end - 1.

        A window is sampled as if it were a video of its own: its first latent frame is one video frame.

        Args:
            exact: the sound of just those 4 (end - start) - 3 video frames. Otherwise that of 4 (end - start), as
                StableAvatar gives it in inference (not in training): the sound runs ahead by up to three frames.
        """
        num_frames = FRAMES_PER_LATENT * (end - start) - (FRAMES_PER_LATENT - 1 if exact else 0)
        first_frame = FRAMES_PER_LATENT * start
        return self.sample_range(first_frame, first_frame + num_frames)

    def feature_at(self, frame: int) -> Fraction:
        """Which wav2vec2 feature (of the whole sound) is centred on the middle of a video frame, as a fraction."""
        middle = (frame + Fraction(1, 2)) * self.samples_per_frame
        return (middle - Fraction(FEATURE_WIDTH, 2)) / FEATURE_STRIDE


def num_features(num_samples: int) -> int:
    """How many features wav2vec2 makes of so many samples: 53760 -> 167."""
    for kernel, stride in CONVOLUTIONS:
        num_samples = (num_samples - kernel) // stride + 1
    return max(num_samples, 0)


def cut_samples(samples: numpy.ndarray, first: int, end: int) -> numpy.ndarray:
    """samples[first:end], with silence for what lies beyond the end."""
    piece = samples[first:end]
    return numpy.pad(piece, (0, end - first - len(piece)))


def training_clip_samples(first_frame: int, num_frames: int, fps: float) -> tuple[int, int]:
    """(first sample, end sample) of a training clip, by StableAvatar's float arithmetic, which may lose a sample."""
    start = first_frame / fps
    return int(start * SAMPLE_RATE), int((num_frames / fps + start) * SAMPLE_RATE)


def round_half_up(value: float | Fraction) -> int:
    return int(value + Fraction(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Loudness

ABSOLUTE_GATE, RELATIVE_GATE = -70.0, -10.0  # LUFS; LU under the mean of what passes the first


def normalize_loudness(samples: numpy.ndarray, sample_rate: int, target: float = -23.0) -> numpy.ndarray:
    """Scale to `target` LUFS (EBU R 128). Silence, which has no loudness, stays as it is.

    Args:
        samples: (N,) mono, or (N, 2).
    """
    loudness = integrated_loudness(samples, sample_rate)
    if not numpy.isfinite(loudness):
        return samples
    return (samples * 10 ** ((target - loudness) / 20)).astype(samples.dtype)


def integrated_loudness(samples: numpy.ndarray, sample_rate: int) -> float:
    """Loudness in LUFS by ITU-R BS.1770-4: mean power behind the K filter, over 400 ms blocks that pass two gates.

    Sound of less than 400 ms is one block. -inf for silence.

    Args:
        samples: (N,) mono, or (N, 2).
    """
    from scipy.signal import lfilter

    weighted = numpy.asarray(samples, numpy.float64).reshape(len(samples), -1)  # (N, channels)
    for numerator, denominator in k_weighting(sample_rate):
        weighted = lfilter(numerator, denominator, weighted, axis=0)
    power = numpy.concatenate([[0.0], numpy.cumsum((weighted**2).sum(axis=1))])
    block = min(round(0.4 * sample_rate), len(weighted))
    starts = numpy.arange(0, len(weighted) - block + 1, max(block // 4, 1))  # overlapping by three quarters
    blocks = (power[starts + block] - power[starts]) / block

    def loudness(power: numpy.ndarray) -> numpy.ndarray:
        return -0.691 + 10 * numpy.log10(power)

    with numpy.errstate(divide="ignore"):
        blocks = blocks[loudness(blocks) > ABSOLUTE_GATE]
        if not len(blocks):
            return -numpy.inf
        blocks = blocks[loudness(blocks) > loudness(blocks.mean()) + RELATIVE_GATE]
        return float(loudness(blocks.mean()))


def k_weighting(sample_rate: int) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """The two second-order filters of BS.1770 as (numerator, denominator), for any rate.

    The recommendation lists coefficients for 48 kHz only; these are the analogue filters behind them (a shelf of 4 dB
    above 1.7 kHz for the head, a high-pass at 38 Hz), as libebur128 recovered them.
    """
    k = numpy.tan(numpy.pi * 1681.974450955533 / sample_rate)
    q, gain = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    middle = gain**0.4996667741545416
    shelf = numpy.array([gain + middle * k / q + k * k, 2 * (k * k - gain), gain - middle * k / q + k * k])
    poles = numpy.array([1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k])
    filters = [(shelf / poles[0], poles / poles[0])]
    k, q = numpy.tan(numpy.pi * 38.13547087602444 / sample_rate), 0.5003270373238773
    poles = numpy.array([1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k])
    return [*filters, (numpy.array([1.0, -2.0, 1.0]), poles / poles[0])]


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.audio", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    extract = commands.add_parser("extract", help="a video's sound track as wav")
    extract.add_argument("video", help="any video or audio file")
    separate = commands.add_parser("separate", help="the voice without the music, as 44.1 kHz stereo wav")
    separate.add_argument("audio", help="any audio or video file")
    separate.add_argument("--model_path", help="Kim_Vocal_2.onnx (in checkpoints/)")
    for command in (extract, separate):
        command.add_argument("--output", required=True, help="wav to write")
        command.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    from preprocess.output import resolve_output

    output = resolve_output(args.output, overwrite=args.overwrite, extension=".wav")
    if args.command == "extract":
        extract_sound(args.video, output)
    else:
        from preprocess.vocal_separation import SAMPLE_RATE as RATE
        from preprocess.vocal_separation import load_separator

        separator = load_separator(args.model_path)
        mixture = read_audio(args.audio, RATE, "AUDIO", channels=2)
        write_wav(output, separator(mixture), RATE)
    logger.info("%s written", output.name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes():
        main(parse_arguments())
