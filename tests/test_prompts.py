import logging
import os

import pytest

from errors import InputError, UsageError
from preprocess.prompts import FILE_LIMIT, read_prompts


@pytest.fixture
def prompt_file(tmp_path):
    def write(data):
        path = tmp_path / "prompts.txt"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return f"@{path}"

    return write


def test_values_and_files_in_order(prompt_file):
    story = prompt_file("one\ntwo\n")
    assert read_prompts(["zero", story, "three"]) == ["zero", "one", "two", "three"]
    assert read_prompts([]) == []


def test_literal_at_sign(prompt_file):
    assert read_prompts(["@@home", "@@", "a@b", "@@@x"]) == ["@home", "@", "a@b", "@@x"]
    assert read_prompts([prompt_file("@other.txt\n@@x")]) == ["@other.txt", "@@x"]  # a file is never searched for files


@pytest.mark.parametrize(
    "data",
    [
        "a man 男\nhe looks up",
        "\ufeffa man 男\r\nhe looks up\r\n",
        "\n\n  a man 男  \n\t\n# a comment\n   # another\nhe looks up\n\n",
        "a man 男\rhe looks up\r",
    ],
    ids=["plain", "bom-crlf", "blanks-comments", "old-mac"],
)
def test_file_forms(prompt_file, data):
    assert read_prompts([prompt_file(data)]) == ["a man 男", "he looks up"]


def test_only_line_breaks_break_lines(prompt_file):
    prompt = "one\u2028prompt\x0cwith\x85odd # separators"
    assert read_prompts([prompt_file(prompt)]) == [prompt]


def test_long_prompt(prompt_file):
    prompt = "very long " * 10_000 + "end"
    assert read_prompts([prompt, prompt_file(prompt)]) == [prompt, prompt]


def test_code_is_only_text(prompt_file):
    code = "__import__('os').abort(); $(reboot) `reboot` {0} %s"
    assert read_prompts([prompt_file(code)]) == [code]


@pytest.mark.parametrize("prompt", ["", "  "])
def test_empty_prompt_is_allowed_and_said(prompt, caplog):
    with caplog.at_level(logging.WARNING, "selfsame"):
        assert read_prompts([prompt]) == [prompt]
    assert "empty" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "holds no prompt"),
        ("\ufeff\r\n \n# only a comment\n", "holds no prompt"),
        (b"fine\r\nalso fine\r\ncaf\xe9 here", "line 3, byte 4 of it is 0xe9"),
        (b"\xef\xbb\xbfab\xff", "line 1, byte 3 of it is 0xff"),
        ("a man".encode("utf-16"), "line 1, byte 1 of it is 0xff"),
        ("a man".encode("utf-16-le"), "line 1, byte 2 of it is 0x00"),
        (b"x" * (FILE_LIMIT + 1), "larger than 16 MiB"),
    ],
    ids=["empty", "no-prompt", "latin-1", "after-bom", "utf-16", "utf-16-le", "huge"],
)
def test_bad_files(prompt_file, data, message):
    value = prompt_file(data)
    with pytest.raises(InputError) as error:
        read_prompts([value])
    assert message in str(error.value)
    assert f"--prompt {value}" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_folder_and_odd_name(tmp_path):
    for path, reason in [(tmp_path / "none.txt", "No such file"), (tmp_path, "directory"), ("a\0b", "null")]:
        with pytest.raises(InputError, match=reason):
            read_prompts([f"@{path}"])


def test_lone_at_sign_and_broken_unicode():
    with pytest.raises(UsageError, match="@FILE"):
        read_prompts(["@"])
    with pytest.raises(UsageError, match="UTF-8"):
        read_prompts(["caf\udce9"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_files(tmp_path):
    read_end, write_end = os.pipe()  # what `--prompt @<(command)` hands over
    os.write(write_end, b"from a pipe\n")
    os.close(write_end)
    assert read_prompts([f"@/dev/fd/{read_end}"]) == ["from a pipe"]
    os.close(read_end)
