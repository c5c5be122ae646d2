"""Reading pictures that people really have, and writing PNG files.

    picture = read_image("photo.jpg")                    # (H, W, 3) uint8 RGB
    picture = read_image("https://example.org/me.png")
    write_png("face.png", picture)

Phones rotate by EXIF tag, cut-outs carry alpha, scanners write 16 bits and print shops CMYK; a plain
`Image.open(...).convert("RGB")` gets all of these wrong without a word. Here each becomes what a viewer would show.
"""

import errno
import functools
import io
import logging
import math
import os
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from errors import InputError, ResourceError, UsageError
from preprocess.output import whole_file

if TYPE_CHECKING:
    import PIL.Image


logger = logging.getLogger("selfsame")

MAX_PIXELS = 128_000_000  # phones reach 108 megapixels; a decompression bomb (60k x 60k) has 3,600
WORK_PIXELS = 2**25  # what is larger is halved, thirded, …: whatever becomes of a picture here has a megapixel or so
MAX_ASPECT = 50  # long side : short side; a panorama has 10
# Formats of single pictures. Not those by which Pillow would start a program (EPS) or look for further files.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI"),
    *("DDS", "QOI", "PSD", "ICNS", "SPIDER", "SUN", "XBM", "IM"),
)
URL_TIMEOUT = 10  # seconds, for each wait and (times six) for the whole download
URL_MAX_BYTES = 64 * 2**20

# What a file is when it is no picture, by its first bytes; said in the error so that the user need not guess.
IMPOSTORS = (
    (re.compile(rb"^(\xef\xbb\xbf)?\s*<"), "it is a web page or other markup, not a picture"),
    (re.compile(rb"^version https://git-lfs"), "it is a git-lfs pointer: fetch the real file with `git lfs pull`"),
    (re.compile(rb"^....ftyp(hei|hev|mif1|msf1)", re.DOTALL), "it is HEIC: save it as JPEG or PNG first"),
    (re.compile(rb"^(....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI)", re.DOTALL), "it is a video: save one frame as PNG first"),
)


