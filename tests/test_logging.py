"""What the packages log: no handler unless CSPD_LOG_LEVEL asks for one, and warnings where a CUDA device is slowed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cspd_kernels import live
from cspd_kernels.logs import log_once
from cspd_kernels.ops.add_norm import norm_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SAY = (
    "import logging, cspd\n{}\n"
    "for name in ('cspd', 'cspd_kernels'):\n"
    "    logger = logging.getLogger(name)\n"
    "    logger.debug('d of %s', name), logger.info('i of %s', name), logger.warning('w of %s', name)\n"
)


def said(level: str | None, setup: str = "", before: str = "") -> list[str]:
    """The lines of stderr of a process that logs to both loggers at three levels."""
    environment = {name: value for name, value in os.environ.items() if name != "CSPD_LOG_LEVEL"}
    environment |= {} if level is None else {"CSPD_LOG_LEVEL": level}
    code = before + "\n" + SAY.format(setup)
    place = Path(__file__).parent  # a clone's root would be taken for a second installation
    options = dict(capture_output=True, text=True, env=environment, check=True, cwd=place)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("level", [None, "", " "])
def test_nothing_is_set_up_unless_asked_for(level):
    handlers = "print([logging.getLogger(n).handlers for n in ('cspd', 'cspd_kernels')], file=__import__('sys').stderr)"
    assert said(level, handlers) == ["[[], []]", "w of cspd", "w of cspd_kernels"]


@pytest.mark.parametrize(
    ("level", "letters"),
    [("DEBUG", "diw"), ("info", "iw"), ("WARNING", "w"), ("ERROR", ""), ("20", "iw"), ("15", "iw")],
)
def test_the_variable_prints_to_stderr(level, letters):
    names = {"d": "DEBUG", "i": "INFO", "w": "WARNING"}
    wanted = [f"{names[x]} {name}: {x} of {name}" for name in ("cspd", "cspd_kernels") for x in letters]
    assert said(level) == wanted


@pytest.mark.parametrize("when", ["before", "setup"])
def test_an_application_that_configures_logging_is_not_talked_over(when):
    own = "import logging; logging.basicConfig(format='app %(message)s')"
    lines = said("INFO", **{when: own})
    assert lines == [f"app {x} of {name}" for name in ("cspd", "cspd_kernels") for x in "iw"]


def test_a_level_that_the_application_has_set_stays():
    own = "import logging; logging.getLogger('cspd').setLevel(logging.ERROR)"
    assert said("DEBUG", before=own) == [
        f"{n} cspd_kernels: {n[0].lower()} of cspd_kernels" for n in ("DEBUG", "INFO", "WARNING")
    ]


@pytest.mark.parametrize("level", ["loud", "-3", "1.5"])
def test_a_level_that_means_nothing_is_a_warning(level):
    lines = said(level)
    assert lines[0] == (
        f"expected CSPD_LOG_LEVEL as DEBUG, INFO, WARNING, ERROR, CRITICAL or a number, got {level!r}: it is ignored"
    )
    assert lines[1:] == ["w of cspd", "w of cspd_kernels"]


@pytest.fixture
def told(caplog):
    """``told(function)``: the levels of what is logged meanwhile, as by a new process."""

    def run(function) -> list[str]:
        log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "cspd_kernels"):
            function()
        return [record.levelname for record in caplog.records]

    yield run
    log_once.cache_clear()


def test_a_slow_path_is_a_warning_on_a_cuda_device_alone(told):
    assert told(lambda: log_once("slow", slow_on=CUDA)) == ["WARNING"]
    assert told(lambda: log_once("slow", slow_on=CPU)) == ["INFO"]
    assert told(lambda: log_once("not slow")) == ["INFO"]
    assert told(lambda: [log_once("slow", slow_on=CUDA) for _ in range(3)]) == ["WARNING"]


def test_a_cause_is_one_warning(told):
    def both():
        log_once("denoise is slow", slow_on=CUDA, cause="triton: not installed; cuda: not built")
        log_once("noise is slow", slow_on=CUDA, cause="not installed")
        log_once("graphs are slow", slow_on=CUDA, cause="an old driver")

    assert told(both) == ["WARNING", "INFO", "WARNING"]


def test_weights_that_are_converted_at_every_call(told, monkeypatch):
    monkeypatch.setattr(live, "why_unavailable", lambda name: "it is not there")
    copies = [(torch.zeros(2), torch.ones(2))]
    assert told(lambda: live.copier(copies, CUDA)) == ["WARNING"]
    assert told(lambda: live.copier(copies, CPU)) == ["INFO"]


def test_a_norm_by_pytorchs_kernels(told, monkeypatch):
    monkeypatch.setattr("cspd_kernels.ops.add_norm.why_unavailable", lambda *_: "it is not there")
    monkeypatch.delenv("CSPD_BACKEND", raising=False)
    assert told(lambda: norm_backend(None, CUDA)) == ["WARNING"]
    assert told(lambda: norm_backend("cuda", CUDA)) == ["INFO"]  # as asked for
    assert told(lambda: norm_backend(None, CPU)) == []
