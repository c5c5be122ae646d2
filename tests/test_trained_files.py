"""What a file says of its training: only train.py's own say anything, and nothing damaged is an error here."""

import torch
from safetensors.torch import save_file

from pipelines.trained import trained_on


def test_only_files_of_our_training_say_on_what(tmp_path):
    tensors, path = {"a": torch.zeros(2)}, tmp_path / "x.safetensors"
    for about, expected in (
        ({"recipe": "base", "base": "tiny", "steps": "3"}, "tiny"),
        ({"base": "tiny"}, None),
        ({"format": "pt"}, None),
        (None, None),
    ):
        save_file(tensors, path, metadata=about)
        assert trained_on(path) == expected


def test_what_is_no_such_file_says_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 100, b"\x05\0\0\0\0\0\0\0{"):
        path.write_bytes(content)
        assert trained_on(path) is None
    assert trained_on(tmp_path) is None and trained_on(tmp_path / "nothing") is None
