"""Messages to token ids and positions; output tokens to text; stop words, reasoning and calls of tools in it."""

from engine.prompts.answer import AnswerReader
from engine.prompts.builder import PromptBuilder
from engine.prompts.detokenize import Detokenizer
from engine.prompts.prompt import ImageSpan, Prompt
from engine.prompts.stop import StopMatcher
from engine.prompts.tokenizer import Tokenizer

__all__ = ["AnswerReader", "Detokenizer", "ImageSpan", "Prompt", "PromptBuilder", "StopMatcher", "Tokenizer"]
