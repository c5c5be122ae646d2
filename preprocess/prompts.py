"""Prompts from the command line and from text files.

    --prompt "a man reads"                    one
    --prompt "a man reads" "he looks up"      several
    --prompt @story.txt                       one a line; a BOM, CRLF and blank lines are fine, lines with # in front
                                              are comments
    --prompt @@home "..."                     a prompt that begins with @: it reads "@home"

A file is text and nothing else: never executed, not searched for further @files.

Long videos have a stream of prompts, `--prompt_path FILE`: lines as above, or a Python list of strings, with or without
`prompts =` in front (`read_prompt_stream`).
"""

import ast
import codecs
import io
import logging
import os
import re
import tokenize

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


def check_prompt(prompt: str, argument: str = "--prompt", *, may_be_empty: bool = False) -> str:
    """The prompt, if it is valid Unicode; a message if it is empty and may not be."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python's stand-ins for argument bytes that the terminal's encoding could not explain
        raise UsageError(
            f"{argument} {ascii(prompt[:60])} is not valid UTF-8; set a UTF-8 locale or use @FILE"
        ) from None
    if not prompt.strip() and not may_be_empty:
        logger.warning("a %s is empty: the text will not steer this video", argument)
    return prompt


def read_prompt_file(path: str) -> list[str]:
    """One prompt a line. Raises InputError, see `read_prompts`."""
    prompts = prompt_lines(read_text(path, f"--prompt @{path}"))
    if not prompts:
        raise InputError(f"--prompt @{path} holds no prompt; write one a line (lines that begin with # are comments)")
    return prompts


def prompt_lines(text: str) -> list[str]:
    """The lines that are neither blank nor comments, without the white space around them."""
    lines = [line.strip() for line in LINE_BREAK.split(text)]
    return [line for line in lines if line and not line.startswith("#")]


def read_prompt_stream(path: str) -> list[str]:
    """The prompts of a long video, in every form of SVI's prompt files: `prompts = ["…", "…"]`, a bare list, or lines.

    A list is read as a literal, the last one where there are several: what stands around is not executed, and said to
    be passed over.

    Raises:
        InputError: a file that cannot be read as text, an unfinished list, one of other things than strings, no prompt.
    """
    name = f"--prompt_path {path}"
    text = read_text(path, name)
    prompts = prompt_list(text, name)
    if prompts is None:
        prompts = prompt_lines(text)
    if not any(prompt.strip() for prompt in prompts):
        raise InputError(f'{name} holds no prompt; write one a line, or prompts = ["…", "…"]')
    return prompts


# What sets or changes the list of a prompt file: at the beginning of a line, or after a semicolon.
CHANGE = re.compile(
    r"(?:^(?P<indent>[ \t]*)|;[ \t]*)prompts[ \t]*(?P<how>\+?=(?!=)|:[^=\n]*=|\.append(?=\()|\.extend(?=\())[ \t]*",
    re.MULTILINE,
)
FIRST_CHANGE = re.compile(rf"(?:{CHANGE.pattern})(?=\[|\(\s*[\"'])", re.MULTILINE)
ANY_LIST = re.compile(r"prompts = (?=\[)")  # where SVI looks for it, `my_prompts = […]` too
BARE_LIST = re.compile(r"\s*(?=\[\s*(#.*\s*)*[\"'\]])")  # not: [cinematic] a man walks
MOST_PROMPTS = 100_000  # `["…"] * 10**9` is a short file


def prompt_list(text: str, name: str) -> list[str] | None:
    """The list of strings in a prompt file, or None where there is no list. `name` is for errors.

    SVI runs the file. Here its changes of `prompts` by literals are read in order: the last assignment is what is
    meant, and `+=`, `append` and `extend` add to it.
    """
    change = FIRST_CHANGE.search(text) or ANY_LIST.search(text) or BARE_LIST.match(text)
    if change is None:
        return None
    indent = change.groupdict().get("indent")
    prompts, around, end = [], "", 0
    while change is not None:
        start, how = change.end(), change.groupdict().get("how", "=")
        line = text[:start].count("\n") + 1
        if change.groupdict().get("indent") not in (None, indent):
            raise InputError(f"{name}: line {line} sets prompts within other code, which is not run; write one list")
        length, value = read_literal(text[start:])
        added = [value] if how == ".append" else value
        if not isinstance(added, list) or not all(isinstance(prompt, str) for prompt in added):
            raise InputError(
                f'{name}: what begins in line {line} is not a list of strings; write ["first prompt", "second"]'
            )
        prompts = added if how.endswith("=") and how != "+=" else prompts + added
        around += text[end : change.start()] + "\n"
        end = start + length
        change = CHANGE.search(text, end)
    lines = [line.strip() for line in LINE_BREAK.split(around + text[end:])]
    if passed_over := [line for line in lines if line and line[0] not in "#;"]:
        logger.warning("%s: not executed, only the list is read: %s", name, passed_over[0][:80])
    return prompts


def read_literal(text: str) -> tuple[int, object]:
    """The value that a text begins with, and its length: a whole statement, else a list before what is no Python.

    The value is None where it is none of literals.
    """
    for part in (first_statement(text), leading_literal(text)):
        try:
            return len(part), evaluate(ast.parse(part.strip(), mode="eval").body)
        except SyntaxError:
            continue
        except (ValueError, MemoryError, RecursionError):
            return len(part), None
    return len(text), None


def evaluate(node: ast.expr) -> str | int | list:
    """Literals, and what joins them: + and *, "a" "b", f"" without fields. A tuple is a list.

    Raises:
        ValueError: anything else.
    """
    match node:
        case ast.Constant(value=str() | int()):
            return node.value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [evaluate(element) for element in elements]
        case ast.JoinedStr(values=values):
            return "".join(evaluate(value) for value in values)
        case ast.BinOp(op=ast.Add()):
            left, right = evaluate(node.left), evaluate(node.right)
            if type(left) is type(right):
                return left + right
        case ast.BinOp(op=ast.Mult()):
            left, right = evaluate(node.left), evaluate(node.right)
            if isinstance(right, int) and isinstance(left, str | list) and len(left) * right <= MOST_PROMPTS:
                return left * right
    raise ValueError(ast.dump(node)[:80])


def first_statement(text: str) -> str:
    """The part of a text up to the end of its first line, as Python counts lines: brackets go over several."""
    depth, starts = 0, line_starts(text)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
            if token.type == tokenize.NEWLINE or (token.string == ";" and depth == 0):
                return text[: starts[token.start[0] - 1] + token.start[1]]
    except (tokenize.TokenError, SyntaxError):
        pass
    return text


def line_starts(text: str) -> list[int]:
    starts = [0]
    for line in io.StringIO(text, newline=""):
        starts.append(starts[-1] + len(line))
    return starts


def leading_literal(text: str) -> str:
    """The part of a text that begins with a bracket up to the bracket that closes it; all of it where none does."""
    depth, starts = 0, line_starts(text)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
                if depth == 0:
                    return text[: starts[token.end[0] - 1] + token.end[1]]
    except (tokenize.TokenError, SyntaxError):
        pass
    return text


def read_text(path: str, name: str) -> str:
    """A UTF-8 file, without its BOM; `name` is what errors call it.

    Raises:
        InputError: missing, unreadable, too large, or not UTF-8.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot read the file ({reason}); give a UTF-8 text file") from None
    if len(data) > FILE_LIMIT:
        raise InputError(f"{name} is larger than {FILE_LIMIT // 2**20} MiB; give a text file, one prompt a line")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(name, data, error.start) from None
    if "\0" in text:  # UTF-16 looks like this
        raise not_utf8(name, data, data.index(b"\0"))
    return text


def not_utf8(name: str, data: bytes, position: int) -> InputError:
    before = data[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
    return InputError(
        f"{name} is not UTF-8 text: line {line}, byte {column} of it is 0x{data[position]:02x}; save the file as UTF-8"
    )
