"""hf_osd logs as transformers does: at its verbosity, by its handler."""

import subprocess
import sys


def written(code: str) -> str:
    """What a fresh interpreter writes to stderr; pytest has handlers of its own."""
    before = "import logging\nfrom transformers.utils.logging import set_verbosity, set_verbosity_error\n"
    before += "import hf_osd._compat\nlogger = logging.getLogger('hf_osd.serving.engine')\n"
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=True).stderr


def test_the_verbosity_of_transformers_holds() -> None:
    """Would catch warnings that `set_verbosity_error` leaves on, and details that `set_verbosity_info` leaves off."""
    text = written("logger.warning('one'); logger.info('two'); set_verbosity_error(); logger.warning('three')")
    assert "one" in text
    assert "two" not in text
    assert "three" not in text
    assert "four" in written("set_verbosity(logging.INFO); logger.info('four')")


def test_a_level_of_its_own_goes_first() -> None:
    """Would catch a package that can no longer be made louder or quieter than transformers."""
    text = written("logging.getLogger('hf_osd').setLevel(logging.ERROR); logger.warning('one'); logger.error('two')")
    assert "one" not in text
    assert "two" in text
