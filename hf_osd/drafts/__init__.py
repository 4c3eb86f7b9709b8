"""Drafts for a target: made, checked, timed. The import registers [`FeatureDraft`] with transformers' Auto classes."""

from .feature_config import FeatureDraftConfig
from .features import FeatureDraft

__all__ = ["FeatureDraft", "FeatureDraftConfig"]
