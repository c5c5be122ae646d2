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
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from errors import ResourceError, UsageError
from preprocess.record import read_record, sidecar_path

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are not kept apart there
    fcntl = None

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


def refuse_planted(folder: Path) -> None:
    """What is saved in a work folder must not go elsewhere, nor be removed there.

    Raises:
        UsageError: a link, or no folder, lies under its name.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "no folder"
        raise UsageError(f"{folder} beside the output is {what}, not ours; remove it")


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


def write_new(part: Path, content: bytes) -> None:
    """Fill a work file that is made for it."""
    create_empty(part)
    part.write_bytes(content)


# ---------------------------------------------------------------------------------- where to write

NAME_LIMIT = 240  # bytes; file systems allow 255, the hidden part files need the rest
PATH_LIMIT = 4000  # bytes; Linux allows 4096
KINDS = {".mp4": "video", ".png": "picture"}
RESERVED_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))}


class OutputExistsError(UsageError):
    """Something lies where the output is to go."""

    def __init__(self, path: Path, message: str):
        super().__init__(message)
        self.path = path


def resolve_output(path: str | os.PathLike, *, overwrite: bool, extension: str = ".mp4") -> Path:
    """Check the file name that --output gave, create missing folders, and return it as an absolute path.

    A link as the file itself is refused: putting the finished file in place would replace the link, not its target.
    Links among the folders are fine.

    Raises:
        UsageError: nothing can or may be written there; the message says what to change.
        ResourceError: the disk is full.
    """
    given, path = os.fspath(path), Path(os.path.abspath(os.path.expanduser(path)))
    shown = given if len(given) <= 120 else f"{given[:100]}... ({len(given)} characters)"
    if not given.strip() or "\0" in given:
        raise UsageError(f"--output is {shown!r}; give a file name such as video{extension}")
    if len(os.fsencode(path.name)) > NAME_LIMIT or len(os.fsencode(path)) > PATH_LIMIT:
        raise UsageError(
            f"--output {shown} is too long: a name may have {NAME_LIMIT} bytes, a path {PATH_LIMIT}; shorten it"
        )
    # is_dir() and friends say False, not "forbidden", where a parent folder may not be entered; that comes out below.
    if given.endswith(("/", os.sep)) or path.is_dir():
        raise UsageError(f"--output {shown} is a folder; give a file in it, {os.path.join(shown, 'video' + extension)}")
    if path.suffix.lower() != extension:
        raise UsageError(f"--output {shown} must end in {extension}; give {path.stem}{extension}")
    if path.name.split(".")[0].strip().upper() in RESERVED_NAMES:
        raise UsageError(f"--output {shown}: {path.stem} is a device name on Windows; give another name")
    if path.is_symlink():
        raise UsageError(f"--output {shown} is a link to {os.readlink(path)}; give that path itself")
    prepare_folder(path.parent, shown)
    for file in (path, sidecar_path(path)) if extension in (".mp4", ".png") else (path,):  # a sound has no record
        if not os.path.lexists(file) or (file != path and is_leftover(path)):
            continue
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise UsageError(f"--output {shown}: {file.name} exists and is no plain file; give another name")
        if not overwrite:
            record = "" if file == path else f" (the record that goes beside the {KINDS[extension]})"
            raise OutputExistsError(
                path, f"--output {shown}: {file.name}{record} exists; give another name, or add --overwrite"
            )
    return path


def refuse_if_written(path: Path) -> None:
    """Refuse an output that another run is writing, long before the lock of `VideoWriter` would.

    Raises:
        UsageError: it is.
    """
    if fcntl is None:
        return
    # Without waiting: it may be a pipe that nobody writes to.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    part = part_of(path, path.suffix[1:])
    with contextlib.suppress(OSError), open(part, "rb", opener=lambda name, _: os.open(name, flags)) as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up when the file is closed
        except BlockingIOError:
            raise UsageError(f"another run is writing {path}; wait for it or give another --output") from None


def is_leftover(path: Path) -> bool:
    """Whether the record of a video is there without it, because its run was killed between the two renames."""
    parts = (part_of(path), part_of(path, f"sound{path.suffix}"))
    record = None if os.path.lexists(path) or not any(map(Path.is_file, parts)) else read_record(sidecar_path(path))
    return record is not None and record.get("made_by") == "Selfsame"


def prepare_folder(folder: Path, shown: str) -> None:
    """Create the folder and try to write in it, which is the only test that holds for every user and file system."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"--output {shown}: no space left in {folder}") from None
        raise UsageError(
            f"--output {shown}: cannot write in {folder} ({error.strerror}); give a folder you may write in"
        ) from None


def safe_name(text: str, limit: int = 80) -> str:
    """A file name (without extension) made from any text, a prompt for instance.

    Letters, digits and accents of every script stay; anything else, emoji, dots and separators among it, becomes one
    underscore, so the name can neither leave its folder nor look like a flag.

    Args:
        limit: length in UTF-8 bytes, 8 at least.
    """
    text = unicodedata.normalize("NFC", text[: 4 * limit])
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "-" else "_" for c in text)
    name = re.sub("_+", "_", kept).strip("_-").encode()[:limit].decode(errors="ignore").strip("_-")
    if not name:
        return "video"
    return f"video_{name}" if name.upper() in RESERVED_NAMES else name


def free_disk_or_error(path: str | os.PathLike, needed_bytes: int) -> None:
    """Raise ResourceError unless the disk that holds (or will hold) `path` has `needed_bytes` free."""
    folder = Path(os.path.abspath(path))
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"{path} needs about {readable_bytes(needed_bytes)} of disk, {folder} has {readable_bytes(free)} free; "
            "make room or give --output on another disk"
        )


def cannot_write(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"cannot write {path}: {error.strerror or error}; no half-written video was left behind")


def readable_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
