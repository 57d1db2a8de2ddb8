"""The second look of an audit: which of its pairs experts label again, and what is known of all labels once they have."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from torch import Tensor
from transformers import set_seed

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, Verdict, question_id
from rlhf.data.rows import SIDES, TIE, Compare, Pair, answer, asked, told
from rlhf.data.sources import Row, Source
from rlhf.errors import UserError
from rlhf.files import write_jsonl, write_text
from rlhf.models.load import build_reward_model, load_tokenizer, score_head
from rlhf.models.text import plain
from rlhf.objectives.second_look import (
    expected_change,
    log_odds_of_verdicts,
    posterior_of_observations,
    second_look,
    worth_in_sure_labels,
)
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.audit import check_budget, read_audited_rows, write_page
from rlhf.pipeline.audited import Audited
from rlhf.reward.denoise import flip_pair
from rlhf.reward.model import RewardModel
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.reward.wants import find_wants

RELABELLED = "relabelled.jsonl"
LEAST_RATE = 0.01  # no label is taken to be beyond doubt, or no expert could contradict it
FEWEST_ALIKE = 8  # as many verdicts for the first of two answers in random order are chance once in 2^8


def look_again(
    pairs: Source,
    model: str,
    out: Path,
    *,
    budget: int,
    expert_error: float,
    compare: Compare,
) -> dict[str, Any]:
    """Ask about the pairs that are worth a second look; once they are labelled, say what is known of all pairs.

    The first call writes questions for `rlhf label OUT`, blind and in random order. The next takes the verdicts: noise and
    posteriors are estimated again, and `relabelled.jsonl` holds all pairs, the likelier answer as the chosen one, with
    P(chosen is better) as `confidence`. A larger budget asks about further pairs, by what the verdicts so far say.
    `audit.json` gets the key `second_look`, and the page a section.

    Args:
        pairs, model, compare: of the finished audit.
        out: its folder.
        budget: how many pairs are looked at again in all.
        expert_error: how often an expert's verdict is wrong.

    Returns:
        the key `second_look`.

    Raises:
        UserError: an impossible budget or error rate, no usable verdicts, votes that say nothing.
    """
    # 1. What is known: the audit, the questions so far and their verdicts.
    if not 0 < expert_error < 0.5:
        raise UserError(
            f"--expert-error {expert_error:g}: an expert is wrong in more than 0 and less than half of all pairs."
        )
    result: dict[str, Any] = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    check_budget(budget, result["kept_pairs"], result["pairs"])
    noise = NoiseEstimate(**{field.name: result["vote"][field.name] for field in fields(NoiseEstimate)})
    if noise.scale == 0:
        raise UserError(
            f"{out}: the votes agree with the labels no more than chance, so nothing says which pairs to look at again; audit "
            "with a larger base model."
        )
    read, _ = read_audited_rows(pairs, model, compare)
    rows = [row for row in read if row.values.get("confidence") != TIE]
    audited = _read_audited(out, rows)
    looked = _opinions(out, rows)
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
        _check_verdicts(looked, out)

    # 2. Noise and posteriors again, with the verdicts.
    strength = audited.strength.mean
    before = _beliefs(strength, noise, torch.zeros_like(strength))
    verdicts = log_odds_of_verdicts(looked.agree, looked.contradict, error_rate=expert_error)
    if looked.verdicts:
        noise = estimate_noise(strength, [plain(row.values["prompt"]) for row in rows], verdicts)
    after = _beliefs(strength, noise, verdicts)
    after[looked.is_tie] = TIE

    # 3. The next pairs, and what they are expected to add.
    is_open = _open_pairs(rows, looked.is_asked)
    features = pair_features(model, [row.values for row in rows])
    chosen = second_look(
        features,
        noise.scale * strength,
        after,
        budget - looked.asked or budget,
        error_rate=expert_error,
        is_open=is_open,
    )
    next_worth = 4 * expected_change(after[chosen], error_rate=expert_error).sum().item()

    # 4. Say it, and ask or write.
    facts: dict[str, Any] = {
        "budget": budget,
        "expert_error": expert_error,
        **looked.counts(),
        "noise_rate": {"mean": noise.fitted, "low": noise.low},
        "wrong": {
            "file": (1 - before).sum().item(),
            "before": _still_wrong(before),
            "after": _still_wrong(after[~looked.is_tie]),
        },
        "worth": {
            "before": worth_in_sure_labels(before).sum().item(),
            "after": worth_in_sure_labels(after).sum().item(),
        },
        "next": {"pairs": len(chosen), "worth": next_worth},
    }
    if looked.asked < budget:
        _ask(out, rows, chosen, looked.looks + 1, seed=result["key"])
        facts |= {"asked": looked.asked + len(chosen), "open": len(chosen)}
    if looked.verdicts:
        facts["flipped"] = _write_relabelled(out / RELABELLED, read, rows, after, looked, proved=noise.fitted > 0)
    result["second_look"] = facts
    write_page(out, result, audited, find_wants([row.values for row in rows]))
    write_text(out / "audit.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return facts


@dataclass(frozen=True)
class Looked:
    """What experts said of an audit's pairs.

    Attributes:
        agree, contradict, equal: [n] verdicts that agree with the label, contradict it, or call the answers equal.
        is_asked: [n] whether a pair was asked about.
        verdicts: all of them, skips among them.
        asked, skipped, looks: questions, those with nothing but skips, and batches of them.
    """

    agree: Tensor
    contradict: Tensor
    equal: Tensor
    is_asked: Tensor
    verdicts: Sequence[Verdict]
    asked: int
    skipped: int
    looks: int

    @property
    def is_tie(self) -> Tensor:
        """Tell which pairs experts called equal and nothing else, [n] bool."""
        return (self.equal > 0) & (self.agree + self.contradict == 0)

    def counts(self) -> dict[str, int]:
        """Count questions by what became of them."""
        answered = int((self.agree + self.contradict + self.equal > 0).sum())
        return {
            "asked": self.asked,
            "answered": answered,
            "open": self.asked - answered - self.skipped,
            "skipped": self.skipped,
            "ties": int(self.is_tie.sum()),
            "agree": int((self.agree > self.contradict).sum()),
            "contradict": int((self.contradict > self.agree).sum()),
        }


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


def _question(row: Pair, look: int, *, swapped: bool) -> Question:
    """Return a pair as a blind question: nothing in it says which answer was labelled the better one."""
    first, second = (told(row, side) for side in (reversed(SIDES) if swapped else SIDES))
    return Question(question_id(look, row["prompt"], [first, second]), look, row["prompt"], first, second)


def _opinions(out: Path, rows: Sequence[Row[Pair]]) -> Looked:
    """Count the verdicts on each pair, an annotator's last one each."""
    agree, contradict, equal = (torch.zeros(len(rows)) for _ in range(3))
    is_asked = torch.zeros(len(rows), dtype=torch.bool)
    book = LabelBook(out / BOOK) if (out / BOOK).is_file() else None
    looks = book.rounds() if book is not None else []
    questions = {q.id.partition("-")[2]: q for look in looks for q in book.questions(look)} if book is not None else {}
    verdicts = book.verdicts() if book is not None else []
    labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        labels[verdict.id.partition("-")[2]][verdict.label] += 1
    for i, row in enumerate(rows):
        pair = _question(row.values, 1, swapped=False)
        name = pair.id.partition("-")[2]
        if name in questions:
            same, other = ("first", "second") if questions[name].first == pair.first else ("second", "first")
            is_asked[i], counts = True, labels[name]
            agree[i], contradict[i], equal[i] = counts[same], counts[other], counts["tie"]
    skipped = sum(name in questions and set(counts) == {"skip"} for name, counts in labels.items())
    return Looked(agree, contradict, equal, is_asked, verdicts, len(questions), skipped, len(looks))


