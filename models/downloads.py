"""Fetch the files a config names: listed with sizes and hashes, resumed where they stopped, verified, then renamed.

huggingface_hub lists the repositories and knows endpoint, token and offline mode (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE). The bytes are fetched here: since huggingface_hub 2.x a broken download starts its file again, and
Wan's files are 10 GB each.
"""

import contextlib
import errno
import fnmatch
import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import requests
from tqdm import tqdm

from configs import download_command, file_patterns, is_inside
from errors import ResourceError, UsageError, WeightsError

logger = logging.getLogger("selfsame")

ATTEMPTS = 5  # a connection that breaks is taken up again this often
WAIT = 2  # seconds, times the attempts made, before the next
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**20


class UnreachableError(WeightsError):
    """The hub cannot be asked: no connection, or none is wanted."""


@dataclass(frozen=True)
class RemoteFile:
    """One file to have: where from, where to, and how to know that it is whole."""

    url: str
    path: Path
    size: int  # bytes
    sha256: str | None  # known for files in large-file storage
    git_sha1: str | None  # known for small files, which git hashes with a header
    command: str  # what to run again when it fails
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")


def list_files(config: dict, root: Path) -> list[RemoteFile]:
    """Ask where a config's files are, how large, and their hashes.

    Offline, local files are taken as they are if every pattern of the config finds one; the list is empty then.

    Raises:
        UnreachableError: no connection, or files missing while offline.
        WeightsError: no such repository or file, or no access.
    """
    folder, command = root / config["dest"], download_command(config, root)
    if "url" in config:
        path = folder / file_patterns(config)[0]
        return [RemoteFile(config["url"], path, config["size"], config["sha256"], None, command)]

    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    repo = config["repo"]
    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT)
    except OfflineModeIsEnabled as error:
        if absent := [pattern for pattern in file_patterns(config) if not any(folder.glob(pattern))]:
            raise UnreachableError(
                f"{folder}: {', '.join(absent)} missing and HF_HUB_OFFLINE is set; unset it, then {command}"
            ) from error
        logger.warning("%s: offline; files are there, not verified", config["name"])
        return []
    except GatedRepoError as error:
        raise WeightsError(f"{repo}: accept its licence on the hub's page and set HF_TOKEN, then {command}") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(f"{repo}: no such repository, or HF_TOKEN has no access to it") from error
    except (HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnreachableError(
            f"{repo}: cannot reach the hub ({reason}); check the connection or set HF_ENDPOINT to a mirror, "
            f"then {command}"
        ) from error

    files = {}
    for pattern in file_patterns(config):
        # a star stays within its folder, unlike fnmatch's
        found = [
            file
            for file in info.siblings
            if fnmatch.fnmatchcase(file.rfilename, pattern) and file.rfilename.count("/") == pattern.count("/")
        ]
        if not found:
            raise WeightsError(f"{repo}: no file {pattern} in this repository (revision {info.sha})")
        if outside := [file.rfilename for file in found if not is_inside(file.rfilename)]:
            raise WeightsError(f"{repo}: its file {outside[0][:200]!r} leads out of {folder}; not fetched")
        files |= {file.rfilename: file for file in found}
    return [
        RemoteFile(
            url=hf_hub_url(repo, name, revision=info.sha),
            path=folder / name,
            size=file.size,
            sha256=file.lfs.sha256 if file.lfs else None,
            git_sha1=None if file.lfs else file.blob_id,
            command=command,
            headers=build_hf_headers(),
        )
        for name, file in sorted(files.items())
    ]


def damage(file: RemoteFile, path: Path) -> str | None:
    """What is wrong with the local copy at `path`; None if it is exactly the released file."""
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    if found != file.size:
        return f"expected {file.size} bytes, found {found}"
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)
    expected = file.sha256 or file.git_sha1
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    if expected and digest.hexdigest() != expected:
        kind = "sha256" if file.sha256 else "git hash"
        return f"expected {kind} {expected}, found {digest.hexdigest()}"
    return None


def check_disk(files: list[RemoteFile], root: Path) -> int:
    """Bytes still to fetch; ResourceError if the disk under `root` has less free."""
    needed = sum(file.size - (file.part.stat().st_size if file.part.is_file() else 0) for file in files)
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"{root}: needs {needed / 2**30:.1f} GiB ({needed} bytes) for {len(files)} files, {free / 2**30:.1f} GiB "
            f"({free} bytes) free; make room, or name another disk with --dest"
        )
    return needed


@contextlib.contextmanager
def only_download(root: Path) -> Iterator[None]:
    """Keep a second run out of the same folder: both would write the same partial files."""
    root.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root / ".download.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UsageError(f"--dest {root}: another download is running there; wait for it") from error
    try:
        yield
    finally:
        lock.release()


def download(file: RemoteFile) -> None:
    """Fetch into `<name>.part`, go on where an earlier run stopped, verify, rename.

    Raises:
        WeightsError: the server refuses, the connection stays broken (the part is kept), or the bytes are wrong
            (the part is removed).
        ResourceError: the disk is full (the part is kept).
    """
    file.part.parent.mkdir(parents=True, exist_ok=True)
    if file.part.is_symlink() or (file.part.is_file() and file.part.stat().st_nlink > 1):
        file.part.unlink()  # what a planted link leads to is not ours to write
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(file)
            break
        except requests.RequestException as error:
            status = error.response.status_code if isinstance(error, requests.HTTPError) else None
            if status is not None and status < 500 and status != 429:  # asking again would not help
                raise WeightsError(f"{file.url}: the server answers {status}; {file.command}") from error
            have = file.part.stat().st_size if file.part.is_file() else 0
            if attempt == ATTEMPTS:
                raise WeightsError(
                    f"{file.path}: connection lost at {have} of {file.size} bytes ({type(error).__name__}); "
                    f"what is there is kept; {file.command}"
                ) from error
            logger.warning("%s: connection lost at %d of %d bytes, trying again", file.path.name, have, file.size)
            time.sleep(WAIT * (attempt - 1))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ResourceError(f"{file.part}: disk full; make room, then {file.command}") from error
            raise
    if wrong := damage(file, file.part):
        file.part.unlink()
        raise WeightsError(f"{file.url}: {wrong}; removed; {file.command}")
    file.part.replace(file.path)


def _fetch(file: RemoteFile) -> None:
    have = file.part.stat().st_size if file.part.is_file() else 0
    if have == file.size:
        return
    if have > file.size:  # another release of this file had more
        file.part.unlink()
        have = 0
    headers = {**file.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        resumed = response.status_code == 206
        bar = tqdm(
            desc=file.path.name, total=file.size, initial=have * resumed, unit="B", unit_scale=True, disable=None
        )
        with open(file.part, "ab" if resumed else "wb") as stream, bar:
            for block in response.iter_content(CHUNK):
                stream.write(block)
                bar.update(len(block))
