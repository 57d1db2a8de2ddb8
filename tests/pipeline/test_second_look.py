"""The second look of an audit: asked blind, taken as observations, and refused in sentences where nothing can be learnt."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.numpy import load_file

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, Verdict
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.files import read_jsonl
from rlhf.pipeline.audit import audit
from rlhf.pipeline.known import beliefs, expected_gain
from rlhf.pipeline.looked import Looked, check_verdicts
from rlhf.pipeline.second_look import RELABELLED, SECOND_VOTE, look_again
from rlhf.recipe import load_recipe
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.serve.desk import import_from, open_book
from rlhf.serve.label import annotator_tokens, label_app
from tests.conftest import WORDS

RECIPE = """
name: r
lab: {}
vote: {members: 4, folds: 2, trunk: 1}
reward: {learning_rate: 3.0e-3, per_device_train_batch_size: 8, num_train_epochs: 2}
"""
ERROR = 0.05


def write_pairs(file: Path) -> None:
    """120 pairs whose better answer says yes, a fifth of them labelled the other way; the last one is a tie."""
    rows = []
    for i in range(120):
        better, worse = f"yes {WORDS[i % 9]}", f"no {WORDS[(i + 4) % 9]}"
        sides = (worse, better) if i % 5 == 0 else (better, worse)
        rows.append({"prompt": f"{WORDS[i % 11]} {WORDS[i % 13]} {i}", "chosen": sides[0], "rejected": sides[1]})
    rows.append({"prompt": "equal", "chosen": "yes a", "rejected": "yes b", "confidence": 0.5})
    for row in rows[:-1]:
        row["confidence"] = 1.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def audited(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An audit whose vote is made once: its arguments and its folder."""
    place = tmp_path_factory.mktemp("audited")
    write_pairs(place / "pairs.jsonl")
    (place / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(place / "r.yaml")
    arguments: dict[str, Any] = {"members": None, "recipe": recipe, "say": lambda _: None}
    with pytest.raises(UserError, match=r"--budget 500: .* holds 120 pairs"):
        audit(str(place / "pairs.jsonl"), str(base_folder), place / "out", **arguments, budget=500)
    assert not (place / "out").exists(), "nothing is made for an impossible budget"
    audit(str(place / "pairs.jsonl"), str(base_folder), place / "out", **arguments, budget=12)
    return {"place": place, "pairs": Source(str(place / "pairs.jsonl")), "model": str(base_folder)}


@dataclass
class LookInCopy:
    """Looks again in a copy of an audit's folder.

    Attributes:
        audited: the audit.
        out: the copy.
        said: what the person at the terminal was told.
    """

    audited: dict[str, Any]
    out: Path
    said: list[str] = field(default_factory=list)

    def __call__(self, budget: int, error: float = ERROR) -> dict[str, Any]:
        arguments: dict[str, Any] = {"expert_error": error, "compare": "answers", "seed": 0, "say": self.said.append}
        return look_again(self.audited["pairs"], self.audited["model"], self.out, budget=budget, **arguments)


@pytest.fixture
def look(audited: dict[str, Any], tmp_path: Path) -> LookInCopy:
    shutil.copytree(audited["place"] / "out", tmp_path / "out")
    return LookInCopy(audited, tmp_path / "out")


def truth(question: Question) -> str:
    return "first" if question.first.startswith("yes") else "second"


def answer_all(out: Path, label: Any) -> list[Question]:
    book, number, wanted = open_book(out)
    assert wanted == 1
    questions = book.questions(number)
    book.record([Verdict(q.id, label(i, q), "ann") for i, q in enumerate(questions)])
    return questions


def test_verdicts_become_confidence_by_bayes_and_ties_stay(look: LookInCopy) -> None:
    before = json.loads((look.out / "audit.json").read_text())
    first = look(12)
    assert (first["asked"], first["open"], first["answered"]) == (12, 12, 0)
    assert not (look.out / RELABELLED).exists(), "nothing is relabelled before there is a verdict"
    questions = answer_all(look.out, lambda i, q: "tie" if i == 0 else "skip" if i == 1 else truth(q))
    (look.out / SECOND_VOTE).write_bytes(b"cut off")
    facts = look(12)
    assert (facts["answered"], facts["skipped"], facts["ties"], facts["open"]) == (11, 1, 1, 0)
    assert facts["agree"] + facts["contradict"] == 10
    assert facts["next"]["pairs"] == 12
    assert facts["next"]["labels"] > facts["next"]["worth"], "a label of this file is worth less than a sure one"
    assert facts["worth"]["after"] > facts["worth"]["before"] - 1, "a tie is worth none, ten verdicts are"
    assert facts["wrong"]["after"] < facts["wrong"]["before"] <= facts["wrong"]["file"]

    # Every row of the file is there; numpy's Bayes gives the confidence of those that were looked at.
    import pyarrow.parquet as parquet

    relabelled = read_jsonl(look.out / RELABELLED)
    assert len(relabelled) == 121
    assert relabelled[-1]["confidence"] == 0.5, "the file's own tie is kept"
    table = parquet.read_table(look.out / "pairs.parquet").to_pydict()
    assert facts["voted_again"]
    d, rate, shared = load_file(look.out / SECOND_VOTE)["strength"], facts["flip_rate"], facts["shared"]
    assert np.corrcoef(d, table["strength_mean"])[0, 1] > 0.8, "the same voters, who know ten labels better"
    assert 0.05 < rate < 0.4
    assert facts["noise_rate"]["mean"] == pytest.approx(facts["wrong"]["file"] / (120 - facts["ties"]))
    by_prompt = {q.prompt[0]["content"]: i for i, q in enumerate(questions)}
    rights, places = np.zeros(120), [by_prompt.get(row["prompt"][0]["content"]) for row in relabelled[:-1]]
    for i, row in enumerate(relabelled[:-1]):
        assert row["confidence"] >= 0.5
        was_turned = row["chosen"][0]["content"].startswith("yes") == (i % 5 == 0)
        rights[i] = 1 - row["confidence"] if was_turned else row["confidence"]
    assert rights[places.index(0)] == 0.5, "a tie is a tie, whatever the votes say"
    not_looked_at = [i for i, place in enumerate(places) if place in (None, 1) and 1e-4 < rights[i] < 1 - 1e-4]
    odds = np.log(rights / (1 - rights))[not_looked_at]  # beyond, float32 has no digits for them
    scales = (odds - np.log((1 - rate) / rate)) / d[not_looked_at]
    assert len(scales) >= 8
    np.testing.assert_allclose(scales, np.median(scales), rtol=0.02, err_msg="label and vote add")
    for i, place in enumerate(places):
        if place is None or place < 2:
            continue
        by_label = 1 / (1 + rate / (1 - rate) * np.exp(-np.median(scales) * d[i]))
        doubted, agrees = (1 - shared) * by_label + shared / 2, i % 5 != 0
        verdict = (1 - ERROR) / ERROR if agrees else ERROR / (1 - ERROR)
        after = verdict * doubted / (verdict * doubted + 1 - doubted)
        bound = max(after, by_label) if agrees else min(after, by_label)
        assert rights[i] == pytest.approx(bound, abs=0.01)

    # The audit's own keys stay; the page says it.
    after = json.loads((look.out / "audit.json").read_text())
    assert {key: after[key] for key in before} == before
    assert after["second_look"] == facts
    page = (look.out / "audit.html").read_text()
    assert "Second look" in page
    assert "call the answers of 1 equal (kept as ties); 1 more are skipped." in page
    assert "The most suspicious pairs" in page
    assert f"or what {facts['next']['labels']:,.0f} more labels like these do, on new pairs: " in page

    # The same verdicts need no second vote again; a larger budget asks about other pairs.
    assert [line for line in look.said if "vote again" in line] == [
        "second look: 11 of 12 pairs have a verdict; the voters vote again with these."
    ]
    assert look(12) == facts
    assert "The voters voted again with these verdicts." in page
    more = look(20)
    assert len([line for line in look.said if "vote again" in line]) == 1
    assert (more["asked"], more["open"]) == (20, 8)
    book = LabelBook(look.out / BOOK)
    prompts = [q.prompt[0]["content"] for number in book.rounds() for q in book.questions(number)]
    assert len(set(prompts)) == 20
    with pytest.raises(UserError, match="8 of 20 pairs are not labelled yet"):
        look(30)
    with pytest.raises(UserError, match="20 pairs were asked about already"):
        look(5)


def test_the_page_is_blind(look: LookInCopy) -> None:
    """Neither the page nor the book says which answer was labelled the better one, nor what the votes think."""
    look(40)
    book, number, wanted = open_book(look.out)
    questions = book.questions(number)
    assert all(q.difference is None and q.source is None for q in questions)
    first_is_chosen = 0
    for question in questions:
        i = int(question.prompt[0]["content"].split()[-1])
        first_is_chosen += question.first.startswith("yes") == (i % 5 != 0)
    assert 8 <= first_is_chosen <= 32, "sides are drawn: ±4 deviations"
    tokens = annotator_tokens(book.path, ["ann"])
    client = TestClient(label_app(book, number, tokens, wanted=wanted, title="audit"))
    page = client.get("/", params={"token": tokens["ann"]}).text
    shown = book.next_for("ann", number, wanted=wanted)
    assert shown is not None
    assert shown.first in page
    assert shown.second in page
    body = page.split("</style>")[1].split("<script")[0].lower()
    for word in ("chosen", "rejected", "label of", "confidence", "suspicious", "strength", "wrong"):
        assert word not in body, word


def test_what_cannot_be_used_is_a_sentence(look: LookInCopy, tmp_path: Path) -> None:
    listing = sorted(path.name for path in look.out.iterdir())
    for budget in (0, 121):
        with pytest.raises(UserError, match=f"--budget {budget}: .* 120 pairs to look at again"):
            look(budget)
    for error in (0.0, 0.5):
        with pytest.raises(UserError, match="--expert-error"):
            look(12, error)
    with pytest.raises(UserError, match="no questions yet"):
        open_book(look.out)
    assert sorted(path.name for path in look.out.iterdir()) == listing, "nothing is created"
    skipped = Looked(*torch.zeros(3, 120), *torch.ones(2, 120, dtype=torch.bool), [], asked=120, skipped=120, looks=1)
    with pytest.raises(UserError, match="all 120 pairs were skipped; there are no others to ask about"):
        check_verdicts(skipped, look.out, asks_more=False)

    look(12)
    with pytest.raises(UserError, match="none of the 12 pairs has a verdict yet: `rlhf label"):
        look(12)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "r1-0123456789abcdef", "label": "first", "annotator": "x"}) + "\n")
    with pytest.raises(UserError, match="none of its 1 verdicts is on one of the 12 pairs asked about"):
        import_from(look.out, other)
    assert not (look.out / "quarantine-other.jsonl").exists()
    book = LabelBook(look.out / BOOK)
    book.record([Verdict("r1-0123456789abcdef", "first", "x")])
    with pytest.raises(UserError, match="its 1 verdicts are on other pairs"):
        look(12)
    sentences = (
        ("skip", "all 12 pairs were skipped; .* a larger --budget"),
        ("tie", "all 12 verdicts are ties, .* a larger --budget"),
        ("first", "one key"),
    )
    for label, sentence in sentences:
        (look.out / BOOK).unlink()
        look(12)
        answer_all(look.out, lambda i, q, label=label: label)
        with pytest.raises(UserError, match=sentence):
            look(12)
        assert not (look.out / RELABELLED).exists()
        if label != "first":
            facts = look(15)
            assert (facts["asked"], facts["open"]) == (15, 3), "the way out that the sentence names"
            assert (look.out / RELABELLED).exists() == (label == "tie"), "a skip says nothing"
            (look.out / RELABELLED).unlink(missing_ok=True)


