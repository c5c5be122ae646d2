import gc
import os
import signal
from pathlib import Path

import pytest

# Tiny tensors: threads cost more than they bring, and the scripts that tests start should count sums in the same order.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser):
    parser.addoption("--goldens", default=str(GOLDENS), help="folder of golden cases (one folder a case)")


def pytest_generate_tests(metafunc):
    """One test a golden case, its id the folder's name."""
    if "golden_folder" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("--goldens"))
        folders = sorted(p.parent for p in root.glob("*/case.json"))
        metafunc.parametrize("golden_folder", folders, ids=[f.name for f in folders])


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage():
    """The scripts free models by gc, which would walk all objects of torch and its kin each time: 0.2 s, often."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry for each call of a transformer in a step."""
    from models.wan.transformer import WanTransformer

    found, forward = [], WanTransformer.forward

    def counting(self, *args, **kwargs):
        if not kwargs.get("tokens_only"):
            found.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward", counting)
    return found
