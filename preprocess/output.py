"""Files that appear whole or not at all: written beside their place, synced to disk, renamed.

    with whole_file(path) as part:             # .NAME.part.png, made for this and no link to anything
        picture.save(part)

Every work file lies in the folder of what it is for, under a name that follows from it: a run that was killed leaves
nothing elsewhere, and the next run of the same command finds what was left and replaces it.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 255  # bytes, of Linux's file systems


def part_of(path: Path, kind: str | None = None) -> Path:
    """The work file of `path`: out.mp4 -> .out.part.mp4, or .out.part.KIND."""
    end = f".part{path.suffix}" if kind is None else f".part.{kind}"
    stem = path.stem
    if len(os.fsencode(f".{stem}{end}")) > LONGEST_NAME:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    return path.with_name(f".{stem}{end}")


def create_empty(part: Path) -> None:
    """Make a work file anew. What lies there under its name, of a killed run or a link that somebody planted, is
    removed itself and never followed.

    Raises:
        OSError: it cannot be removed or made.
    """
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # O_EXCL: no link either


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A work file to be written; where the block ends well it takes the place of `path`, else it is removed.

    Raises:
        OSError: no room, or no right to write there.
    """
    part = part_of(path)
    create_empty(part)
    try:
        yield part
        put_in_place((part, path))
    finally:
        part.unlink(missing_ok=True)


def put_in_place(*files: tuple[Path, Path]) -> None:
    """Give finished files their names, (written, place) each; the output comes last: where it is, all is."""
    for written, _ in files:
        sync(written)
    for written, place in files:
        os.replace(written, place)
    for folder in dict.fromkeys(place.parent for _, place in files):
        sync(folder)


def sync(path: Path) -> None:
    """Have the file (or the folder's names) on disk before going on, so that a power cut cannot leave half a video."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Have the disk keep so many bytes for a file that will be mapped: a page that finds no room when it is first
    written would kill the process (SIGBUS).

    Raises:
        OSError: there is no room for it.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
        return
    except AttributeError:  # macOS, Windows
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems that cannot
            raise
    os.lseek(descriptor, 0, os.SEEK_END)
    for start in range(os.fstat(descriptor).st_size, size, 2**20):
        os.write(descriptor, bytes(min(2**20, size - start)))
