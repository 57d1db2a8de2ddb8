"""Critique-out-Loud in a run: a first model learns to write critiques, writes its own of every answer, and goes on with these."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.rows import CRITIQUES, SIDES, Pair, answer, asked, has_ended, label_digest
from rlhf.errors import UserError
from rlhf.files import digest, json_lines, read_jsonl, write_jsonl, write_text
from rlhf.invariants.checks import CheckBook
from rlhf.models.critiques import REQUEST, CritiqueForm, room_before_critique
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.open import open_config
from rlhf.models.text import encode_answers
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.fit import fit_and_keep, kept_model
from rlhf.pipeline.store import CHECKPOINTS, METRICS
from rlhf.progress import duration
from rlhf.recipe.schema import Recipe
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.critiques import ENDED
from rlhf.reward.load import read_reward_model

BLOCK = 128  # pairs whose critiques are written, kept and reported together
WRITTEN, CRITIC_METRICS = "critiques.jsonl", "critic_metrics.jsonl"


class OwnCritiques(NamedTuple):
    """Pairs with the critiques that a first model wrote of their answers.

    Attributes:
        rows: with `critique_…` and `critique_…_ended` of both sides.
        start: the model that wrote them.
        counts: `given`, pairs whose own critiques it learnt from; `written`, critiques; `endless`, those that were cut.
    """

    rows: list[Any]
    start: Path
    counts: dict[str, int]


def critique_form(recipe: Recipe) -> CritiqueForm | None:
    """Return how critiques are asked for, as a card has it; None where the reward model writes none."""
    reward = recipe.reward
    if reward.extra_kind != "critique":
        return None
    return {"request": REQUEST, "tokens": reward.critique_tokens, "samples": reward.critiques}


def own_critiques(context: StageContext, rows: Sequence[Pair], book: CheckBook) -> OwnCritiques:
    """Train a first model on the critiques that pairs have, and let it write one of every answer.

    Critiques are sampled once, block by block; a block that lies there is not written again, and would be the same.

    Raises:
        UserError: no pair has critiques, or none of those that have some can be read with one behind it.
    """
    # 1. The first model, on the pairs that have critiques.
    given = [row for row in rows if all(name in row for name in CRITIQUES)]
    if not given:
        raise UserError(f"reward.extra: critique: none of {len(rows)} pairs has {' and '.join(CRITIQUES)}.")
    _check_room(context, given)
    context.say(
        f"reward: {len(given)} of {len(rows)} pairs have critiques, from which a first model learns to write them."
    )
    fit_and_keep(context, given, "critic", "critic", context.recipe.seed, book)
    start = kept_model(context, "critic")
    if (start.parent / METRICS).is_file():  # training may end before it logs
        shutil.copy(start.parent / METRICS, context.folder / CRITIC_METRICS)

    # 2. Its own critiques of all answers.
    form = critique_form(context.recipe)
    assert form is not None, "the recipe asks for critiques"
    facts = {"critiques": form, "load_in_4bit": context.trl_settings("reward").get("load_in_4bit")}
    critic = read_reward_model(start, facts, conversational=True, device=context.device)
    assert isinstance(critic, CritiqueRewardModel), "the facts say that it writes critiques"
    written = _written(context, critic, rows)
    endless = sum(not row[name] for row in written for name in ENDED)
    if endless:
        context.say(
            f"reward: {endless} of {2 * len(written)} critiques never came to their end and were cut after {form['tokens']} "
            "tokens; if these are many, raise reward.critique_tokens or train longer."
        )

    # 3. For whoever wants to read them; and the pairs with them.
    write_jsonl(context.folder / WRITTEN, written)
    pairs = [
        {**row, **{name: of_pair[name] for name in (*CRITIQUES, *ENDED)}}
        for row, of_pair in zip(rows, written, strict=True)
    ]
    return OwnCritiques(pairs, start, {"given": len(given), "written": 2 * len(written), "endless": endless})


def _check_room(context: StageContext, rows: Sequence[Pair]) -> None:
    """Refuse critiques so long that no pair fits before them, before a model is trained on what is left."""
    name, revision = context.sft_model, context.recipe.backbone.revision
    tokens = context.recipe.reward.critique_tokens
    config = open_config(find_source(name).base, revision)
    tokenizer = load_tokenizer(name, conversational=True, revision=revision)
    room = room_before_critique(config, tokenizer, tokens)
    if room is None:
        return
    lengths = []
    for side in SIDES:
        prompts, answers = [asked(row, side) for row in rows], [answer(row, side) for row in rows]
        lengths.append([len(ids) for ids in encode_answers(tokenizer, prompts, answers)[0]])
    shortest = min(map(max, *lengths))
    if shortest > room:
        raise UserError(
            f"reward.critique_tokens={tokens}: with a critique of so many tokens and the turn that asks for it, {max(room, 0)} are "
            f"left for prompt and answer, and the shortest of {len(rows)} pairs with critiques has {shortest}; lower it, or "
            "take a model that reads more."
        )


def _written(context: StageContext, critic: CritiqueRewardModel, rows: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return for each pair its `pair` digest, its critiques and whether these ended; blocks that were written are read."""
    written: list[dict[str, Any]] = []
    for start in range(0, len(rows), BLOCK):
        block, began = rows[start : start + BLOCK], time.monotonic()
        digests = [label_digest(row) for row in block]
        file = context.folder / CHECKPOINTS / f"critiques-{digest(digests)[:16]}.jsonl"
        if not file.is_file():
            sides = [(row, side) for row in block for side in SIDES]
            encoded = critic.encode(
                [asked(row, side) for row, side in sides],
                [answer(row, side) for row, side in sides],
                [has_ended(row[side]) for row, side in sides],
            )
            critiques = critic.write(encoded, sample=0, label="reward: critiques")
            texts = critic.tokenizer.batch_decode(critiques.rows, skip_special_tokens=True)
            made = [
                {
                    "pair": name,
                    **dict(zip(CRITIQUES, texts[2 * i : 2 * i + 2], strict=True)),
                    **dict(zip(ENDED, critiques.ended[2 * i : 2 * i + 2], strict=True)),
                }
                for i, name in enumerate(digests)
            ]
            write_text(file, json_lines(made))
            done, seconds = start + len(block), time.monotonic() - began
            rest = seconds / len(block) * (len(rows) - done)
            context.say(f"reward: critiques of {done} of {len(rows)} pairs; about {duration(rest)} to go.")
        written += read_jsonl(file)
    return written
