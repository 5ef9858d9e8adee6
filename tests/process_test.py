"""How a training process stops: what the signals do, and what is saved on the way out."""

import os
import signal

import pytest

from kvpo_jax.errors import SaveError
from kvpo_jax.runtime.process import STOP_SIGNALS, saved_on_error, stop_signal


class Checkpoints:
    """As much of orbax's manager as a way out needs."""

    def __init__(self):
        self.waited = 0

    def wait_until_finished(self):
        self.waited += 1


@pytest.fixture(autouse=True)
def heeded():
    """The signals as a shell starts a program in the foreground, however these tests are run."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_first_signal_asks_the_loop_to_stop(number):
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    with stop_signal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == before


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    with pytest.raises(KeyboardInterrupt), stop_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(number):
    """As by nohup, or in a job of a script that runs in the background."""
    signal.signal(number, signal.SIG_IGN)
    with stop_signal() as stop:
        os.kill(os.getpid(), number)
        assert not stop.is_set()
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, OSError])
def test_an_error_saves_the_last_good_state_and_waits(error):
    checkpoints, saved = Checkpoints(), []
    with pytest.raises(error), saved_on_error(checkpoints, lambda: saved.append(1)):
        raise error
    assert (saved, checkpoints.waited) == ([1], 1)


def test_ctrl_c_waits_for_the_save_under_way_and_begins_none():
    checkpoints, saved = Checkpoints(), []
    with pytest.raises(KeyboardInterrupt):
        with saved_on_error(checkpoints, lambda: saved.append(1)):
            raise KeyboardInterrupt
    assert (saved, checkpoints.waited) == ([], 1)


def test_an_error_in_the_save_does_not_hide_the_first_one():
    def full():
        raise OSError("no space left")

    with pytest.raises(RuntimeError, match="scorer") as raised:
        with saved_on_error(Checkpoints(), full):
            raise RuntimeError("scorer")
    assert "could not be saved either (no space left)" in raised.value.__notes__[0]


def test_a_save_that_has_failed_is_not_made_again():
    saved, checkpoints = [], Checkpoints()
    with pytest.raises(SaveError, match="no room"):
        with saved_on_error(checkpoints, lambda: saved.append(1)):
            raise SaveError("no room")
    assert not saved and checkpoints.waited == 1
