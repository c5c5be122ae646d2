"""PNG files with what made them kept inside and beside them, as `video_file` does for videos."""

from pathlib import Path

import numpy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from preprocess.output import cannot_write, create_empty, part_of, put_in_place, write_new
from preprocess.record import TEXT_CHUNK, sidecar_path, to_json, without_folders


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