def test_what_verdicts_are_expected_to_add() -> None:
    """By hand, with a perfect expert: on pairs that are open, and with labels on pairs whose order is sure to the vote."""
    noise = NoiseEstimate(flip_rate=0.25, fitted=0.25, scale=1.0, low=0.2, high=0.3)
    right, none = torch.full((4,), 0.75), torch.zeros(4)
    gain = expected_gain(none, noise, right, [0, 2, 3], expert_error=0.0)
    assert gain["pairs"] == 3
    assert gain["worth"] == pytest.approx(3 * (1 - (2 * 0.75 - 1) ** 2))
    assert gain["labels"] == pytest.approx(gain["worth"] / (1 - 2 * 0.25) ** 2)
    order = 0.9  # a label on such a pair: P(it says so) = q
    q = 0.75 * order + 0.25 * (1 - order)
    information = (0.5 * order * (1 - order)) ** 2 / (q * (1 - q))
    sure = torch.full((4,), float(np.log(order / (1 - order))))
    gain = expected_gain(sure, noise, right, [0], expert_error=0.0)
    assert gain["labels"] == pytest.approx(0.75 * 0.25 / information, rel=1e-4)
    coins = NoiseEstimate(flip_rate=0.4, fitted=0.5, scale=1.0, low=0.0, high=0.5)
    assert expected_gain(none, coins, right, [0], expert_error=0.0)["labels"] is None, "such labels say nothing"


