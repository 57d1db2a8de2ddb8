"""Commands on a finished model: score lines with it, evaluate it, export it."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from rlhf.data.rows import SIDES, Compare, Pair, answer, asked, told
from rlhf.data.sources import read_pairs, read_rankings
from rlhf.errors import UserError
from rlhf.evaluation.pairs import ScoredPairs, compare, pair_report, ranking_report, score_pairs
from rlhf.files import write_text
from rlhf.models.load import find_source, load_policy, load_tokenizer, model_settings
from rlhf.models.save import save_model
from rlhf.pipeline.training import quiet_libraries
from rlhf.report.evaluation import write_evaluation
from rlhf.reward.experts import EXPERTS
from rlhf.reward.load import CARD, load_reward_model, open_reward_model, reward_card, template_digest
from rlhf.reward.model import RewardModel
from rlhf.reward.score_jsonl import score_lines


def score_stream(model: str, lines: Iterable[str | None]) -> Iterator[dict[str, Any]]:
    """Score JSON lines with a reward model; None is a line that was too long to be read."""
    quiet_libraries()
    yield from score_lines(open_reward_model(model), lines)


def evaluate_reward_model(
    model: str,
    data: Sequence[str],
    out: Path,
    *,
    against: str | None,
    say: Callable[[str], None],
    compare_as: Compare = "answers",
) -> dict[str, Any]:
    """Evaluate a reward model on every data set; write `{"model", "data": {name: report}}`, and a page beside it.

    Args:
        data: files or hub datasets of pairs, rankings or trees.
        against: another reward model, compared on the same pairs.
        compare_as: whether pairs that part before their last turn are left out, or compared as whole conversations.

    Raises:
        UserError: a data set without a usable pair; two of the same name.
    """
    quiet_libraries()
    names = [Path(source).name.split(".")[0] for source in data]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate: two data sets have the same name ({', '.join(names)}); rename a file.")
    sources = [read_pairs(source, compare=compare_as) for source in data]
    reward = open_reward_model(model)
    other = None if against is None else open_reward_model(against)
    reports: dict[str, dict[str, Any]] = {}
    shown: dict[str, list[dict[str, Any]]] = {}
    for name, source, (rows, counts) in zip(names, data, sources, strict=True):
        for sentence in counts.sentences():
            say(sentence)
        scored = _finite(score_pairs(reward, rows, label=name), model, name)
        alike = _alike_after_cut(reward, rows)
        if alike:
            say(
                f"{name}: {alike} of {len(rows)} pairs have two answers that are the same in the last {reward.max_length} tokens, "
                f"which are all that {model} reads; they count as ties."
            )
        reports[name] = pair_report(scored)
        rankings = read_rankings(source)
        if rankings:
            reports[name]["rankings"] = ranking_report(reward, rankings, label=f"{name}: rankings")
        if other is not None:
            by_other = _finite(score_pairs(other, rows, label=f"{name}: {against}"), str(against), name)
            reports[name]["against"] = {"accuracy": float(by_other.right.mean()), **compare(scored, by_other)}
        reports[name]["read"] = counts.as_dict()
        shown[name] = scored.samples()
    for scorer, which in ((reward, model), (other, against)):
        for sentence in scorer.cuts(str(which)) if scorer is not None else []:
            say(sentence)
    result = {"model": model, "against": against, "data": reports}
    write_text(out, json.dumps(result, indent=1) + "\n")
    write_evaluation(out.with_suffix(".html"), result, shown)
    return result


def _finite(scored: ScoredPairs, model: str, name: str) -> ScoredPairs:
    """Return scored pairs as they are.

    Raises:
        UserError: a score is not a finite number.
    """
    bad = int((~np.isfinite(scored.scores_chosen) | ~np.isfinite(scored.scores_rejected)).sum())
    if bad:
        raise UserError(
            f"{model}: the scores of {bad} of {len(scored.rows)} pairs of {name} are not finite numbers; its weights or its dtype "
            "can't hold them."
        )
    return scored


def _alike_after_cut(reward: RewardModel, rows: Sequence[Pair]) -> int:
    """Count the pairs whose two answers differ, but not in what a model reads of them."""
    cut = (reward.cut, reward.cut_answers)
    if not reward.cut_answers:
        return 0
    sides = [reward.encode([asked(r, side) for r in rows], [answer(r, side) for r in rows], None) for side in SIDES]
    reward.cut, reward.cut_answers = cut
    return sum(
        chosen == rejected and told(row, "chosen") != told(row, "rejected")
        for row, chosen, rejected in zip(rows, *sides, strict=True)
    )


def export_model(model: Path, out: Path) -> None:
    """Write a policy or reward model as one standard checkpoint; a reward model is checked on its probe afterwards.

    Raises:
        UserError: the target is not empty; the model was trained on 4-bit weights, which can't be merged exactly; it is
            several experts; weights are missing or not finite.
    """
    quiet_libraries()
    model = model.expanduser()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose a new folder.")
    if not (model / CARD).is_file():
        merged = load_policy(model, model_settings({}))
        bad = [parameter for parameter, values in merged.named_parameters() if not values.isfinite().all()]
        if bad:
            raise UserError(
                f"{model}: {len(bad)} tensors hold values that are not finite numbers, the first is {bad[0]}."
            )
        save_model(merged, load_tokenizer(model, conversational=True), out)
        return
    card = reward_card(model)
    if card.get("load_in_4bit"):
        raise UserError(
            f"{model}: trained on 4-bit weights; merging rounds them again and changes the scores. Serve base and adapter."
        )
    if (model / EXPERTS).is_file():
        raise UserError(
            f"{model}: several experts and how they are combined are no single checkpoint; train with reward.experts: merged, or "
            "export one of expert-0, expert-1, …."
        )
    reward = load_reward_model(model, device="cpu")
    network: Any = reward.model
    network = network.merge_and_unload() if isinstance(network, PeftModel) else network
    network.config.problem_type = "regression"
    save_model(network, reward.tokenizer, out)
    card["chat_template_sha256"] = template_digest(reward.tokenizer)
    write_text(out / CARD, json.dumps(card, indent=1, ensure_ascii=False))
    assert find_source(out).adapter is None, "a merged model has no adapter"
    load_reward_model(out)
