"""The label stage: somebody says which answer is better, and the new pairs join those of the rounds before."""

import random
from collections.abc import Sequence
from typing import Any

from rlhf.data.conversations import conversation_keys
from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, Verdict, agreement, all_alike, read_questions, tally
from rlhf.data.llm_judge import LanguageModelJudge
from rlhf.data.rows import TIE, Pair, prompt_key
from rlhf.data.sources import share_of_text
from rlhf.errors import UserError, Waiting
from rlhf.files import read_jsonl, write_jsonl
from rlhf.lab.annotators import simulate_label
from rlhf.lab.worlds import WORLDS
from rlhf.models.text import plain
from rlhf.models.verdicts import load_verdict_model
from rlhf.objectives.verdicts import first_is_better, turns_with_order
from rlhf.pipeline.context import PAIRS, TEST_PAIRS, StageContext
from rlhf.pipeline.sampling import QUESTIONS
from rlhf.pipeline.true_reward import load_true_reward, wrong_labels
from rlhf.progress import track
from rlhf.statistics import clustered_share

FRESH, QUARANTINE = "fresh.jsonl", "quarantine.jsonl"


def run_label(context: StageContext) -> dict[str, Any]:
    """Collect the labels of this round's questions, and pool them with the pairs so far.

    Raises:
        Waiting: people have not answered all questions yet.
        UserError: there is no pair to train on.
    """
    # 1. This round's pairs.
    facts: dict[str, Any] = {"round": context.round}
    if context.recipe.rounds.labels_from == "dataset":
        pairs = _dealt_out(context)
        earlier = [row for row in pairs if row["round"] < context.round]
        fresh = [row for row in pairs if row["round"] == context.round]
    else:
        questions, verdicts = _labelled(context, read_questions(context.parent("select") / QUESTIONS))
        result = tally(questions, verdicts)
        earlier, fresh = _pairs_before(context), result.rows
        write_jsonl(context.folder / QUARANTINE, result.quarantine)
        counts = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count)
        context.say(f"label: of {len(questions)} questions: {counts}.")
        alike = all_alike(verdicts)
        if alike is not None:
            context.say(f"label: {alike}")
        facts |= {"questions": len(questions), **result.counts, "agreement": agreement(verdicts)}
        facts |= _fresh_accuracy(questions, verdicts)
    if not fresh and not earlier:
        raise UserError(
            f"{context.folder}: no pair was labelled, in this round or before; there is nothing to train on."
        )
    if not fresh:
        context.say("label: no new pair in this round; the reward model is trained on those of the rounds before.")

    # 2. Where no pairs were given to evaluate on, some of the labels are held out, by conversation.
    if not (context.data / TEST_PAIRS).is_file():
        fresh, counts_held_out = _hold_out(context, fresh)
        if not fresh and not earlier:
            raise UserError(
                f"{context.folder}: all labelled pairs are held out; label more, or lower data.test_fraction."
            )
        facts |= counts_held_out

    # 3. Pooled, older labels with less weight where the recipe says so.
    pooled = _weighted_by_age([*earlier, *fresh], context.recipe.rounds.age_weight, context.round)
    write_jsonl(context.folder / FRESH, fresh)
    write_jsonl(context.folder / PAIRS, pooled)

    # 4. How many of the new labels are wrong, where that can be known.
    wrong = wrong_labels(fresh, load_true_reward(context.recipe)) if fresh else None
    return {**facts, "fresh": len(fresh), "pairs": len(pooled), "flip_rate": wrong}


def _weighted_by_age(rows: list[Pair], age_weight: float, of_round: int) -> list[Pair]:
    """Return pairs with their weights multiplied by `age_weight` for every round since they were labelled."""
    if age_weight == 1:
        return rows
    pairs: list[Pair] = []
    for row in rows:
        weight = 1.0 if row.get("weight") is None else float(row["weight"])
        pairs.append({**row, "weight": weight * age_weight ** (of_round - int(row["round"]))})
    return pairs


