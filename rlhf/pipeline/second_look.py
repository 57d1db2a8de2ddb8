"""The second look of an audit: which of its pairs experts label again, and what is known of all labels once they have."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.rows import TIE, Compare, Pair
from rlhf.data.sources import Row, Source
from rlhf.errors import UserError
from rlhf.files import digest, write_jsonl, write_text
from rlhf.objectives.second_look import second_look
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.audit import WORK, check_budget, read_audited_rows, write_page
from rlhf.pipeline.audited import Audited
from rlhf.pipeline.known import (
    believed_rate,
    expected_gain,
    gains,
    pair_features,
    relabelled,
    weigh_verdicts,
    what_voters_learn,
)
from rlhf.pipeline.looked import Looked, blind_questions, check_verdicts, count_opinions
from rlhf.pipeline.vote import vote_again
from rlhf.report.records import read_note
from rlhf.report.second_look import unused_confidence, unused_vote
from rlhf.reward.wants import find_wants

RELABELLED = "relabelled.jsonl"
SECOND_VOTE = "second_vote.safetensors"


def look_again(
    pairs: Source,
    model: str,
    out: Path,
    *,
    budget: int,
    expert_error: float,
    compare: Compare,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Ask about the pairs that are worth a second look; once they are labelled, say what is known of all pairs.

    The first call writes questions for `rlhf label OUT`, blind and in random order. The next takes the verdicts: voters vote
    again, now with these, noise and posteriors are estimated again, and `relabelled.jsonl` holds a row for each pair, the
    likelier answer as the chosen one, with P(chosen is better) as `confidence`. A larger budget asks about further pairs, by
    what the verdicts so far say. `audit.json` gets the key `second_look`, and the page a section.

    Args:
        pairs, model, compare, seed: of the finished audit.
        out: its folder.
        budget: how many pairs are looked at again in all.
        expert_error: how often an expert's verdict is wrong.
        say: tell the person at the terminal.

    Returns:
        the key `second_look`.

    Raises:
        UserError: an impossible budget or error rate, no usable verdicts, votes that say nothing.
    """
    # 1. What is known: the audit, the questions so far and their verdicts.
    result = _read_result(out, expert_error)
    read, _ = read_audited_rows(pairs, model, compare)
    rows = [row for row in read if row.values.get("confidence") != TIE]
    labelled = [row.values for row in rows]
    check_budget(budget, labelled, result["pairs"])
    for sentence in unused_confidence(labelled):
        say(f"second look: {sentence}")
    audited = _read_audited(out, rows)
    looked = _looked_so_far(out, labelled, budget)

    # 2. Votes, noise and posteriors again, with the verdicts.
    strength = audited.strength.mean
    known = weigh_verdicts(labelled, strength, looked, expert_error=expert_error)
    again = None
    if looked.teaches and known.says_something:
        wrong = what_voters_learn(labelled, looked, known.noise, known.rates, expert_error=expert_error)
        answered, asked = looked.counts()["answered"], looked.asked
        begin = f"second look: {answered} of {asked} pairs have a verdict; the voters vote again with these."
        again = _vote_again(out, result, labelled, wrong, begin=begin, seed=seed, say=say)
        known = weigh_verdicts(labelled, strength, looked, expert_error=expert_error, again=again)
        for sentence in unused_vote(is_used=known.strength is again):
            say(f"second look: {sentence}")
    noise = known.noise

    # 3. The next pairs, and what they are expected to add.
    chosen = second_look(
        pair_features(model, labelled),
        noise.scale * known.strength,
        known.after,
        budget - looked.asked or budget,
        error_rate=expert_error,
        is_open=looked.is_open,
    )
    changed = gains(known, looked)
    facts: dict[str, Any] = {
        "budget": budget,
        "expert_error": expert_error,
        **looked.counts(),
        "noise_rate": {"mean": changed["wrong"]["file"] / max(1, int((~looked.is_tie).sum())), "low": known.low},
        "voted_again": known.strength is again,
        "second_vote": None if again is None else "used" if known.strength is again else "not used",
        "flip_rate": believed_rate(noise),
        **changed,
        "next": expected_gain(known.strength, noise, known.after, chosen, expert_error=expert_error),
    }

    # 4. Ask, or write; and say it.
    if looked.asked < budget:
        LabelBook(out / BOOK).ask(blind_questions(labelled, chosen, looked.looks + 1, seed=result["key"]))
        facts |= {"asked": looked.asked + len(chosen), "open": len(chosen)}
    if looked.counts()["answered"]:
        made = relabelled([row.values for row in read], labelled, known.after)
        facts |= {"flipped": made.flipped, "joined": made.joined}
        write_jsonl(out / RELABELLED, made.pairs)
    result["second_look"] = facts
    write_page(out, result, audited, find_wants(labelled))
    write_text(out / "audit.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return facts


def _vote_again(
    out: Path,
    result: dict[str, Any],
    labelled: Sequence[Pair],
    wrong: list[float],
    *,
    begin: str,
    seed: int,
    say: Callable[[str], None],
) -> torch.Tensor:
    """Let the audit's voters vote again, or read what they said of the same labels and verdicts, [n] nats.

    Args:
        begin: what is said where they do vote.
    """
    vote, file = result["vote"], out / SECOND_VOTE
    key = digest([result["key"], wrong])
    with suppress(OSError, SafetensorError), safe_open(file, "pt") as kept:  # none, or a damaged one
        if (kept.metadata() or {}).get("key") == key:
            strength: torch.Tensor = kept.get_tensor("strength")
            return strength
    say(begin)
    shape = {name: vote[name] for name in ("members", "folds", "trunk")}
    work = out / WORK / key[:12]
    strength = vote_again(result["model"], labelled, vote["settings"], work, wrong=wrong, seed=seed, say=say, **shape)
    save_file({"strength": strength}, file.with_suffix(".tmp"), metadata={"key": key})
    file.with_suffix(".tmp").replace(file)
    shutil.rmtree(out / WORK)
    return strength


def check_expert_error(expert_error: float) -> None:
    """Refuse an error rate that no expert has.

    Raises:
        UserError: saying so.
    """
    if not 0 < expert_error < 0.5:
        raise UserError(
            f"--expert-error {expert_error:g}: an expert is wrong in more than 0 and less than half of all pairs."
        )


def _read_result(out: Path, expert_error: float) -> dict[str, Any]:
    """Read the finished audit, if its pairs can be looked at again.

    Raises:
        UserError: an impossible error rate, votes that say nothing.
    """
    check_expert_error(expert_error)
    result = read_note(out / "audit.json", "put it back from a copy, or choose another --out")
    if result["vote"]["scale"] == 0:
        raise UserError(
            f"{out}: the votes agree with the labels no more than chance, so nothing says which pairs to look at again; audit "
            "with a larger base model."
        )
    return result


def _looked_so_far(out: Path, labelled: Sequence[Pair], budget: int) -> Looked:
    """Read what experts have been asked and have said.

    Raises:
        UserError: they have been asked about more pairs than the budget, must answer before they are asked more, or have said
            nothing that can be used.
    """
    book = LabelBook(out / BOOK) if (out / BOOK).is_file() else None
    questions = [] if book is None else [question for look in book.rounds() for question in book.questions(look)]
    looked = count_opinions(labelled, questions, [] if book is None else book.verdicts())
    unanswered = looked.counts()["open"]
    if looked.asked > budget:
        raise UserError(
            f"{out}: --budget {budget}, but {looked.asked} pairs were asked about already; name that many or more."
        )
    if unanswered > 0 and looked.asked < budget:
        raise UserError(
            f"{out}: {unanswered} of {looked.asked} pairs are not labelled yet; label them before asking for more."
        )
    if looked.asked == budget or looked.verdicts:
        check_verdicts(looked, out, asks_more=looked.asked < budget)
    return looked


def _read_audited(out: Path, rows: Sequence[Row[Pair]]) -> Audited:
    """Read what the votes said about each pair.

    Raises:
        UserError: of other pairs.
    """
    table = parquet.read_table(out / "pairs.parquet").to_pydict()
    if table["row"] != [row.number - 1 for row in rows]:
        raise UserError(f"{out / 'pairs.parquet'}: is of other pairs than these; audit again in a new --out.")
    mean, std, wrong, wrong_without_wants = (
        torch.tensor(table[name])
        for name in ("strength_mean", "strength_std", "probability_wrong", "probability_wrong_without_wants")
    )
    strength = VoteStrength(mean, std, torch.full_like(mean, float("nan")), torch.tensor(table["strength_votes"]))
    suspicious = frozenset(i for i, marked in enumerate(table["suspicious"]) if marked)
    return Audited(rows, strength, wrong, wrong_without_wants, suspicious)
