"""PNG files with what made them kept inside and beside them, as `video_file` does for videos."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from errors import InputError
from pipelines.record import LARGEST_RECORD, whole_record, without_folders
from pipelines.video_file import as_record, cannot_write, read_record, sidecar_path, to_json, write_new
from preprocess.output import create_empty, part_of, put_in_place

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNK = "Comment"  # of PNG's registered keywords


def write_picture(path: Path, picture: numpy.ndarray, metadata: dict) -> None:
    """(H, W, 3) uint8 -> NAME.png with the metadata in a text chunk, and NAME.json. Whole files or none.

    Raises:
        ResourceError: the disk is full.
    """
    chunks = PngInfo()
    chunks.add_itxt(TEXT_CHUNK, to_json(without_folders(metadata)).decode())
    part, sidecar_part = part_of(path, "png"), part_of(path, "json")
    try:
        create_empty(part)
        Image.fromarray(numpy.ascontiguousarray(picture)).save(part, format="PNG", pnginfo=chunks)
        write_new(sidecar_part, to_json(metadata, indent=2) + b"\n")
        put_in_place((sidecar_part, sidecar_path(path)), (part, path))
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        for written in (part, sidecar_part):
            written.unlink(missing_ok=True)


def read_picture_metadata(path: Path) -> dict:
    """What made the picture: the record beside it, if it is this picture's, where paths are whole; else its text.

    Raises:
        InputError: not a picture, or one without such a record.
    """
    if (inside := read_text(path)) is None:
        raise InputError(f"{path} carries no record of what made it")
    return whole_record(inside, read_record(sidecar_path(path)))


def read_text(path: Path) -> dict | None:
    """The record in the picture itself, if it has one: the first text under our keyword. Pixels are passed over, and
    so is a text that is larger, or unpacks to more, than `LARGEST_RECORD`.
    """
    with contextlib.suppress(OSError, ValueError, IndexError, zlib.error, struct.error), open(path, "rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return None
        while header := file.read(8):
            length, kind = struct.unpack(">I4s", header)
            if kind in (b"tEXt", b"zTXt", b"iTXt") and length <= LARGEST_RECORD:
                if (text := text_of(kind, file.read(length))) is not None:
                    return as_record(text)
                length = 0
            file.seek(length + 4, os.SEEK_CUR)  # a checksum ends each chunk
    return None


def text_of(kind: bytes, chunk: bytes) -> bytes | None:
    """UTF-8 text of a chunk, None if it is under another keyword or too large (PNG specification, 11.3.3)."""
    keyword, _, content = chunk.partition(b"\0")
    if keyword != TEXT_CHUNK.encode():
        return None
    packed = kind == b"zTXt"
    if kind == b"iTXt":  # flag, method, language\0, translated keyword\0, text
        packed, content = content[0] == 1, content[2:].split(b"\0", 2)[2]
    elif packed:  # method, text
        content = content[1:]
    if packed:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(content, LARGEST_RECORD)
        if unpacking.unconsumed_tail:
            return None
    return content if kind == b"iTXt" else content.decode("latin-1").encode()
