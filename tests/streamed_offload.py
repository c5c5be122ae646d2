"""diffusers' streamed group offloading, on a CPU: what CUDA does with `use_stream`, without a stream.

There each group keeps pinned copies of its weights, made when the hooks are set; before a layer runs, its weights
become what the copies hold, whatever was done to them since (a cast, above all), and afterwards the copies themselves.
"""

import contextlib
from dataclasses import replace

import pytest
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup


class Backend:
    """In place of torch.cuda."""

    def __init__(self, *device):
        pass

    def current_stream(self) -> "Backend":
        return self

    def synchronize(self) -> None:
        pass

    def stream(self, stream: "Backend"):
        return contextlib.nullcontext()


def stream_group_offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on group offloading goes through a stream, prefetching and all."""
    apply = group_offloading._apply_group_offloading

    @contextlib.contextmanager
    def copies(group: ModuleGroup):
        yield group.cpu_param_dict

    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Backend)
    monkeypatch.setattr(
        group_offloading, "_apply_group_offloading", lambda m, c: apply(m, replace(c, stream=Backend()))
    )
    monkeypatch.setattr(ModuleGroup, "_to_cpu", staticmethod(lambda tensor, _: tensor.data.clone()))
    monkeypatch.setattr(ModuleGroup, "_pinned_memory_tensors", copies)
