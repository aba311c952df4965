"""Dify's files of the predefined models, models/llm/*.yaml, from engine/catalog.toml: `python -m tools.model_files`.

demo.yaml is written by hand; the parameters of all models are its, and only what depends on the model is put in.
"""

from __future__ import annotations

import re
from pathlib import Path

from cli.list_models import offered
from engine.catalog import BUNDLED, ROOT, CatalogModel

FOLDER = ROOT / "models" / "llm"
POSITION = "_position.yaml"
SAMPLE = "demo.yaml"
MAX_TOKENS = 1024  # unless the workflow says otherwise; an answer ends earlier where the model ends it
_RULES = "parameter_rules:\n"
_LIMITS = re.compile(r"(  - name: max_tokens\n(?:    .*\n)*?    default: )\d+(\n(?:    .*\n)*?    max: )\d+\n")
_HEAD = """\
# Made from engine/catalog.toml and demo.yaml by `python -m tools.model_files`.
model: {model.name}
label:
  en_US: {model.label}
  zh_Hans: {model.label}
model_type: llm
features:
{features}
model_properties:
  mode: chat
  context_size: {model.context}
"""


_THINKING = """\
  - name: enable_thinking
    label:
      en_US: Thinking
      zh_Hans: 思考
    type: boolean
    help:
      en_US: Whether the model reasons before it answers. Left empty, the model's own default holds.
      zh_Hans: 模型是否在回答前进行思考。留空则使用模型自身的默认设置。
    required: false
"""
_CALLS = ("tool-call", "multi-tool-call", "stream-tool-call")


def model_files() -> dict[str, str]:
    """File name to text, of all models but the bundled ones."""
    rules = (FOLDER / SAMPLE).read_text(encoding="utf-8").partition(_RULES)[2]
    files = {f"{model.name}.yaml": _model_file(model, rules) for model in offered()}
    files[POSITION] = "".join(f"- {name}\n" for name in (*BUNDLED, *(model.name for model in offered())))
    return files


def _model_file(model: CatalogModel, rules: str) -> str:
    features = "\n".join(f"  - {feature}" for feature in _features(model))
    fitted, count = _LIMITS.subn(rf"\g<1>{MAX_TOKENS}\g<2>{model.context}\n", rules)
    if count != 1:
        raise ValueError(f"{SAMPLE} has no max_tokens with a default and a max")
    return _HEAD.format(model=model, features=features) + _RULES + fitted + (_THINKING if model.thinking else "")


def _features(model: CatalogModel) -> list[str]:
    features = {"vision": model.vision, "video": model.video, "structured-output": True}
    return [name for name, has in features.items() if has] + [name for name in _CALLS if model.tools]


def main() -> None:
    """Write all, and remove those of models that are no longer offered."""
    files = model_files()
    for path in FOLDER.glob("*.yaml"):
        if path.name not in files and path.stem not in BUNDLED:
            path.unlink()
    for name, text in files.items():
        Path(FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
