"""PNG files with what made them kept inside and beside them, as `video_file` does for videos."""

import contextlib
from pathlib import Path

import numpy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from errors import InputError
from pipelines.record import whole_record, without_folders
from pipelines.video_file import as_record, cannot_write, read_record, sidecar_path, to_json, write_new
from preprocess.output import create_empty, part_of, put_in_place

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
    """The record in the picture itself, if it has one."""
    with contextlib.suppress(OSError, ValueError, KeyError, SyntaxError), Image.open(path) as picture:
        picture.load()  # text may stand behind the pixels
        return as_record(picture.text[TEXT_CHUNK].encode("utf-8", "backslashreplace"))
    return None
