"""Which draft serves which target. Importing this makes [`FeatureDraft`] known to transformers' Auto classes."""

from .feature_config import FeatureDraftConfig
from .features import FeatureDraft

__all__ = ["FeatureDraft", "FeatureDraftConfig"]