def test_noise_is_estimated_with_verdicts_on_pairs_that_were_chosen_for_doubt() -> None:
    """30 % of 4,000 labels are wrong; the 400 with the lowest votes are looked at, most of them wrong: no bias follows.

    The reference is the likelihood written with joint probabilities in numpy, on the estimate's own grid.
    """
    rng = np.random.default_rng(0)
    n, rate, scale = 4000, 0.3, 1.0
    true_order = rng.normal(0, 2, n)  # the vote's log-odds that the first answer is better
    first_is_better = rng.random(n) < 1 / (1 + np.exp(-scale * true_order))
    is_wrong = rng.random(n) < rate
    d = np.where(first_is_better != is_wrong, true_order, -true_order)
    seen = np.argsort(d)[:400]
    agrees = np.zeros(n)
    agrees[seen] = np.where(is_wrong[seen] != (rng.random(400) < ERROR), -1, 1)
    odds = agrees * np.log((1 - ERROR) / ERROR)
    with_verdicts = estimate_noise(torch.tensor(d), list(range(n)), torch.tensor(odds))
    alone = estimate_noise(torch.tensor(d), list(range(n)))
    assert np.mean(is_wrong[seen]) > 0.6, "what was looked at is not a sample"
    assert with_verdicts.fitted == pytest.approx(rate, abs=0.03)
    assert with_verdicts.low >= alone.low, "verdicts prove more"
    assert alone == estimate_noise(torch.tensor(d), list(range(n)), torch.zeros(n))

    def log_likelihood(e: float, b: float) -> float:
        right, wrong = (1 - e) / (1 + np.exp(-b * d)), e / (1 + np.exp(b * d))
        if_right, if_wrong = np.where(agrees > 0, 1 - ERROR, ERROR), np.where(agrees > 0, ERROR, 1 - ERROR)
        # With probability h label and vote say nothing of a pair that is looked at, and a verdict is a coin.
        unknown = np.linspace(0, 1, 2000, endpoint=False)[:, None]
        seen_of = ((1 - unknown) * (right * if_right + wrong * if_wrong) + unknown / 2 * (right + wrong))[:, seen]
        joint = np.log(seen_of).sum(axis=1) + 9 * np.log1p(-unknown[:, 0])
        return float(np.log(right + wrong)[agrees == 0].sum() + np.logaddexp.reduce(joint))

    best = log_likelihood(with_verdicts.fitted, with_verdicts.scale)
    for step in (-0.005, 0.005):
        assert log_likelihood(with_verdicts.fitted + step, with_verdicts.scale) <= best + 1e-6
    for factor in (0.85, 1.18):
        assert log_likelihood(with_verdicts.fitted, with_verdicts.scale * factor) <= best + 1e-6


