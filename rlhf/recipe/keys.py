"""TRL's keys, which a stage of a recipe may set beside ours."""

import json
from functools import cache
from importlib import resources
from typing import Any

from rlhf.recipe.foreign_keys import REFUSED_KEYS


@cache
def trl_keys() -> dict[str, dict[str, dict[str, Any]]]:
    """Read names, types and defaults of TRL's keys by section, as generated from the tested version of TRL.

    `model` holds the keys of `trl.ModelConfig`, which every stage takes; `llama` and `qwen3` those of a model built
    from nothing.
    """
    text = resources.files("rlhf.recipe").joinpath("trl_keys.json").read_text(encoding="utf-8")
    keys: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return keys


def stage_keys(section: str) -> dict[str, dict[str, Any]]:
    """Return TRL's keys that a stage section may set."""
    keys = trl_keys()
    stage = keys["reward" if section == "vote" else section]  # a member of a vote is a reward model
    return {name: key for name, key in {**keys["model"], **stage}.items() if name not in REFUSED_KEYS}
