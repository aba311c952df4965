"""What is kept on disk between requests: answers and image features.

Each has a folder of its own (answers-v1, features-v1): limits, expiry and write locks stay apart, and damage to one
does not reach the other. The version is that of the layout: a plugin of another layout on this storage uses its own.
"""

from engine.cache.answers import Answer, AnswerCache
from engine.cache.features import FeatureCache
from engine.cache.keys import answer_key, feature_key

__all__ = ["Answer", "AnswerCache", "FeatureCache", "answer_key", "feature_key"]