def _hold_out(context: StageContext, fresh: list[Pair]) -> tuple[list[Pair], dict[str, int]]:
    """Hold out the new pairs of some conversations: they join the earlier rounds' in `test_pairs.jsonl`, but for ties, which no
    reward model can be evaluated on.

    Returns:
        the new pairs to train on, and how many are held out.

    Raises:
        UserError: there is none to evaluate on.
    """
    share, salt = context.recipe.data.test_fraction, f"labels of {context.recipe.seed}"
    prompts = [row["prompt"] for row in read_jsonl(context.data / "prompts.jsonl")]  # of every round
    conversations = dict(zip(map(prompt_key, prompts), conversation_keys(prompts), strict=True))
    is_held = [share_of_text(conversations[prompt_key(row["prompt"])], salt) < share for row in fresh]
    held = [row for row, is_out in zip(fresh, is_held, strict=True) if is_out]
    decided = [row for row in held if row.get("confidence") != TIE]
    before = context.find_parent("earlier")
    held_before = [] if before is None else read_jsonl(before / TEST_PAIRS)
    if not held_before and not decided:
        raise UserError(
            f"{context.folder}: none of {len(fresh)} labelled pairs is of a held-out prompt (data.test_fraction={share:g}), so the "
            "reward model could not be judged; label more, raise data.test_fraction, or name pairs under data.test."
        )
    write_jsonl(context.folder / TEST_PAIRS, [*held_before, *decided])
    facts = {"held_out": len(decided), "held_out_ties": len(held) - len(decided)}
    context.say(
        f"label: {len(decided)} of the new pairs are held out to judge the reward model on, {len(held_before) + len(decided)} so "
        f"far; {facts['held_out_ties']} ties beside them are left out."
    )
    return [row for row, is_out in zip(fresh, is_held, strict=True) if not is_out], facts


def _pairs_before(context: StageContext) -> list[Pair]:
    """Read the pairs of the rounds before, without the weights of their age, which are put on anew every round."""
    before, rounds = context.find_parent("earlier"), context.recipe.rounds
    if before is not None:
        rows = read_jsonl(before / PAIRS)
        return [_younger(row, rounds.age_weight, context.round - 1) for row in rows] if rounds.age_weight < 1 else rows
    if rounds.first == "sampled":
        return []
    given: list[Pair] = read_jsonl(context.data / PAIRS)
    return [{"round": 1, **row} for row in given]


def _younger(row: Pair, age_weight: float, of_round: int) -> Pair:
    """Return a pair with the weight that it had before an earlier round made it less."""
    return {**row, "weight": row["weight"] / age_weight ** (of_round - int(row["round"]))}


