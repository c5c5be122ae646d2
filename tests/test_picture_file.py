"""The record inside a PNG: found wherever it stands, and not at any price."""

import struct
import tracemalloc
import zlib

import numpy
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from errors import InputError
from pipelines.earlier_run import read_run_settings
from preprocess.picture_writer import write_picture
from preprocess.record import LARGEST_RECORD, SIGNATURE, read_picture_metadata

RECORD = {"settings": {"prompt": ["男の子 😀"]}}
TEXT = '{"settings": {"prompt": ["男の子 😀"]}}'
LATIN = '{"settings": {"prompt": ["caf\xe9"]}}'


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, size: int = 8) -> bytes:
    """A picture of that size, of which no pixel could be decoded."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_record_written_is_read(tmp_path):
    write_picture(tmp_path / "a.png", numpy.zeros((8, 8, 3), numpy.uint8), RECORD)
    (tmp_path / "a.json").unlink()
    assert read_picture_metadata(tmp_path / "a.png") == RECORD


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", ["tEXt", "iTXt", "behind the pixels"])
def test_so_is_one_that_another_program_saved_again(tmp_path, kind, packed):
    chunks = PngInfo()
    chunks.add_text("Software", "x", zip=packed)
    if kind == "tEXt":
        chunks.add_text("Comment", LATIN, zip=packed)
    elif kind == "iTXt":
        chunks.add_itxt("Comment", TEXT, "en", "Kommentar", zip=packed)
    else:
        content = zlib.compress(TEXT.encode()) if packed else TEXT.encode()
        chunks.add(b"iTXt", b"Comment\0" + bytes([packed, 0]) + b"\0\0" + content, after_idat=True)
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png", pnginfo=chunks)
    expected = {"settings": {"prompt": ["café"]}} if kind == "tEXt" else RECORD
    assert read_picture_metadata(tmp_path / "a.png") == expected


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_text_that_unpacks_without_end_is_not_unpacked(tmp_path, kind):
    packing = zlib.compressobj(9)
    packed = b"".join(packing.compress(b" " * 2**24) for _ in range(16)) + packing.flush()  # 256 MiB in 256 KiB
    content = b"Comment\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + packed
    (tmp_path / "a.png").write_bytes(png(chunk(kind, content)))
    tracemalloc.start()
    with pytest.raises(InputError, match="a.png carries no record of what made it"):
        read_picture_metadata(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * LARGEST_RECORD


def test_no_pixel_is_decoded_for_it(tmp_path):
    """Pillow refuses this one by an error of its own."""
    text = chunk(b"iTXt", b"Comment\0\0\0\0\0" + TEXT.encode())
    (tmp_path / "a.png").write_bytes(png(text, size=60_000))
    assert read_run_settings_error(tmp_path / "a.png").endswith("its config is null, expected a name)")
    (tmp_path / "a.png").write_bytes(png(size=60_000))
    assert "carries no record" in read_run_settings_error(tmp_path / "a.png")


def read_run_settings_error(path) -> str:
    with pytest.raises(InputError) as error:
        read_run_settings(str(path))
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"GIF89a", SIGNATURE, SIGNATURE + b"\0\0", SIGNATURE + b"\xff\xff\xff\xfftEXt"),
        *(png(chunk(b"iTXt", text)) for text in (b"Comment", b"Comment\0", b"Comment\0\0\0", b"Comment\0\1\0\0\0junk")),
        *(png(chunk(b"tEXt", text)) for text in (b"", b"Comment\0[]", b"Comment\0" + b"[" * 100_000)),
        png(chunk(b"zTXt", b"Comment\0\0junk")),
    ],
    ids=lambda content: str(content[-40:]),
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="a.png carries no record of what made it"):
        read_picture_metadata(tmp_path / "a.png")
