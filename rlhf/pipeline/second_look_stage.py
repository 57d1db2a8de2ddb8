"""The second look of a round: experts label some of all pairs so far again, and every pair gets what is known of it."""

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from accelerate.utils import broadcast_object_list
from torch import Tensor

from rlhf.data.labelbook import BOOK, LOOKS, LabelBook
from rlhf.data.labels import Question, Verdict, question_id, read_questions
from rlhf.data.rows import SIDES, TIE, Pair, marked
from rlhf.errors import UserError, Waiting
from rlhf.files import digest, read_jsonl, write_jsonl, write_text
from rlhf.lab.annotators import simulate_expert
from rlhf.lab.worlds import WORLDS
from rlhf.models.text import plain
from rlhf.objectives.second_look import second_look
from rlhf.pipeline.context import PAIRS, TEST_PAIRS, StageContext
from rlhf.pipeline.known import (
    Known,
    expected_gain,
    gains,
    pair_features,
    relabelled,
    weigh_verdicts,
    what_voters_learn,
)
from rlhf.pipeline.launch import number_of_processes
from rlhf.pipeline.looked import EXPERT_ERROR, Looked, blind_questions, check_verdicts, count_opinions
from rlhf.pipeline.sampling import QUESTIONS
from rlhf.pipeline.store import CHECKPOINTS, POLL_SECONDS
from rlhf.pipeline.true_reward import load_true_reward, wrong_labels
from rlhf.pipeline.vote import vote, vote_again
from rlhf.report.second_look import alarm, gain_sentence, joined_sentence, unused_confidence, unused_vote

VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True)
class Asked:
    """What a round's second look asked, and what is known then.

    Attributes:
        count: pairs of this round.
        expected: what they were expected to add; None where votes say nothing.
        looked: verdicts of all rounds.
        known: by the vote that knew none of them.
    """

    count: int
    expected: dict[str, Any] | None
    looked: Looked
    known: Known


def run_second_look(context: StageContext) -> dict[str, Any]:
    """Ask experts about some pairs again, and write all pairs with P(chosen is better), the likelier answer as the chosen one.

    The label stage's pairs stay as they were labelled. The first vote is on those; the second knows all verdicts, each learnt by
    voters who don't vote on its pair, so that what is known of a pair is independent of its own verdicts.

    Raises:
        Waiting: experts have not answered all questions yet.
        UserError: nothing can be learnt from their verdicts.
    """
    # 1. All pairs as they were labelled, and a vote on them.
    seed, settings, shape = context.recipe.seed, context.training_settings("vote"), context.recipe.vote.shape()
    read: list[Pair] = read_jsonl(context.pairs)
    labelled = [pair for pair in read if pair.get("confidence") != TIE]
    for sentence in unused_confidence(labelled):
        context.say(f"second look: {sentence}")
    work = context.folder / CHECKPOINTS
    votes, _, _ = vote(context.sft_model, labelled, settings, work, seed=seed, say=context.say, **shape)

    # 2. Ask about pairs, and vote again with the verdicts. One process asks; all of them train voters.
    asked, wrong = _asked_by_one(context, labelled, votes.mean)
    again = None
    if wrong is not None:
        context.say("second look: the voters vote again, now with the verdicts.")
        shape = {name: shape[name] for name in ("members", "folds", "trunk")}
        work = work / f"again-{digest(wrong)[:12]}"  # people may change a verdict before a killed stage goes on
        again = vote_again(
            context.sft_model, labelled, settings, work, wrong=wrong, seed=seed, say=context.say, **shape
        )
    if asked is None:
        return {}

    # 3. Noise and posteriors with all verdicts.
    looked = asked.looked
    known = weigh_verdicts(labelled, votes.mean, looked, expert_error=EXPERT_ERROR, again=again)
    made = relabelled(read, labelled, known.after)
    _hand_on(context, made.pairs)

    # 4. Say it; and how many labels are wrong before and after, where that can be known.
    counts, changed, gold = looked.counts(), gains(known, looked), load_true_reward(context.recipe)
    context.say(
        f"second look: {asked.count} pairs, {counts['asked']} in all rounds; experts agree with the label of {counts['agree']}, "
        f"contradict that of {counts['contradict']}; of {len(made.pairs)} pairs {made.flipped} are flipped."
    )
    for sentence in [
        *joined_sentence(made.joined),
        *unused_vote(is_used=known.strength is again or again is None),
        *alarm(counts["contradict"], changed["foreseen"], EXPERT_ERROR),
    ]:
        context.say(f"second look: {sentence}")
    return {
        "pairs": len(made.pairs),
        "looked_at": asked.count,
        "expected": asked.expected,
        "voted_again": known.strength is again,
        **counts,
        "flipped": made.flipped,
        "joined": made.joined,
        "noise": asdict(known.noise) | {"low": known.low},
        **changed,
        "flip_rate": {"before": wrong_labels(read, gold), "after": wrong_labels(made.pairs, gold)},
    }


