"""Several drafts for one target: which of them serves a prompt."""

from .prompt import Prompt
from .router import Bandit, ByKey, ByLanguage, Router
from .topics import ByTopic

__all__ = ["Bandit", "ByKey", "ByLanguage", "ByTopic", "Prompt", "Router"]