def _dealt_out(context: StageContext) -> list[Pair]:
    """Read the pairs that a dataset gives away up to this round: whole prompts, the same share of them every round."""
    rows: list[Pair] = read_jsonl(context.data / PAIRS)
    keys = [prompt_key(row["prompt"]) for row in rows]
    prompts = sorted(set(keys))
    random.Random(context.recipe.seed).shuffle(prompts)
    count = int(context.settings["of"])
    rounds = {prompt: place * count // len(prompts) + 1 for place, prompt in enumerate(prompts)}
    dealt: list[Pair] = [{"round": rounds[key], **row} for key, row in zip(keys, rows, strict=True)]
    return [row for row in dealt if row["round"] <= context.round]


def _labelled(context: StageContext, questions: Sequence[Question]) -> tuple[Sequence[Question], list[Verdict]]:
    """Return the verdicts of the recipe's annotators, and the questions with their answers in the order that these saw.

    People and judges write into the run's book, where nothing is lost. A question that an earlier attempt at this round asked
    stands there in its order, which `first` and `second` mean.

    Raises:
        Waiting: people have not answered all questions yet.
    """
    rounds = context.recipe.rounds
    if rounds.labels_from == "lab":
        lab = context.recipe.lab
        assert lab is not None, "the recipe's check wants a lab"
        rng, world = random.Random(context.recipe.seed * 1000 + context.round), WORLDS[lab.world]
        settings = (rng, lab.annotators, lab.flip_rate, world)
        critic = lab.critic_error_rate
        return questions, [
            Verdict(q.id, *simulate_label(plain(q.prompt), q.first, q.second, *settings, critic_error_rate=critic))
            for q in questions
        ]
    if rounds.labels_from == "verdicts":
        return questions, _verdicts_of_a_model(context, questions)
    book = LabelBook(context.run / BOOK)
    if withdrawn := book.withdraw_others(context.round, {question.id for question in questions}):
        context.say(f"label: {withdrawn} questions of an earlier attempt at this round are taken back.")
    if withdrawn := book.withdraw_later(context.round):
        context.say(
            f"label: {withdrawn} questions of later rounds, which are made anew after this one, are taken back."
        )
    questions = book.ask(questions)
    if rounds.labels_from == "judge":
        _ask_a_model(context, book, questions)
        return questions, [v for v in book.verdicts(context.round) if v.annotator == rounds.judge_model]
    done, total, _ = book.progress(context.round, wanted=rounds.annotators_per_pair)
    if done < total:
        raise Waiting(
            f"round {context.round}: {done} of {total} pairs labelled: `rlhf label {context.run}`; then run the same command again."
        )
    return questions, book.verdicts(context.round)


def _verdicts_of_a_model(context: StageContext, questions: Sequence[Question]) -> list[Verdict]:
    """Read a causal model's verdicts on both orders of every pair; what does not fit in its context is skipped."""
    # 1. Ask. Nothing is lost in a killed stage but time: the same model gives the same verdicts again.
    name = context.recipe.rounds.judge_model
    assert name is not None, "the recipe's check wants one"
    model = load_verdict_model(name)
    compared = model.compare(
        [q.prompt for q in questions], [q.first for q in questions], [q.second for q in questions], label="label"
    )

    # 2. A label for each pair, and how sure the model is of it.
    verdicts = []
    for question, fits, share in zip(
        questions, compared.fits.tolist(), first_is_better(compared.orders).tolist(), strict=True
    ):
        label = "skip" if not fits else "tie" if share == TIE else "first" if share > TIE else "second"
        sure = max(share, 1 - share) if label in ("first", "second") else None
        verdicts.append(Verdict(question.id, label, name, confidence=sure))
    turned = turns_with_order(compared.orders)
    context.say(
        f"label: {name} gave its verdicts; {int(turned.sum())} of {len(questions)} turn with the order, mean bias "
        f"{compared.orders.bias.mean():+.2f} nats towards A; {model.too_long} pairs were too long for it (skipped)."
    )
    return verdicts


def _ask_a_model(context: StageContext, book: LabelBook, questions: Sequence[Question]) -> None:
    """Ask a language model what it has not been asked yet, as far as the budget goes."""
    rounds = context.recipe.rounds
    assert rounds.judge_url is not None, "the recipe's check wants both"
    assert rounds.judge_model is not None, "the recipe's check wants both"
    answered = {verdict.id for verdict in book.verdicts(context.round) if verdict.annotator == rounds.judge_model}
    before = 2 * sum(verdict.annotator == rounds.judge_model for verdict in book.verdicts())  # of all rounds
    judge = LanguageModelJudge(
        rounds.judge_url, rounds.judge_model, key_variable=rounds.judge_key, budget=rounds.judge_budget
    )
    judge.sent = before
    open_questions = [question for question in questions if question.id not in answered]
    for question in track(open_questions, "label", unit="pairs"):
        if not judge.can_ask():
            context.say(f"label: the judge's budget of {rounds.judge_budget} requests is spent.")
            break
        book.record([Verdict(question.id, judge.label(question), rounds.judge_model)])
    context.say(
        f"label: the judge was sent {judge.sent} requests{_since(before)}; {judge.order_decided} verdicts turned with the order "
        f"(ties), {judge.unreadable} answers had none; {judge.one_order} pairs had one in one order only (skipped)."
    )


def _since(before: int) -> str:
    return f", {before} of them before this start, which the other counts leave out" if before else ""


def _fresh_accuracy(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Measure how well the reward model so far orders its own policy's answers, by labels that it has not seen."""
    scored = {q.id: q for q in questions if q.difference}
    rows = [
        (float((q.difference or 0) > 0) if v.label == "first" else float((q.difference or 0) < 0), q.prompt)
        for v in verdicts
        if (q := scored.get(v.id)) is not None and v.label in ("first", "second")
    ]
    if not rows:
        return {"fresh_accuracy": None, "fresh_accuracy_ci": None}
    clusters = conversation_keys([prompt for _, prompt in rows])
    mean, interval = clustered_share([right for right, _ in rows], clusters)
    return {"fresh_accuracy": mean, "fresh_accuracy_ci": interval}
