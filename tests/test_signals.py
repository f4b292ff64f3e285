"""Signals: what they request of a run, and when they are ignored."""

import os
import signal
import sys

import pytest

import parle_gpu
import parle_mpi
from parle import cli, signals

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def fatal():
    """Return the numbers of the signals that would have ended the program, filled in as they arrive."""
    seen = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGUSR1):
    os.kill(os.getpid(), number)


def test_sigusr1_saves_only_during_training(fatal):
    signals.ignore_sigusr1()
    send()
    with signals.handle_signals() as request:
        assert (request.save, request.stop) == (False, False)
        send()
        assert (request.save, request.stop) == (True, False)
    send()
    assert fatal == []
    send(signal.SIGTERM)
    assert fatal == [signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_requests_a_stop_second_sigint_raises(number, fatal):
    with pytest.raises(KeyboardInterrupt), signals.handle_signals() as request:
        send(number)
        assert (request.save, request.stop) == (False, True)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert (request.save, request.stop) == (True, True)
        send(signal.SIGINT)
    assert fatal == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_that_the_parent_ignores_stays_ignored(number, fatal):
    signal.signal(number, signal.SIG_IGN)
    with signals.handle_signals() as request:
        send(number)
        assert not request.stop
        send(signal.SIGUSR1)
        assert request.save
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("program", [parle_gpu, parle_mpi])
def test_both_programs_ignore_sigusr1_while_starting(program, fatal, monkeypatch, capsys):
    def parse(parser):
        send()
        raise cli.UsageError("enough")

    monkeypatch.setattr(cli, "parse", parse)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit):
        program.main()
    assert fatal == []
    assert capsys.readouterr().err.endswith("enough\n")