def read_image(source: "str | os.PathLike | numpy.ndarray | PIL.Image.Image", argument: str = "image") -> numpy.ndarray:
    """A picture as a viewer would show it.

    Args:
        source: a path, an http(s) URL, or a `PIL.Image.Image`.
        argument: the name of the argument `source` came from, for error messages.

    Returns:
        (H, W, 3) uint8 RGB: EXIF rotation applied, alpha composited on white, 16 and 32 bit and float scaled to 8 bit,
        CMYK converted, of an animation the first frame (with a warning); above `WORK_PIXELS` scaled down by a whole
        number (with a message).

    Raises:
        InputError: no such file, unreachable URL, undecodable, more than `MAX_PIXELS` pixels, or a mere line of them.
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _decode(lambda: source, f"{argument}:")

    name = f"{argument} {str(source)!r}:"
    if _is_url(source):
        return _read(str(source), name).copy()
    try:
        about = os.stat(source)
        if not stat.S_ISREG(about.st_mode):  # a folder, or a pipe that would never end
            raise InputError(f"{name} is not a file; give one picture (JPEG, PNG, WebP, TIFF, ...)")
    except FileNotFoundError as error:
        raise InputError(f"{name} no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _read(os.path.abspath(source), name, about.st_ino, about.st_mtime_ns, about.st_size).copy()


def _is_url(source: "str | os.PathLike | numpy.ndarray | PIL.Image.Image") -> bool:
    return re.match(r"https?://", str(source), re.IGNORECASE) is not None


# The model looks at a photo, then the face score does, …: within a run it is fetched and decoded once.
@functools.lru_cache(maxsize=8)
def _read(source: "str | os.PathLike | numpy.ndarray | PIL.Image.Image", name: str, *stamp: int) -> numpy.ndarray:
    """The picture in a file or behind a URL. stamp: what changes when the file is written anew."""
    import PIL.Image

    try:
        data = _download(source, name) if _is_url(source) else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    if not data:
        raise InputError(f"{name} the file is empty (0 bytes)")
    if data.startswith((b"#?RADIANCE", b"#?RGBE")):
        return _decode_high_dynamic_range(data, name)
    try:
        PIL.Image.init()
        formats = [name for name in FORMATS if name in PIL.Image.OPEN]  # builds differ
        return _decode(lambda: PIL.Image.open(io.BytesIO(data), formats=formats), name)
    except PIL.UnidentifiedImageError as error:
        if data.startswith((b"II*\0", b"MM\0*")):  # Pillow has no float or 32-bit RGB TIFF; OpenCV has
            return _decode_tiff(data, name)
        reason = next(
            (text for pattern, text in IMPOSTORS if pattern.match(data)), "damaged, or of no known picture format"
        )
        raise InputError(f"{name} cannot be decoded: {reason}") from error


def write_png(
    path: str | Path, picture: numpy.ndarray, *, overwrite: bool = False, text: dict[str, str] | None = None
) -> None:
    """Write (H, W, 3 or 4) uint8 to `path`: beside it first, then renamed, so that no half file is left.

    Args:
        text: keyword -> text to be kept in the file.

    Raises:
        UsageError: `path` exists (without `overwrite`), is a folder, or cannot be written.
        ResourceError: the disk is full.
    """
    import PIL.Image
    import PIL.PngImagePlugin

    path = Path(path)
    chunks = PIL.PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)
    if os.path.isdir(path):
        raise UsageError(f"output {str(path)!r} is a folder; give a file name ending in .png")
    if os.path.exists(path) and not overwrite:
        raise UsageError(f"output {str(path)!r} exists already; choose another name or pass --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            PIL.Image.fromarray(numpy.ascontiguousarray(picture)).save(part, format="PNG", pnginfo=chunks)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"output {str(path)!r}: the disk is full") from error
        raise UsageError(f"output {str(path)!r} cannot be written: {error.strerror or error}") from error


def _download(url: str, name: str) -> bytes:
    """The bytes behind a URL, within `URL_TIMEOUT` and `URL_MAX_BYTES`."""
    import http.client
    import time
    import urllib.error
    import urllib.parse
    import urllib.request

    url = urllib.parse.quote(url, safe=":/?&=#%+,;@!$'()*[]~")  # spaces and letters of any script
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (compatible; selfsame)"})
    deadline = time.monotonic() + 6 * URL_TIMEOUT  # a server may drip one byte per wait for ever
    chunks, size = [], 0
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            while chunk := response.read(2**16):
                size += len(chunk)
                if size > URL_MAX_BYTES:
                    raise InputError(f"{name} is larger than {URL_MAX_BYTES >> 20} MiB; save it and give the file")
                if time.monotonic() > deadline:
                    raise InputError(f"{name} took longer than {6 * URL_TIMEOUT} s; save it and give the file")
                chunks.append(chunk)
    except urllib.error.HTTPError as error:
        raise InputError(f"{name} the server answered {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"{name} cannot be fetched ({reason}); check the address, or give a file") from error
    return b"".join(chunks)


def _decode(open_image: "Callable[[], PIL.Image.Image]", name: str) -> numpy.ndarray:
    """Open with Pillow, refuse bombs before decoding, then decode and bring to 8-bit RGB."""
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about bombs, which our own cap stops, and odd metadata
            image = open_image()
        _check_size(*image.size, name)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's MPO holds previews, not frames
            logger.warning("%s holds %d frames; the first is used", name, image.n_frames)
            image.seek(0)
        return _to_rgb(image, name)
    except (InputError, PIL.UnidentifiedImageError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{name} {error}; at most {MAX_PIXELS / 1e6:.0f} megapixels are accepted") from error
    except Exception as error:  # a decoder raises anything over a damaged file: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{name} cannot be decoded: {error}; the file is damaged or cut short") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} {width}x{height} is {width * height / 1e6:.0f} megapixels, "
            f"at most {MAX_PIXELS / 1e6:.0f} are accepted; make it smaller"
        )
    if not max(width, height) <= MAX_ASPECT * min(width, height):
        raise InputError(f"{name} {width}x{height} is a line, no picture; at most {MAX_ASPECT}:1 is accepted")


def _reduction(width: int, height: int) -> int:
    """By which whole number both sides are divided so that `WORK_PIXELS` are left."""
    factor = 1
    while (width // factor) * (height // factor) > WORK_PIXELS:
        factor += 1
    return factor


def _to_rgb(image: "PIL.Image.Image", name: str) -> numpy.ndarray:
    """Any Pillow image -> (H, W, 3) uint8 RGB on white."""
    import PIL.Image
    import PIL.ImageOps

    factor = _reduction(*image.size)
    if factor > 1:
        logger.warning("%s %dx%d is more than is of use here: scaled down by %d", name, *image.size, factor)
        width, height = image.size
        image.draft(None, (math.ceil(width / factor), math.ceil(height / factor)))  # JPEG is decoded at 1/2, 1/4, 1/8
    image.load()
    whole_16_bits = image.mode == "I" and image.format in ("PPM", "PNG")  # their "I" is 0..65535, a TIFF's is not
    PIL.ImageOps.exif_transpose(image, in_place=True)
    if (factor := _reduction(*image.size)) > 1:
        if image.mode in ("P", "PA", "1"):  # whose values cannot be averaged
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode in ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "F"):
            image = image.reduce(factor)
        else:  # 16 bits and the like: every so many pixels
            image = image.resize([side // factor for side in image.size], PIL.Image.NEAREST)
    if image.mode == "CMYK":
        image = _cmyk_to_rgb(image)
    elif image.mode.startswith("I;16") or whole_16_bits:
        image = PIL.Image.fromarray(_to_uint8(numpy.asarray(image).astype(numpy.uint16), name))
    elif image.mode in ("I", "F"):  # a TIFF of 32 bits or of floats
        image = PIL.Image.fromarray(_to_uint8(numpy.asarray(image), name))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return numpy.array(image.convert("RGB"))


def _cmyk_to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """By the file's own colour profile where it has one: the plain formula makes skin garish."""
    import PIL.ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return PIL.ImageCms.profileToProfile(image, source, PIL.ImageCms.createProfile("sRGB"), outputMode="RGB")
        except PIL.ImageCms.PyCMSError as error:
            logger.warning("colour profile of the CMYK picture is unusable (%s); converted without it", error)
    return image.convert("RGB")


