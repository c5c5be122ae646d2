"""PNG files with what made them kept inside and beside them, as `video_file` does for videos."""

import contextlib
import json
from pathlib import Path

import numpy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from errors import InputError
from pipelines.video_file import cannot_write, put_in_place, sidecar_path, to_json

TEXT_CHUNK = "Comment"  # of PNG's registered keywords


def write_picture(path: Path, picture: numpy.ndarray, metadata: dict) -> None:
    """(H, W, 3) uint8 -> NAME.png with the metadata in a text chunk, and NAME.json. Whole files or none.

    Raises:
        ResourceError: the disk is full.
    """
    chunks = PngInfo()
    chunks.add_itxt(TEXT_CHUNK, to_json(metadata).decode())
    part, sidecar_part = (path.with_name(f".{path.stem}.part{suffix}") for suffix in (".png", ".json"))
    try:
        Image.fromarray(numpy.ascontiguousarray(picture)).save(part, format="PNG", pnginfo=chunks)
        sidecar_part.write_bytes(to_json(metadata, indent=2) + b"\n")
        put_in_place((sidecar_part, sidecar_path(path)), (part, path))
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        for written in (part, sidecar_part):
            written.unlink(missing_ok=True)


def read_picture_metadata(path: Path) -> dict:
    """What made the picture: from its text chunk.

    Raises:
        InputError: not a picture, or one without such a record.
    """
    with contextlib.suppress(OSError, ValueError, KeyError), Image.open(path) as picture:
        picture.load()  # text may stand behind the pixels
        return json.loads(picture.text[TEXT_CHUNK])
    raise InputError(f"{path} carries no record of what made it")
