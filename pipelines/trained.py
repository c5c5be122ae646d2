"""What a file of weights says of its training, from its header alone. Without torch."""

import json
from pathlib import Path

LONGEST_HEADER = 2**27  # bytes; of a 14B model it has some 200 KB


def trained_on(path: str | Path) -> str | None:
    """The configuration that train.py trained a safetensors file on; None for files from elsewhere."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 0 < size <= LONGEST_HEADER else {}
        about = header.get("__metadata__", {})
        return about["base"] if {"recipe", "base"} <= about.keys() else None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
