"""What made the results of a page, as lines that a reader can repeat them by: settings, seeds, versions and device."""

import json
from collections.abc import Mapping
from typing import Any

import em_kernels
from em_kernels.one_shot.analysis.runs import differing
from em_kernels.one_shot.policy.model import BUILT_IN

# Of more runs that share a value, the number says more than the names.
_NAMED = 4
# A longer text is a chat template, as a rule, and config.json has it in full.
_LONGEST = 100


def settings_lines(made: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown list: the settings and versions that are the same for all, and which have which others.

    Args:
        made: by the name of a run, or of a file of completions, what its config.json says: "settings" by name and,
            where they are known, "versions" by package, "device" and "processes".
    """
    lines = []
    for part in (_settings, _versions):
        own = {name: part(config) for name, config in made.items()}
        different = differing(own.values())
        common = {name: value for values in own.values() for name, value in values.items() if name not in different}
        alone = [name for name in common if name.startswith(("model ", "task "))]
        lines += [f"{name}: {_text(name, common.pop(name))}" for name in alone]
        lines += [", ".join(f"{name} {_text(name, value)}" for name, value in common.items())] if common else []
        lines += [_difference(name, own) for name in different]
    return [f"- {line}" for line in (*lines, f"this page: em_kernels {em_kernels.__version__}")]


def setting_text(name: str, value: object) -> str:
    """A setting's value for a table: texts cut short, the built-in model by its name, floats without trailing zeros."""
    if name == "prompts" and isinstance(value, list | tuple):
        first = shortened(str(value[0]), 24)
        return f"{len(value)} prompts ({first.removesuffix(' ...')} ...)" if len(value) > 1 else f"1 prompt ({first})"
    if name == "model":
        return BUILT_IN if value is None else str(value)
    if isinstance(value, list | tuple):
        return "/".join(setting_text("", one) for one in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else shortened(str(value), _LONGEST)


def shortened(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest].rstrip() + " ..."


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name, in which each model and each task has a name of its own."""
    settings = {**config["settings"]}
    # A digest tells the weights of two folders apart, and a reader nothing.
    settings.pop("weights", None)
    models, tasks = settings.pop("models", {}), settings.pop("tasks", {})
    named = {f"model {name}": source for name, source in models.items()}
    named |= {f"task {name}": contents for name, contents in tasks.items()}
    return {**named, **settings, **({"processes": config["processes"]} if "processes" in config else {})}


def _versions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**(config.get("versions") or {}), **({"device": config["device"]} if "device" in config else {})}


def _difference(name: str, made: Mapping[str, Mapping[str, Any]]) -> str:
    """Which of the runs have which value of a setting or a version."""
    # Texts that are cut short may be alike where the values are not.
    having: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for run, own in made.items():
        key = json.dumps(own.get(name, "absent"))
        having.setdefault(key, []).append(run)
        texts[key] = _text(name, own[name]) if name in own else "absent"
    parts = [
        f"{texts[key]} in {' and '.join(runs) if len(runs) <= _NAMED else f'{len(runs)} runs'}"
        for key, runs in having.items()
    ]
    return f"{name} differs: {'; '.join(parts)}"


def _text(name: str, value: object) -> str:
    """The text of a value, in quotation marks where a comma in it could be taken for the end of the value."""
    if name.startswith("task "):
        return str(value)
    text = setting_text("model" if name.startswith("model ") else name, value)
    return repr(text) if isinstance(value, str) and "," in text else text
