"""The record of what made a file: in the file itself, without folders, and whole beside it, as NAME.json."""

import contextlib
import json
import os
import re
import struct
import zlib
from pathlib import Path

from errors import InputError
from preprocess.ffmpeg import media_input, readable_file, run_ffmpeg

PROJECT = Path(__file__).parent.parent
TEXT_CHUNK = "Comment"  # one of PNG's registered keywords
SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_RECORD = 2**26  # bytes; a film's has some thousands


def to_json(metadata: dict, indent: int | None = None) -> bytes:
    """UTF-8 JSON, readable in any script. Half a surrogate pair (from a badly decoded command line) stays an escape."""
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, indent=indent, default=str)
    return text.encode("utf-8", "backslashreplace")


def sidecar_path(path: Path) -> Path:
    """The record beside a video: out.mp4 -> out.json."""
    return path.with_suffix(".json")


def read_metadata(path: str | os.PathLike) -> dict:
    """What made the video: the record beside it, if it is this video's (there paths are whole); else the JSON in its
    comment tag, else any record beside it.

    Raises:
        InputError: no such file, or neither place holds a JSON object.
    """
    inside, sidecar = read_comment(path), read_record(sidecar_path(Path(path)))
    if inside is None and sidecar is None:
        name = sidecar_path(Path(path)).name
        raise InputError(f"{path} carries no record of what made it, and {name} does not either")
    return sidecar if inside is None else whole_record(inside, sidecar)


def read_comment(path: str | os.PathLike) -> dict | None:
    """The record in the video itself.

    Raises:
        InputError: no such file.
    """
    result = run_ffmpeg(*media_input(readable_file(path)), "-f", "ffmetadata", "pipe:1")
    header = re.split(rb"\n\[", result.stdout)[0]  # before the first [STREAM] or [CHAPTER]
    comment = re.search(rb"^comment=((?:\\.|[^\\\n])*)", header, re.MULTILINE | re.DOTALL)
    return as_record(re.sub(rb"\\(.)", rb"\1", comment[1], flags=re.DOTALL)) if comment else None


def read_record(path: Path) -> dict | None:
    """A record from a JSON file, if it is there and not larger than `LARGEST_RECORD`."""
    try:
        return as_record(path.read_bytes()) if path.stat().st_size <= LARGEST_RECORD else None
    except OSError:
        return None


def as_record(text: bytes) -> dict | None:
    """A JSON object, if it is one."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


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


def whole_record(inside: dict, sidecar: dict | None) -> dict:
    """The record beside a file where it is that of the record inside, which lacks the folders; else the one inside."""
    is_same = sidecar is not None and "content" in inside and sidecar.get("content") == inside["content"]
    return sidecar if is_same else inside


def without_folders(record: dict) -> dict:
    """The record as it goes into the file itself, which may be handed on: of each path what lies below the project (or
    the present folder), of others the name alone. Which of its settings are paths the record says under "places".
    """
    record, places = dict(record), record.get("places", ())
    if isinstance(values := record.get("settings"), dict):
        record["settings"] = {name: _shorten(value) if name in places else value for name, value in values.items()}
    for name in ("weights", "faces"):
        if isinstance(record.get(name), dict):
            record[name] = {_shorten(path): value for path, value in record[name].items()}
    return record


def _shorten(path: object) -> object:
    if isinstance(path, list | tuple):
        return [_shorten(one) for one in path]
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        return path
    absolute = Path(os.path.abspath(path))
    for folder in (Path.cwd(), PROJECT):
        if absolute.is_relative_to(folder):
            return str(absolute.relative_to(folder))
    return absolute.name
