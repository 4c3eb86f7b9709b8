"""The command line, `hf-osd`. It needs the extra `cli`; the library does not."""

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run `hf-osd`; exits with 2 and an install hint where rich or typer is missing."""
    missing = [name for name in ("rich", "typer") if find_spec(name) is None]
    if missing:
        sys.stderr.write(f'hf-osd needs {" and ".join(missing)}: pip install "hf-osd[cli]"\n')
        raise SystemExit(2)
    from .app import main as run

    run()
