"""Files beside an output: the face as the model was given it, a preview, a report. Without torch.

They are replaced without --overwrite only where they are ours, of a run that did not finish; what somebody else put
there under such a name stays. Ours say so in their first bytes.
"""

from pathlib import Path

import numpy

from errors import ResourceError, UsageError
from preprocess.image import write_png
from preprocess.output import whole_file

MARK = "Selfsame"
TABLE = b"clip\tstart\tframes"  # how a drift report begins


def refuse_foreign(path: Path, overwrite: bool) -> None:
    """
    Raises:
        UsageError: something lies there that is none of our side files.
    """
    if overwrite or not (path.exists() or path.is_symlink()):
        return
    if path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            first = file.read(4096)
        if MARK.encode() in first or first.startswith(TABLE):
            return
    raise UsageError(f"{path} is in the way of a file that goes beside the output; move it, or add --overwrite")


def write_side_picture(path: Path, picture: numpy.ndarray, overwrite: bool) -> None:
    """(H, W, 3) uint8 as PNG, whole or not at all.

    Raises:
        UsageError: something else lies there.
        ResourceError: the disk is full.
    """
    refuse_foreign(path, overwrite)
    write_png(path, picture, overwrite=True, text={"Software": MARK})


def write_side_table(path: Path, table: str, overwrite: bool) -> None:
    """A table, whole or not at all. Raises as `write_side_picture`."""
    refuse_foreign(path, overwrite)
    try:
        with whole_file(path) as part:
            part.write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error