def _check_verdicts(looked: Looked, out: Path) -> None:
    """Refuse verdicts from which nothing can be learnt.

    Raises:
        UserError: there are none, or none on these pairs; all are ties, or all are for the same of two random sides.
    """
    labels = Counter(verdict.label for verdict in looked.verdicts if verdict.label != "skip")
    if not labels:
        raise UserError(
            f"{out}: none of the {looked.asked} pairs has a verdict yet: `rlhf label {out}`; then run the same command again."
        )
    if looked.counts()["answered"] == 0:
        raise UserError(
            f"{out / BOOK}: its {labels.total()} verdicts are on other pairs than the {looked.asked} asked about; label these."
        )
    if len(labels) > 1:
        return
    (only,) = labels
    if only == "tie":
        raise UserError(
            f"{out}: all {labels['tie']} verdicts are ties, so they say of no label that it is wrong; label more."
        )
    if labels[only] >= FEWEST_ALIKE:
        raise UserError(
            f"{out}: all {labels[only]} verdicts are for the {only} answer, though the order was random; was one key held down? "
            "Label again."
        )


def _beliefs(strength: Tensor, noise: NoiseEstimate, verdicts: Tensor) -> Tensor:
    """Return P(chosen is better) of every pair, [n]; the rate of wrong labels is what is proved, else the likeliest."""
    rate = min(max(noise.fitted or noise.flip_rate, LEAST_RATE), 0.5)
    return posterior_of_observations(strength, verdicts, flip_rate=rate, scale=noise.scale)


