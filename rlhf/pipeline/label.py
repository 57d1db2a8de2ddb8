"""The label stage: somebody says which answer is better, and the new pairs join those of the rounds before."""

import random
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, Verdict, agreement, read_questions, tally
from rlhf.data.llm_judge import LanguageModelJudge
from rlhf.data.rows import prompt_key
from rlhf.data.sources import share_of_text
from rlhf.errors import UserError, Waiting
from rlhf.evaluation.pairs import ScoredPairs
from rlhf.files import read_jsonl, write_jsonl
from rlhf.lab.annotators import simulate_label
from rlhf.models.text import plain
from rlhf.pipeline.context import PAIRS, TEST_PAIRS, StageContext, gold_differences
from rlhf.pipeline.sampling import QUESTIONS
from rlhf.reward.denoise import TIE
from rlhf.statistics import clustered_mean

Rows = list[Any]
FRESH, QUARANTINE = "fresh.jsonl", "quarantine.jsonl"


def run_label(context: StageContext) -> dict[str, Any]:
    """Labels of this round's questions, pooled with the pairs so far.

    Raises:
        Waiting: people have not answered all questions yet.
        UserError: there is no pair to train on.
    """
    # 1. This round's pairs.
    how = context.recipe.rounds
    facts: dict[str, Any] = {"round": context.round}
    if how.labels_from == "dataset":
        pairs = _share_of_the_data(context)
        earlier, fresh = ([row for row in pairs if (row["round"] < context.round) == old] for old in (True, False))
    else:
        questions = read_questions(context.parents["select"] / QUESTIONS)
        verdicts = _verdicts(context, questions)
        result = tally(questions, verdicts)
        earlier, fresh = _pairs_before(context), result.rows
        write_jsonl(context.folder / QUARANTINE, result.quarantine)
        said = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count)
        context.say(f"label: of {len(questions)} questions: {said}.")
        facts |= {"questions": len(questions), **result.counts, "agreement": agreement(verdicts)}
        facts |= _fresh_accuracy(questions, verdicts)
    if not fresh and not earlier:
        raise UserError(
            f"{context.folder}: no pair was labelled, in this round or before; there is nothing to train on."
        )
    if not fresh:
        context.say("label: no new pair in this round; the reward model is trained on those of the rounds before.")

    # 2. Where no pairs were given to be judged on, some of the labels are, by prompt.
    if not (context.data / TEST_PAIRS).is_file():
        fresh, split = _hold_out(context, fresh)
        if not fresh and not earlier:
            raise UserError(
                f"{context.folder}: all labelled pairs are held out; label more, or lower data.test_fraction."
            )
        facts |= split

    # 3. Pooled, older labels with less weight where the recipe says so.
    pooled = [*earlier, *fresh]
    if how.age_weight < 1:
        ages = [context.round - int(row["round"]) for row in pooled]
        own = [1.0 if row.get("weight") is None else float(row["weight"]) for row in pooled]
        pooled = [{**row, "weight": w * how.age_weight**age} for row, w, age in zip(pooled, own, ages, strict=True)]
    write_jsonl(context.folder / FRESH, fresh)
    write_jsonl(context.folder / PAIRS, pooled)

    # 4. How many of the new labels are wrong, where that can be known.
    wrong = gold_differences(ScoredPairs.unscored(fresh), context.gold()) if fresh else None
    decided = [difference for difference in wrong or [] if difference != 0]
    flip_rate = sum(difference < 0 for difference in decided) / len(decided) if decided else None
    return {**facts, "fresh": len(fresh), "pairs": len(pooled), "flip_rate": flip_rate}


def _hold_out(context: StageContext, fresh: Rows) -> tuple[Rows, dict[str, int]]:
    """New pairs to train on; those of held-out prompts join the earlier rounds' in `test_pairs.jsonl`, ties apart, which judge
    nobody.

    Raises:
        UserError: there is none to judge on.
    """
    share, salt = context.recipe.data.test_fraction, f"labels of {context.recipe.seed}"
    is_held = [share_of_text(prompt_key(row["prompt"]), salt) < share for row in fresh]
    held = [row for row, is_out in zip(fresh, is_held, strict=True) if is_out]
    decided = [row for row in held if row.get("confidence") != TIE]
    before = read_jsonl(context.parents["earlier"] / TEST_PAIRS) if "earlier" in context.parents else []
    if not before and not decided:
        raise UserError(
            f"{context.folder}: none of {len(fresh)} labelled pairs is of a held-out prompt (data.test_fraction={share:g}), so the "
            "reward model could not be judged; label more, raise data.test_fraction, or name pairs under data.test."
        )
    write_jsonl(context.folder / TEST_PAIRS, [*before, *decided])
    facts = {"held_out": len(decided), "held_out_ties": len(held) - len(decided)}
    context.say(
        f"label: {len(decided)} of the new pairs are held out to judge the reward model on, {len(before) + len(decided)} so far; "
        f"{facts['held_out_ties']} ties beside them are left out."
    )
    return [row for row, is_out in zip(fresh, is_held, strict=True) if not is_out], facts


