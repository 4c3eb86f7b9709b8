"""The public names."""

import subprocess
import sys

import hf_osd


def test_all_is_sorted_and_importable():
    """Catches names that are promised and missing."""
    assert hf_osd.__all__ == sorted(hf_osd.__all__)
    for name in hf_osd.__all__:
        assert getattr(hf_osd, name) is not None
    assert set(hf_osd._LAZY) <= set(hf_osd.__all__)


def test_import_is_light():
    """Catches heavy imports on the way: torch, transformers and trl must come with first use."""
    code = "import sys, hf_osd; print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    code = "import sys, hf_osd.generation; print('trl' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_errors_are_builtin_errors_too():
    """Catches errors that `except ValueError` would miss."""
    errors = [value for name, value in vars(hf_osd).items() if name.endswith("Error")]
    assert len(errors) >= 8
    for error in errors:
        assert error is hf_osd.HfOsdError or len(error.__mro__) > 4
