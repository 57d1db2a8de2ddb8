"""Write `rlhf/recipe/trl_keys.json` from the installed TRL; a test compares the two. Run after raising TRL's version:

python tests/generate_trl_keys.py
"""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path

TARGET = Path(__file__).parents[1] / "rlhf" / "recipe" / "trl_keys.json"


def json_types(annotation: object) -> tuple[list[str], list[str] | None]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds, choices = [], []
        for part in typing.get_args(annotation):
            kind, choice = json_types(part)
            kinds += kind
            choices += choice or []
        return sorted(set(kinds)), sorted(set(choices)) or None
    if origin is typing.Literal:
        return ["str"], sorted(str(x) for x in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ["str"], sorted(str(member.value) for member in annotation)
    names = {
        bool: "bool",
        int: "int",
        float: "float",
        str: "str",
        type(None): "null",
        dict: "dict",
        list: "list",
        tuple: "list",
    }
    kind = names.get(origin or annotation)
    return ([kind] if kind else ["dict", "str"]), None


def plain(value: object) -> object:
    if isinstance(value, enum.Enum):
        return value.value
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def keys_of(cls: type) -> dict[str, dict[str, object]]:
    hints = typing.get_type_hints(cls)
    result = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kinds, choices = json_types(hints[field.name])
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if default is None and "null" not in kinds:
            kinds = [*kinds, "null"]
        result[field.name] = {"types": kinds, "default": plain(default if default is not dataclasses.MISSING else None)}
        if choices or field.metadata.get("choices"):
            result[field.name]["choices"] = choices or list(field.metadata["choices"])
    return result


def describe() -> dict[str, dict[str, dict[str, object]]]:
    from transformers import CONFIG_MAPPING
    from trl import ModelConfig, RewardConfig, SFTConfig

    from rlhf.ppo.config import PPOConfig

    described = {
        name: keys_of(cls)
        for name, cls in (("model", ModelConfig), ("sft", SFTConfig), ("reward", RewardConfig), ("ppo", PPOConfig))
    }
    for architecture in ("llama", "qwen3"):
        own = {
            name: {
                "types": sorted(
                    {
                        {bool: "bool", int: "int", float: "float", str: "str", dict: "dict", list: "list"}.get(
                            type(value), "null"
                        ),
                        "float" if isinstance(value, int) and not isinstance(value, bool) else "null",
                    }
                ),
                "default": plain(value),
            }
            for name, value in CONFIG_MAPPING[architecture]().to_dict().items()
            if name
            not in (
                "architectures",
                "transformers_version",
                "model_type",
                "dtype",
                "id2label",
                "label2id",
                "_name_or_path",
            )
        }
        for name in ("rope_parameters", "rope_scaling", "sliding_window", "num_key_value_heads", "head_dim"):
            if name in own:
                own[name]["types"] = ["dict", "null"] if "rope" in name else ["int", "null"]
        described[architecture] = own
    return described


if __name__ == "__main__":
    TARGET.write_text(json.dumps(describe(), indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
