"""Prompts from the command line and from text files.

    --prompt "a man reads"                    one
    --prompt "a man reads" "he looks up"      several
    --prompt @story.txt                       one a line; a BOM, CRLF and blank lines are fine, lines with # in front
                                              are comments
    --prompt @@home "..."                     a prompt that begins with @: it reads "@home"

A file is text and nothing else: never executed, not searched for further @files.
"""

import codecs
import logging
import os
import re

from errors import InputError, UsageError

logger = logging.getLogger("selfsame")

FILE_LIMIT = 16 * 2**20  # bytes; prompts never need it, a file of weights given by mistake exceeds it
LINE_BREAK = re.compile(r"\r\n|\r|\n")  # not splitlines(), which also cuts at U+2028 and its kin inside a prompt


def read_prompts(values: list[str]) -> list[str]:
    """The prompts that the values of --prompt stand for, in order.

    A prompt on the command line is taken as it is, empty ones with a warning (the model then follows nothing but its
    other inputs). A file's lines lose the white space around them. Length is not limited here; the text encoder warns
    about what it cuts.

    Args:
        values: each a prompt, `@path` of a prompt file, or `@@...` for a prompt that begins with "@".

    Raises:
        UsageError: a lone "@", or text that is not valid Unicode.
        InputError: a file that is missing, unreadable, too large, not UTF-8 (with line and byte) or without a prompt.
    """
    prompts = []
    for value in values:
        if value == "@":
            raise UsageError(
                '--prompt is "@" alone; give @FILE for a prompt file, or @@ for a prompt that begins with @'
            )
        if value.startswith("@") and not value.startswith("@@"):
            prompts += read_prompt_file(value[1:])
        else:
            prompts.append(check_prompt(value.removeprefix("@")))
    return prompts


def check_prompt(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python's stand-ins for argument bytes that the terminal's encoding could not explain
        raise UsageError(f"--prompt {ascii(prompt[:60])} is not valid UTF-8; set a UTF-8 locale or use @FILE") from None
    if not prompt.strip():
        logger.warning("a --prompt is empty: the text will not steer this video")
    return prompt


def read_prompt_file(path: str) -> list[str]:
    """One prompt a line. Raises InputError, see `read_prompts`."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--prompt @{path}: cannot read the file ({reason}); give a UTF-8 text file") from None
    if len(data) > FILE_LIMIT:
        raise InputError(
            f"--prompt @{path} is larger than {FILE_LIMIT // 2**20} MiB; give a text file, one prompt a line"
        )
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, data, error.start) from None
    if "\0" in text:  # UTF-16 looks like this
        raise not_utf8(path, data, data.index(b"\0"))
    lines = [line.strip() for line in LINE_BREAK.split(text)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"--prompt @{path} holds no prompt; write one a line (lines that begin with # are comments)")
    return prompts


def not_utf8(path: str, data: bytes, position: int) -> InputError:
    before = data[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
    return InputError(
        f"--prompt @{path} is not UTF-8 text: line {line}, byte {column} of it is 0x{data[position]:02x}; "
        "save the file as UTF-8"
    )
