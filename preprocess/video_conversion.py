"""Videos as cameras and broadcasters store them -> what models are made for: whole frames, 8-bit BT.709, one rate.

    format = StreamFormat.from_banner(line)                # what ffmpeg says of the video stream
    filters, messages = conversion_filters(format, available)
    times = [0.0, 0.1, 0.2, 0.23, …]                       # seconds, of the stored frames
    shown = constant_rate(times, fps)                      # how often each of them is to be shown

Plain functions: what is converted and how is decided here, `preprocess.video` runs ffmpeg. A progressive 8-bit SDR
video of a constant rate needs no conversion.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}  # transfer functions, ffmpeg's name -> the usual one
WIDE = ("bt2020", "smpte432")  # primaries: BT.2020, Display P3
# More than a byte a sample shows in a pixel format's name: yuv420p10le, p010le, gray16be, rgb48le, but not rgb565le.
DEEP = re.compile(r"(9|1\d|32|48|64)(le|be)$")


@dataclass(frozen=True)
class StreamFormat:
    """How the pixels of a video stream are stored, in ffmpeg's words; None where the file does not say."""

    pix_fmt: str
    interlaced: bool = False
    matrix: str | None = None
    primaries: str | None = None
    transfer: str | None = None
    sample_aspect: str = "1:1"  # a pixel's width:height

    @classmethod
    def from_banner(cls, line: str) -> "StreamFormat | None":
        """From "… Video: hevc (Main 10), yuv420p10le(tv, bt2020nc/bt2020/smpte2084, top first), 64x48 [SAR 1:1 …".

        Of colour the line has one name where matrix, primaries and transfer agree, else the three.
        """
        match = re.search(r": Video: [^,]+, (\w+)(\(([^)]*)\))?", line)
        if match is None:
            return None
        details = (match[3] or "").split(", ")
        colors = next((detail.split("/") for detail in details if detail.count("/") == 2), [None] * 3)
        matrix, primaries, transfer = (None if name in ("unknown", "reserved") else name for name in colors)
        aspect = re.search(r"\bSAR (\d+:\d+)", line)
        return cls(
            match[1],
            any(re.match("(top|bottom) (coded )?first", detail) for detail in details),
            matrix,
            primaries,
            transfer,
            aspect[1] if aspect and not aspect[1].startswith("0:") else "1:1",
        )


def conversion_filters(format: StreamFormat, available: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """ffmpeg's filters that convert the frames, and a message about each conversion.

    Fields become one frame a pair (bwdif), so that a frame stays a frame. HDR light is computed in units of 100 cd/m²;
    up to 30 cd/m² it stays as it is, the highlights above are compressed (tonemap's mobius).

    Args:
        available: whether this ffmpeg has a filter. Where one is missing the message says what the frames will look
            like, and the video is read without it.
    """
    filters, messages = [], []
    if format.interlaced and available("bwdif"):
        filters.append("bwdif=mode=send_frame:deint=interlaced")
        messages.append("is interlaced: each pair of fields becomes one whole frame (bwdif)")
    elif format.interlaced:
        messages.append("is interlaced, and this ffmpeg has no bwdif: moving edges will look combed")
    hdr, wide = HDR.get(format.transfer), format.primaries in WIDE
    name = f"is HDR ({hdr})" if hdr else f"has wide colours ({format.primaries})"
    if (hdr or wide) and available("zscale") and available("tonemap"):
        filters += color_filters(format)
        messages.append(f"{name}: {'tone-mapped' if hdr else 'converted'} to BT.709")
    elif hdr or wide:
        messages.append(
            f"{name}, and this ffmpeg has no {'zscale' if available('tonemap') else 'tonemap'}: colours will look "
            "flat; unset IMAGEIO_FFMPEG_EXE, or convert the video to SDR first"
        )
    if DEEP.search(format.pix_fmt):
        messages.append(f"has more than 8 bits a sample ({format.pix_fmt}): rounded to 8")
    if format.sample_aspect != "1:1":
        messages.append(
            f"has pixels of {format.sample_aspect} that are taken as square: all will look squeezed; to mend that, "
            "convert it first with ffmpeg -vf scale=iw*sar:ih,setsar=1"
        )
    return filters, messages


def color_filters(format: StreamFormat) -> list[str]:
    """To linear light, to BT.709's primaries, highlights compressed, to BT.709's R'G'B' of full range."""
    # What an HDR file leaves open is BT.2020; without a matrix zscale would refuse.
    stated = f"setparams=colorspace={format.matrix or 'bt2020nc'}:color_primaries={format.primaries or 'bt2020'}"
    curve = ["tonemap=mobius:desat=0"] if format.transfer in HDR else []
    return [
        f"{stated}:color_trc={format.transfer or 'bt709'}",
        "zscale=transfer=linear:npl=100:agamma=false",
        "format=gbrpf32le",
        "zscale=primaries=bt709",
        *curve,
        "zscale=transfer=bt709:matrix=gbr:range=full:agamma=false",
        "format=gbrp",
    ]


def constant_rate(times: Sequence[float], fps: float) -> numpy.ndarray:
    """How often each stored frame is shown when a video goes on at a constant rate: (F,) int, of sum F.

    Every frame of the result shows what the video shows at the middle of its time. So the frames stay what they are
    (all ones) as long as none is more than half a frame away from its place, and picture and sound never part further
    than that.

    Args:
        times: when each frame appears, in seconds; the first is where the video starts.
        fps: the mean rate, frames / duration.
    """
    places = (numpy.maximum.accumulate(times) - times[0]) * fps  # where each frame is, in frames
    middles = numpy.arange(len(places)) + 0.5
    # The margin is for rounded times: a frame that is due at the middle belongs to the next place.
    shown = numpy.searchsorted(places, middles - 1e-6, side="right") - 1  # (F,) the stored frame at each place
    return numpy.bincount(shown, minlength=len(places))
