"""Models that people add themselves, by a repository's name or a folder: what Dify should know comes from the files."""

from __future__ import annotations

from collections.abc import Sequence

from dify_plugin.entities import I18nObject
from dify_plugin.entities.model import (
    AIModelEntity,
    FetchFrom,
    ModelFeature,
    ModelPropertyKey,
    ModelType,
    ParameterRule,
)

from engine.catalog import folder_name
from engine.config import EngineConfig
from engine.describe import Description, describe
from engine.errors import CheckpointError
from engine.hub.origin import require_repository
from engine.hub.preview import preview
from engine.hub.progress import model_state, partial_folder

ENABLE_THINKING = "enable_thinking"  # the parameter that only models that think have
CALLS = (ModelFeature.TOOL_CALL, ModelFeature.MULTI_TOOL_CALL, ModelFeature.STREAM_TOOL_CALL)
MAX_TOKENS = 1024  # unless the workflow says otherwise; an answer ends earlier where the model ends it


def own_model_schema(model: str, config: EngineConfig, predefined: Sequence[AIModelEntity]) -> AIModelEntity | None:
    """A model that is here or on its way; None for one of which nothing is known yet. Asks no hub.

    Its parameters are those of the predefined models, which differ in nothing but limits and the switch for thinking,
    and that some of them have.
    """
    folder = model_state(model, config.storage).folder or partial_folder(folder_name(model), config.storage)
    try:
        description = describe(folder)
    except CheckpointError:
        return None
    rules = [rule for rule in predefined[0].parameter_rules if rule.name != ENABLE_THINKING]
    if description.thinking:
        known = (rule for thinking in predefined for rule in thinking.parameter_rules)
        rules.append(next(rule for rule in known if rule.name == ENABLE_THINKING))
    return _schema(model, description, rules)


def require_own_model(model: str, config: EngineConfig) -> Description:
    """What the model can do, from its folder or from the hub within seconds; nothing large is fetched.

    Raises UnknownModel, CheckpointError, DownloadFailed or StorageError, with what to change.
    """
    state = model_state(model, config.storage)
    if state.folder is not None:
        return describe(state.folder)
    return preview(require_repository(model, config), folder_name(model), config)


def _schema(model: str, description: Description, rules: Sequence[ParameterRule]) -> AIModelEntity:
    return AIModelEntity(
        model=model,
        label=I18nObject.model_validate({"en_US": model}),
        model_type=ModelType.LLM,
        fetch_from=FetchFrom.CUSTOMIZABLE_MODEL,
        features=_features(description),
        model_properties={ModelPropertyKey.MODE: "chat", ModelPropertyKey.CONTEXT_SIZE: description.context},
        parameter_rules=[_fitted(rule, description.context) for rule in rules],
    )


def _features(description: Description) -> list[ModelFeature]:
    return [
        *((ModelFeature.VISION,) if description.vision else ()),
        *((ModelFeature.VIDEO,) if description.video else ()),
        ModelFeature.STRUCTURED_OUTPUT,
        *(CALLS if description.tools else ()),
    ]


def _fitted(rule: ParameterRule, context: int) -> ParameterRule:
    """The rule for a model of that context. It keeps no template: the SDK would fill in what is left out on purpose."""
    bounds = {"max": float(context), "default": min(MAX_TOKENS, context)} if rule.name == "max_tokens" else {}
    return rule.model_copy(update={"use_template": None, **bounds})
