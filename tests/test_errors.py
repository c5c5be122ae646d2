"""How scripts and tools end."""

import os
import signal

import pytest

from errors import WeightsError, exit_codes


@pytest.fixture(autouse=True)
def handler():
    """The handler of SIGTERM is the process's, and so the tests'."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "advice, said", [("", "interrupted\n"), ("the same command goes on", "interrupted; the same command goes on\n")]
)
def test_a_schedulers_stop_ends_every_tool_as_ctrl_c_does(capsys, advice, said):
    unwound = []
    with pytest.raises(SystemExit) as end, exit_codes(advice):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)  # what removes half-written files runs
    assert end.value.code == 130 and unwound
    assert capsys.readouterr().err == said


def test_a_users_mistake_is_one_line_and_its_code(capsys):
    with pytest.raises(SystemExit) as end, exit_codes():
        raise WeightsError("x: no such weights")
    assert end.value.code == 4
    assert capsys.readouterr().err == "error: x: no such weights\n"