def _to_uint8(values: numpy.ndarray, name: str) -> numpy.ndarray:
    """Samples of any range -> uint8. 16 bits are 0..65535; 32 bits and floats carry no scale, and what they hold tells
    between the usual ones.
    """
    if values.dtype == numpy.uint8:
        return values
    if numpy.issubdtype(values.dtype, numpy.floating):
        if not numpy.isfinite(values).all():
            raise InputError(f"{name} holds NaN or infinite pixels")
        # Floats carry no scale. A 0..255 picture that stays below 16 would be black, so that much is overshoot of 0..1.
        scale = next((s for s, limit in ((1, 16), (255, 255), (65535, 65535)) if values.max() <= limit), None)
    elif values.dtype == numpy.uint16:
        scale = 65535
    else:  # what wrapped around, from 2^31 on, is negative
        in_range = values.min() >= 0
        scale = next((s for s in (255, 65535) if in_range and values.max() <= s), None)
    if scale is None:
        found = f"{values.min():g} to {values.max():g}"
        raise InputError(f"{name} pixel values of {found} have no known scale; save it with 8 or 16 bits")
    if scale == 1 or values.dtype != numpy.uint16:
        logger.info("%s %s pixels read as 0..%d", name, values.dtype, scale)
    return numpy.rint(numpy.clip(values.astype(numpy.float32) / scale, 0, 1) * 255).astype(numpy.uint8)


def _decode_tiff(data: bytes, name: str) -> numpy.ndarray:
    """TIFF with several float or 32-bit channels, through OpenCV."""
    width, height = _tiff_size(data, name)
    _check_size(width, height, name)
    values = _opencv_decode(data)
    if values is None:
        raise InputError(f"{name} cannot be decoded: this kind of TIFF is not known; save it as PNG or JPEG")
    values = _to_uint8(_reduced(values, name), name)
    if values.ndim == 2:
        return numpy.stack([values] * 3, axis=-1)
    blue, green, red = (values[..., c].astype(numpy.float32) for c in range(3))
    rgb = numpy.stack([red, green, blue], axis=-1)
    if values.shape[-1] == 4:
        alpha = values[..., 3:].astype(numpy.float32) / 255
        rgb = rgb * alpha + 255 * (1 - alpha)
    return numpy.rint(rgb).astype(numpy.uint8)


def _opencv_decode(data: bytes) -> numpy.ndarray | None:
    """Samples as they are stored, blue first; None where OpenCV cannot read them, of which it says nothing here."""
    import cv2

    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)


def _reduced(values: numpy.ndarray, name: str) -> numpy.ndarray:
    """What OpenCV decoded, (H, W) or (H, W, C), of any range, as `_to_rgb` reduces what Pillow decodes."""
    import cv2

    height, width = values.shape[:2]
    if (factor := _reduction(width, height)) == 1:
        return values
    logger.warning("%s %dx%d is more than is of use here: scaled down by %d", name, width, height, factor)
    if values.dtype in (numpy.uint8, numpy.uint16, numpy.float32, numpy.float64):
        return cv2.resize(values, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    return values[::factor, ::factor]  # 32-bit whole numbers, which OpenCV does not average


def _tiff_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height from the first directory of a TIFF file (tags 256 and 257), without decoding it."""
    order = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    entries = int.from_bytes(data[start : start + 2], order)
    size = {}
    for i in range(entries):
        entry = data[start + 2 + 12 * i : start + 14 + 12 * i]
        length = 2 if int.from_bytes(entry[2:4], order) == 3 else 4  # type 3 is a 16-bit number
        size[int.from_bytes(entry[:2], order)] = int.from_bytes(entry[8 : 8 + length], order)
    if not (size.get(256) and size.get(257)):
        raise InputError(f"{name} cannot be decoded: the TIFF header is damaged")
    return size[256], size[257]


def _decode_high_dynamic_range(data: bytes, name: str) -> numpy.ndarray:
    """Radiance .hdr: linear light, clipped at 1.0 and brought to sRGB."""
    size = re.search(rb"[-+]Y (\d+) [-+]X (\d+)\n", data[:4096])
    if not size:
        raise InputError(f"{name} cannot be decoded: the HDR header names no size")
    _check_size(int(size[2]), int(size[1]), name)
    linear = _opencv_decode(data)
    if linear is None:
        raise InputError(f"{name} cannot be decoded: the HDR data is damaged")
    logger.warning("%s is HDR: light above 1.0 is clipped", name)
    linear = numpy.clip(numpy.nan_to_num(_reduced(linear, name)[..., ::-1]), 0, 1)
    srgb = numpy.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return numpy.rint(srgb * 255).astype(numpy.uint8)
