"""What a recipe has to work on: the model's shape, and rows and token lengths of the data, counted as the run will split them."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from trl import SFTConfig

from rlhf.data.read import is_local
from rlhf.errors import UserError
from rlhf.files import read_jsonl
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.scratch import design_base
from rlhf.models.text import answer_text, encode, prompt_text
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.stages import base_texts, run_data, run_lab
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.schema import DATA_SOURCES, Recipe

COUNTED = 512  # rows whose tokens are counted, of each kind


@dataclass
class Sizes:
    """Rows and token lengths of the data.

    Attributes:
        rows: by file: sft, pairs, test_pairs, prompts, test_prompts.
        prompts, answers, demonstrations: lengths of some.
        notes: what is not known, in sentences.
    """

    rows: dict[str, int]
    prompts: list[int]
    answers: list[int]
    demonstrations: list[int]
    notes: list[str] = field(default_factory=list)


def model_and_data(recipe: Recipe, work: Path) -> tuple[PretrainedConfig, Sizes]:
    """The configuration, and the data as the run's own stages make them, in a folder that is thrown away."""
    # 1. The data: the lab's, or local files.
    parents, folder = {}, work / "round-0/data"
    hub = [f"data.{name}" for name in DATA_SOURCES for s in recipe.data.sources(name) if not is_local(s.source)]
    if recipe.lab is not None:
        parents = {"lab": work / "round-0/lab"}
        run_lab(StageContext(recipe, parents["lab"], {}, lambda _: None))
    if not hub:
        run_data(StageContext(recipe, folder, parents, lambda _: None))

    # 2. The model's shape and its tokenizer.
    name: str | Path | None = parents["lab"] / "model" if parents else recipe.backbone.model
    if recipe.backbone.from_scratch is not None:
        if hub:
            raise UserError(
                f"rlhf plan: {', '.join(hub)}: from_scratch needs the texts, and these are not local files."
            )
        settings = dict(recipe.backbone.from_scratch)
        texts = base_texts(folder / "data")
        tokenizer, config = design_base(texts, architecture=settings.pop("architecture"), settings=settings)
        return config, _counted(recipe, folder / "data", tokenizer)
    assert name is not None, "the recipe's check wants a backbone, a lab or from_scratch"
    try:
        config = AutoConfig.from_pretrained(find_source(name).base, revision=recipe.backbone.revision)
        tokenizer = load_tokenizer(name, conversational=True, revision=recipe.backbone.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.model: {name}: {str(error).strip().splitlines()[0]}") from error
    return config, _from_caps(recipe, hub) if hub else _counted(recipe, folder / "data", tokenizer)


def _counted(recipe: Recipe, data: Path, tokenizer: PreTrainedTokenizerBase) -> Sizes:
    """Rows of every file, and the tokens of some; answers that nobody has written yet are as long as they may be."""
    files = {name: data / f"{name}.jsonl" for name in ("sft", "pairs", "test_pairs", "prompts", "test_prompts")}
    rows = {name: read_jsonl(file) if file.is_file() else [] for name, file in files.items()}
    rng = random.Random(0)
    some = {name: rng.sample(found, min(COUNTED, len(found))) for name, found in rows.items()}

    def read(prompts: list[Any], answers: list[str]) -> list[int]:
        texts = [answer_text(tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        return [len(ids) for ids in encode(tokenizer, texts, conversational=True)] if texts else []

    asked = [row["prompt"] for row in some["pairs"] or some["prompts"]]
    begins = [len(ids) for ids in encode(tokenizer, [prompt_text(tokenizer, p) for p in asked], conversational=True)]
    pairs = some["pairs"]
    whole = [
        read([r["prompt"] for r in pairs], [r[side][0]["content"] for r in pairs]) for side in ("chosen", "rejected")
    ]
    longest = recipe.ppo.trl_settings().get("max_completion_length", PPOConfig.max_completion_length)
    known = [max(1, n - p) for side in whole for n, p in zip(side, begins, strict=False)]
    notes = (
        [] if known else [f"No pairs yet: answers are taken to be {longest} tokens long, so these are upper bounds."]
    )
    return Sizes(
        rows={name: len(found) for name, found in rows.items()},
        prompts=begins,
        answers=known or [longest],
        notes=notes,
        demonstrations=read([r["prompt"] for r in some["sft"]], [r["completion"][0]["content"] for r in some["sft"]]),
    )


def _from_caps(recipe: Recipe, hub: list[str]) -> Sizes:
    """What a recipe says of hub data: as many rows as its caps allow, each as long as may be."""
    data, ppo = recipe.data, recipe.ppo.trl_settings()
    caps = {"sft": data.max_sft, "pairs": data.max_pairs, "prompts": data.max_prompts or data.max_pairs}
    absent = {"sft": data.sft is None, "pairs": data.preferences is None}
    missing = [f"data.max_{name}" for name, cap in caps.items() if cap is None and not absent.get(name)]
    if missing:
        raise UserError(
            f"rlhf plan: {', '.join(hub)} lie on a hub and are not downloaded to be counted; set {', '.join(missing)}."
        )
    prompt, answer = (ppo.get(n, getattr(PPOConfig, n)) for n in ("max_prompt_length", "max_completion_length"))
    longest = recipe.sft.trl_settings().get("max_length", SFTConfig.max_length)
    rows = {name: cap or 0 for name, cap in caps.items()}
    held_out = max(1, round(data.test_fraction * rows["pairs"]))
    return Sizes(
        rows=rows | {"test_pairs": held_out, "test_prompts": recipe.evaluate.prompts},
        prompts=[prompt],
        answers=[answer],
        demonstrations=[longest],
        notes=[
            f"{', '.join(hub)}: on a hub, not downloaded; as many rows as the caps allow, each as long as the settings allow, so "
            "these are upper bounds."
        ],
    )