def _still_wrong(right: Tensor) -> float:
    """Return how many labels are expected to be wrong where each is flipped to the likelier side: Σ min(p, 1 - p)."""
    return torch.minimum(right, 1 - right).sum().item()


def pair_features(model: str | Path, rows: Sequence[Pair]) -> Tensor:
    """Return what a reward head on this model would read of each pair, chosen minus rejected, [n, h].

    An encoder has no such head; there all features are 1, and pairs are taken by their labels' doubt alone.
    """
    set_seed(0)
    tokenizer = load_tokenizer(model, conversational=True)
    assert isinstance(tokenizer.pad_token_id, int)
    network = build_reward_model(model, pad_token_id=tokenizer.pad_token_id)
    if score_head(network) is None:
        return torch.ones(len(rows), 1)
    reward = RewardModel(network.eval(), tokenizer, conversational=True)
    chosen, rejected = (
        reward.features([asked(row, side) for row in rows], [answer(row, side) for row in rows]) for side in SIDES
    )
    return chosen - rejected


def _open_pairs(rows: Sequence[Row[Pair]], is_asked: Tensor) -> Tensor:
    """Tell which pairs may be asked about, [n] bool: not asked yet, and of a pair that stands in several rows the first."""
    seen: set[str] = set()
    is_open = ~is_asked
    for i, row in enumerate(rows):
        name = _question(row.values, 1, swapped=False).id
        is_open[i] &= name not in seen
        seen.add(name)
    return is_open


def _ask(out: Path, rows: Sequence[Row[Pair]], chosen: Sequence[int], look: int, *, seed: str) -> None:
    """Write the chosen pairs into the audit's book, pairs and sides in random order."""
    rng = random.Random(f"{seed} {look}")
    questions = [_question(rows[i].values, look, swapped=rng.random() < 0.5) for i in rng.sample(chosen, len(chosen))]
    LabelBook(out / BOOK).ask(questions)


def _write_relabelled(
    file: Path, read: Sequence[Row[Pair]], rows: Sequence[Row[Pair]], right: Tensor, looked: Looked, *, proved: bool
) -> int:
    """Write all pairs, those that the file calls ties too, the likelier answer as the chosen one.

    Args:
        right: [n] P(chosen is better).
        proved: some labels are known to be wrong; else only the pairs that were looked at get a confidence.

    Returns:
        how many labels are flipped.
    """
    place = {id(row): i for i, row in enumerate(rows)}
    is_answered = (looked.agree + looked.contradict + looked.equal) > 0
    pairs: list[Pair] = []
    flipped = 0
    for row in read:
        i = place.get(id(row))
        if i is None or not (proved or is_answered[i]):
            pairs.append(row.values)
            continue
        pair: Pair = {**row.values, "confidence": right[i].item()}
        flipped += pair["confidence"] < TIE
        pairs.append(flip_pair(pair) if pair["confidence"] < TIE else pair)
    write_jsonl(file, pairs)
    return flipped
