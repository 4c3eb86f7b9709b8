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


def test_the_library_imports_nothing_of_the_command_line():
    """Catches an import of rich or typer, which only the extra `cli` brings, in what every user imports."""
    code = """
import builtins, pkgutil, importlib

real = builtins.__import__

def guarded(name, globals=None, *rest, **named):
    asks = (globals or {}).get("__name__", "")
    if asks.startswith("hf_osd") and name.partition(".")[0] in ("rich", "typer"):
        raise ModuleNotFoundError(f"{asks} imports {name}", name=name)
    return real(name, globals, *rest, **named)

builtins.__import__ = guarded
import hf_osd
of_commands = ("cli", "bench", "demo", "evaluation", "verify")
for module in pkgutil.walk_packages(hf_osd.__path__, "hf_osd."):
    parts = module.name.split(".")
    if parts[1] not in of_commands and parts[-1] not in ("command", "speculation"):
        importlib.import_module(module.name)
[getattr(hf_osd, name) for name in hf_osd.__all__]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_errors_are_builtin_errors_too():
    """Catches errors that `except ValueError` would miss."""
    errors = [value for name, value in vars(hf_osd).items() if name.endswith("Error")]
    assert len(errors) >= 8
    for error in errors:
        assert error is hf_osd.HfOsdError or len(error.__mro__) > 4
