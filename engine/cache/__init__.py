"""What is kept on disk between requests: answers and image features.

Each has a folder of its own (answers-v1, features-v1): limits, expiry and write locks stay apart, and damage to one
does not reach the other. The version is that of the layout: a plugin of another layout on this storage uses its own.
"""

from engine.cache.answers import Answer, AnswerCache
from engine.cache.features import FeatureCache
from engine.cache.keys import answer_key, feature_key
from engine.config import EngineConfig

__all__ = ["Answer", "AnswerCache", "FeatureCache", "answer_key", "feature_key", "open_caches"]


def open_caches(config: EngineConfig) -> tuple[AnswerCache | None, FeatureCache | None]:
    """Both, in the storage folder; None where the settings switch them off."""
    if not config.cache_enabled:
        return None, None
    folder, expiry_s = config.storage / "cache", config.cache_expiry_hours * 3600
    return (
        AnswerCache(folder, size_limit_bytes=config.answer_cache_mib << 20, expiry_s=expiry_s),
        FeatureCache(folder, size_limit_bytes=config.feature_cache_mib << 20),
    )