def test_unproved_noise_is_taken_as_the_fit_has_it() -> None:
    """Few blunt votes prove no wrong label; what they leave likely counts, with the scale that belongs to it."""
    rng = np.random.default_rng(3)
    true_order = rng.normal(0, 1.0, 150)
    first_is_better = rng.random(150) < 1 / (1 + np.exp(-true_order))
    d = torch.tensor(np.where(first_is_better != (rng.random(150) < 0.15), true_order, -true_order))
    noise = estimate_noise(d, list(range(150)))
    assert noise.low == 0.0
    right = beliefs(d, noise, torch.zeros(150))
    rate = max(noise.fitted, 0.01)
    np.testing.assert_allclose(right.numpy(), 1 / (1 + rate / (1 - rate) * np.exp(-noise.scale * d.numpy())), rtol=1e-6)
    assert rate < noise.flip_rate - 0.1, "confident learning takes errors of blunt votes for those of labels"


def test_a_budget_is_of_pairs_and_not_of_labels(look: LookInCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty labels of thirty pairs: a budget of 50 asked about 30, without a word."""
    monkeypatch.setattr("rlhf.pipeline.audit.pair_digest", lambda row: row["prompt"][0]["content"][-1])
    with pytest.raises(
        UserError, match=r"--budget 12: .* holds 120 labels of \d+ pairs .*; name a number from 1 to \d+\."
    ):
        look(12)
