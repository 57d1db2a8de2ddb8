"""Commands on a finished model: score lines with it, evaluate it, export it."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from rlhf.data.sources import read_pairs, read_rankings
from rlhf.errors import UserError
from rlhf.evaluation.pairs import compare, pair_report, ranking_report, score_pairs
from rlhf.files import write_text
from rlhf.models.load import find_source, load_policy, load_tokenizer, model_settings
from rlhf.models.save import save_model
from rlhf.pipeline.training import quiet_libraries
from rlhf.report.evaluation import write_evaluation
from rlhf.reward.experts import EXPERTS
from rlhf.reward.load import CARD, load_reward_model, open_reward_model
from rlhf.reward.score_jsonl import score_lines


def score_stream(model: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Score JSON lines with a reward model."""
    quiet_libraries()
    yield from score_lines(open_reward_model(model), lines)


def evaluate_reward_model(
    model: str, data: Sequence[str], out: Path, *, against: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate a reward model on every data set; write `{"model", "data": {name: report}}`, and a page beside it.

    Args:
        data: files or hub datasets of pairs, rankings or trees.
        against: another reward model, compared on the same pairs.

    Raises:
        UserError: a data set without a usable pair; two of the same name.
    """
    quiet_libraries()
    names = [Path(source).name.split(".")[0] for source in data]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate: two data sets have the same name ({', '.join(names)}); rename a file.")
    sources = [read_pairs(source) for source in data]
    reward = open_reward_model(model)
    other = None if against is None else open_reward_model(against)
    reports: dict[str, dict[str, Any]] = {}
    shown: dict[str, list[dict[str, Any]]] = {}
    for name, source, (rows, counts) in zip(names, data, sources, strict=True):
        for sentence in counts.sentences():
            say(sentence)
        scored = score_pairs(reward, rows, label=name)
        reports[name] = pair_report(scored)
        rankings = read_rankings(source)
        if rankings:
            reports[name]["rankings"] = ranking_report(reward, rankings, label=f"{name}: rankings")
        if other is not None:
            by_other = score_pairs(other, rows, label=f"{name}: {against}")
            reports[name]["against"] = {"accuracy": float(by_other.right.mean()), **compare(scored, by_other)}
        reports[name]["read"] = counts.as_dict()
        shown[name] = scored.samples()
    for scorer, which in ((reward, model), (other, against)):
        if scorer is not None and scorer.cut:
            say(
                f"{which}: {scorer.cut} texts are longer than {scorer.max_length} tokens and lost the beginning of their prompt."
            )
    result = {"model": model, "against": against, "data": reports}
    write_text(out, json.dumps(result, indent=1) + "\n")
    write_evaluation(out.with_suffix(".html"), result, shown)
    return result


def export_model(model: Path, out: Path) -> None:
    """Write a policy or reward model as one standard checkpoint; a reward model is checked on its probe afterwards.

    Raises:
        UserError: the target is not empty; the model was trained on 4-bit weights, which can't be merged exactly; it is
            several experts.
    """
    quiet_libraries()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose a new folder.")
    if not (model / CARD).is_file():
        merged = load_policy(model, model_settings({}))
        save_model(merged, load_tokenizer(model, conversational=True), out)
        return
    card = json.loads((model / CARD).read_text(encoding="utf-8"))
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
    shutil.copy(model / CARD, out / CARD)
    assert find_source(out).adapter is None, "a merged model has no adapter"
    load_reward_model(out)