def _asked_by_one(
    context: StageContext, labelled: Sequence[Pair], strength: Tensor
) -> tuple[Asked | None, list[float] | None]:
    """Let one process ask, and tell all what voters learn of each label; None where they need not vote again.

    Raises:
        Waiting, UserError: in every process. Were it in one alone, the others' broken connection might be what is said.
    """
    asked: Asked | None = None
    answer: list[list[float] | Waiting | UserError | None] = [None]
    launch = [uuid4().hex]
    if number_of_processes() > 1:
        broadcast_object_list(launch)
    is_asked = context.folder / CHECKPOINTS / f"asked-{launch[0]}"
    if context.is_main:
        try:
            asked = _choose_and_ask(context, labelled, strength)
            answer = [_what_to_learn(asked, labelled)]
        except (Waiting, UserError) as end:
            answer = [end]
        write_text(is_asked, "")
    while not is_asked.is_file():  # a broadcast would wait for some minutes only
        time.sleep(POLL_SECONDS)
    if number_of_processes() > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], Waiting | UserError):
        raise answer[0]
    return asked, answer[0]


def _choose_and_ask(context: StageContext, labelled: Sequence[Pair], strength: Tensor) -> Asked:
    """Ask about the pairs whose second look is expected to teach most, by the vote and what experts said in earlier rounds."""
    questions, verdicts = _earlier_looks(context)
    looked = count_opinions(labelled, questions, verdicts)
    known = weigh_verdicts(labelled, strength, looked, expert_error=EXPERT_ERROR)
    chosen = second_look(
        pair_features(context.sft_model, labelled),
        known.noise.scale * strength,
        known.after,
        context.recipe.rounds.looked_at,
        error_rate=EXPERT_ERROR,
        is_open=looked.is_open,
    )
    expected = None
    if known.foreseen is not None and chosen:
        expected = expected_gain(strength, known.noise, known.after, chosen, expert_error=EXPERT_ERROR)
        context.say(f"second look: {gain_sentence(expected)}")
    asked, answers = _ask(context, blind_questions(labelled, chosen, context.round, seed=str(context.recipe.seed)))
    write_jsonl(context.folder / QUESTIONS, [question.as_row() for question in [*questions, *asked]])
    write_jsonl(context.folder / VERDICTS, [asdict(verdict) for verdict in [*verdicts, *answers]])
    looked = count_opinions(labelled, [*questions, *asked], [*verdicts, *answers])
    known = weigh_verdicts(labelled, strength, looked, expert_error=EXPERT_ERROR)
    return Asked(len(asked), expected, looked, known)


def _what_to_learn(asked: Asked, labelled: Sequence[Pair]) -> list[float] | None:
    """Return what voters learn of each label; None where verdicts or votes say nothing, so that they need not vote again."""
    known = asked.known
    if not asked.looked.teaches or not known.says_something:
        return None
    return what_voters_learn(labelled, asked.looked, known.noise, known.rates, expert_error=EXPERT_ERROR)


def _hand_on(context: StageContext, pairs: Sequence[Pair]) -> None:
    """Write the pairs where later stages read those of the label stage, with the held-out ones beside them."""
    write_jsonl(context.folder / PAIRS, pairs)
    held_out = context.parent("label") / TEST_PAIRS
    if held_out.is_file():
        shutil.copyfile(held_out, context.folder / TEST_PAIRS)


def _earlier_looks(context: StageContext) -> tuple[list[Question], list[Verdict]]:
    """Read the questions and verdicts of the rounds before."""
    before = context.find_parent("earlier")
    if before is None:
        return [], []
    return read_questions(before / QUESTIONS), [Verdict(**row) for row in read_jsonl(before / VERDICTS)]


def _ask(context: StageContext, questions: Sequence[Question]) -> tuple[list[Question], list[Verdict]]:
    """Ask experts: the lab's, or people, of whom a round that waited has asked already.

    Returns:
        the questions that were asked, and the verdicts on them.

    Raises:
        Waiting: people have not answered all questions yet.
        UserError: nothing can be learnt from their verdicts.
    """
    lab, number = context.recipe.lab, context.round
    if context.recipe.rounds.labels_from == "lab":
        assert lab is not None, "the recipe's check wants a lab"
        rng, world = random.Random(f"{context.recipe.seed} experts {number}"), WORLDS[lab.world]
        return list(questions), [
            Verdict(q.id, simulate_expert(plain(q.prompt), q.first, q.second, rng, EXPERT_ERROR, world), "expert")
            for q in questions
        ]
    folder = context.run / LOOKS
    folder.mkdir(exist_ok=True)
    book = LabelBook(folder / BOOK)
    pairs: list[Pair] = read_jsonl(context.pairs)
    # What was asked before stays, answered or not, as long as its pair is there; other pairs are of a label stage made anew since.
    there = {question_id(number, row["prompt"], [marked(row, side) for side in SIDES]) for row in pairs}
    kept = {question.id for question in book.questions(number)} & there
    if withdrawn := book.withdraw_others(number, kept):
        context.say(
            f"second look: {withdrawn} questions of an earlier attempt at round {number} are taken back; their verdicts count "
            "again where one is asked again."
        )
    if withdrawn := book.withdraw_later(number):
        context.say(
            f"second look: {withdrawn} questions of later rounds, which are made anew after this one, are taken back."
        )
    new = [question for question in questions if question.id not in kept]
    book.ask(new[: max(0, len(questions) - len(kept))])
    done, total, _ = book.progress(number, wanted=1)
    if done < total:
        raise Waiting(
            f"round {number}, second look: {done} of {total} pairs labelled by experts: `rlhf label {folder}`; then run the same "
            "command again."
        )
    asked, verdicts = book.questions(number), book.verdicts(number)
    check_verdicts(count_opinions(pairs, asked, verdicts), folder, asks_more=True)  # in the next round
    return asked, verdicts
