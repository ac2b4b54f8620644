# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: the first in order, the second at once."""

import signal
import threading

import pytest

from chunkgrpo.runtime.interrupts import (
    SIGNALS,
    Interrupted,
    finish_on_interrupt,
    raising_on_signals,
)


def handlers():
    return [signal.getsignal(each) for each in SIGNALS]


def test_they_are_ctrl_c_and_those_of_schedulers():
    assert {each.name for each in SIGNALS} == {"SIGINT", "SIGTERM", "SIGUSR1"}


@pytest.mark.parametrize("each", SIGNALS)
def test_each_ends_work_that_need_not_be_finished(each):
    before = handlers()
    with pytest.raises(Interrupted, match=each.name), raising_on_signals():
        signal.raise_signal(each)
    assert handlers() == before


@pytest.mark.parametrize("each", SIGNALS)
def test_each_lets_an_iteration_finish(each, capfd):
    before, calls = handlers(), []
    with raising_on_signals():
        outer = handlers()
        with finish_on_interrupt(lambda: calls.append(1)):
            signal.raise_signal(each)
            calls.append(2)
        assert handlers() == outer
    assert calls == [1, 2] and handlers() == before
    line = f"chunkgrpo: {each.name}: stopping after this iteration; once more stops at once\n"
    assert capfd.readouterr().err == line


def test_a_third_does_not_cut_the_cleaning_short():
    cleaned = []

    def stop():
        if cleaned == ["first"]:
            raise KeyboardInterrupt
        cleaned.append("first")

    with pytest.raises(KeyboardInterrupt), raising_on_signals():
        try:
            with finish_on_interrupt(stop):
                try:
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGTERM)
                finally:
                    signal.raise_signal(signal.SIGTERM)
                    cleaned.append("within")
        finally:
            signal.raise_signal(signal.SIGUSR1)
            cleaned.append("outside")
    assert cleaned == ["first", "within", "outside"]


def test_other_threads_have_no_signals():
    ran = []

    def work():
        with raising_on_signals(), finish_on_interrupt(lambda: None):
            ran.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [1]
