"""What is said beside the results of the built-in model, and of what was trained from it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BUILT_IN_NOTE = (
    "The built-in model, or what was trained from it, made these numbers. It answers 1 to 7 % of MAWPS, SVAMP and "
    "GSM8K and 25 % of the project's own one-step problems (100 problems a set, greedy, 256 tokens), so they show the "
    "harness and the mechanism, and not the gain that the paper reports."
)


def built_in_lines(made: Iterable[Mapping[str, Any]]) -> list[str]:
    """The note, if one of the models of these results is the built-in one or was trained from it, otherwise nothing.

    Args:
        made: what made the results, as `settings_lines` takes it.
    """
    models = [model for config in made for model in _models(config["settings"])]
    return [BUILT_IN_NOTE] if any(_is_built_in(model) for model in models) else []


def _models(settings: Mapping[str, Any]) -> Iterable[str | None]:
    """What `load_model` takes, of the one model that a run trains or of all that were measured."""
    return settings["models"].values() if "models" in settings else [settings.get("model")]


def _is_built_in(model: str | None) -> bool:
    """Whether the way from a checkpoint to the model that its run began from, and so on, ends at the built-in one."""
    seen = set()
    while model is not None and model not in seen:
        seen.add(model)
        try:
            model = json.loads((Path(model).parent / "config.json").read_text(encoding="utf-8"))["config"]["model"]
        except (KeyError, OSError, TypeError, ValueError):
            return False
    return model is None
