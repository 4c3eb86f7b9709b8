"""Online speculative decoding for Hugging Face models: exact outputs, from a draft that learns while it serves."""

from typing import TYPE_CHECKING, Any

from .config import OnlineConfig
from .errors import (
    ClosedError,
    ConfigError,
    HfOsdError,
    InputError,
    LearningError,
    MissingDependencyError,
    PromptSourceError,
    StateError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .assistant import OnlineAssistant
    from .design.designing import design_draft
    from .generation import generate, online_decoding
    from .records import Observation
    from .serving.drafting import OnlineAssistedGenerator
    from .stats import OnlineStats

__version__ = "0.1.0"

__all__ = [
    "ClosedError",
    "ConfigError",
    "HfOsdError",
    "InputError",
    "LearningError",
    "MissingDependencyError",
    "Observation",
    "OnlineAssistant",
    "OnlineAssistedGenerator",
    "OnlineConfig",
    "OnlineStats",
    "PromptSourceError",
    "StateError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "__version__",
    "design_draft",
    "generate",
    "online_decoding",
]

# Loaded on first use, so that importing the package does not import torch and transformers' generation code.
_LAZY = {
    "Observation": ".records",
    "OnlineAssistant": ".assistant",
    "OnlineAssistedGenerator": ".serving.drafting",
    "OnlineStats": ".stats",
    "design_draft": ".design.designing",
    "generate": ".generation",
    "online_decoding": ".generation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