def _pairs_before(context: StageContext) -> Rows:
    """The pairs of the rounds before; their weights by age are put on anew every round."""
    if "earlier" in context.parents:
        rows = read_jsonl(context.parents["earlier"] / PAIRS)
        weight = context.recipe.rounds.age_weight
        return [_younger(row, weight, context.round - 1) for row in rows] if weight < 1 else rows
    offline = context.recipe.rounds.first == "offline"
    return [{"round": 1, **row} for row in read_jsonl(context.data / PAIRS)] if offline else []


def _younger(row: dict[str, Any], age_weight: float, of_round: int) -> dict[str, Any]:
    """A pair with the weight that it had before an earlier round made it less."""
    return {**row, "weight": row["weight"] / age_weight ** (of_round - int(row["round"]))}


def _share_of_the_data(context: StageContext) -> Rows:
    """What a dataset gives away up to this round: whole prompts, the same share of them every round."""
    rows = read_jsonl(context.data / PAIRS)
    prompts = sorted({repr(row["prompt"]) for row in rows})
    random.Random(context.recipe.seed).shuffle(prompts)
    count = int(context.own["of"])
    rounds = {prompt: place * count // len(prompts) + 1 for place, prompt in enumerate(prompts)}
    dealt = ({"round": rounds[repr(row["prompt"])], **row} for row in rows)
    return [row for row in dealt if row["round"] <= context.round]


def _verdicts(context: StageContext, questions: Sequence[Question]) -> list[Verdict]:
    """What the recipe's annotators say; people and judges write into the run's book, where nothing is lost."""
    how = context.recipe.rounds
    if how.labels_from == "lab":
        lab = context.recipe.lab
        assert lab is not None, "the recipe's check wants a lab"
        rng = random.Random(context.recipe.seed * 1000 + context.round)
        return [
            Verdict(
                q.id, *simulate_label(q.prompt[-1]["content"], q.first, q.second, rng, lab.annotators, lab.flip_rate)
            )
            for q in questions
        ]
    book = LabelBook(context.run / BOOK)
    book.ask(questions)
    if how.labels_from == "judge":
        _ask_a_model(context, book, questions)
        return book.verdicts(context.round)
    done, total = book.progress(context.round, wanted=how.annotators_per_pair)
    if done < total:
        raise Waiting(
            f"round {context.round}: {done} of {total} pairs labelled: `rlhf label {context.run}`; then run the same command again."
        )
    return book.verdicts(context.round)


def _ask_a_model(context: StageContext, book: LabelBook, questions: Sequence[Question]) -> None:
    """Ask a language model what it has not been asked yet, as far as the budget goes."""
    how = context.recipe.rounds
    assert how.judge_url is not None, "the recipe's check wants both"
    assert how.judge_model is not None, "the recipe's check wants both"
    answered = {verdict.id for verdict in book.verdicts(context.round) if verdict.annotator == how.judge_model}
    judge = LanguageModelJudge(how.judge_url, how.judge_model, key_variable=how.judge_key, budget=how.judge_budget)
    judge.sent = 2 * len(answered)
    left = [question for question in questions if question.id not in answered]
    for question in tqdm(left, desc="label", disable=None):
        if not judge.can_ask():
            context.say(f"label: the judge's budget of {how.judge_budget} requests is spent.")
            break
        book.record([Verdict(question.id, judge.label(question), how.judge_model)])
    context.say(
        f"label: the judge was sent {judge.sent} requests; {judge.order_decided} verdicts turned with the order (ties), "
        f"{judge.unreadable} answers had none."
    )


def _fresh_accuracy(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How well the reward model so far orders its own policy's answers, by labels that it has not seen."""
    thought = {q.id: q for q in questions if q.difference}
    rows = [
        (float((q.difference or 0) > 0) if v.label == "first" else float((q.difference or 0) < 0), plain(q.prompt))
        for v in verdicts
        if (q := thought.get(v.id)) is not None and v.label in ("first", "second")
    ]
    if not rows:
        return {"fresh_accuracy": None, "fresh_accuracy_ci": None}
    mean, interval = clustered_mean([right for right, _ in rows], [prompt for _, prompt in rows])
    return {"fresh_accuracy": mean, "fresh_accuracy_ci": interval}
