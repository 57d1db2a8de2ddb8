"""Commands on a finished model: evaluate it on pairs, export it."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from rlhf.data.canonical import pair
from rlhf.data.read import BadRow, ReadReport, read_rows
from rlhf.errors import UserError
from rlhf.models.load import find_source, load_policy, load_tokenizer, model_settings
from rlhf.models.save import save_model
from rlhf.pipeline.stages import judge_pairs
from rlhf.pipeline.store import write_text
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.lines import score_lines
from rlhf.reward.model import CARD, load_reward_model


def score_stream(model: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Score JSON lines with a reward model's folder."""
    quiet_libraries()
    yield from score_lines(load_reward_model(model), lines)


def evaluate_reward_model(
    model: Path, data: Sequence[str], out: Path, *, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Judge a reward model on every data set and write `{"data": {name: report}}`.

    Raises:
        UserError: a data set without a usable pair; two of the same name.
    """
    quiet_libraries()
    reward = load_reward_model(model)
    reports: dict[str, dict[str, Any]] = {}
    for source in data:
        name = Path(source).name.split(".")[0]
        if name in reports:
            raise UserError(f"evaluate: two data sets are called {name!r}; rename a file.")
        read = ReadReport(source)
        rows = []
        for number, row in read_rows(source, read, split="test"):
            try:
                rows.append(pair(row))
                read.kept += 1
            except BadRow as reason:
                read.drop(number, str(reason))
        for sentence in read.sentences():
            say(sentence)
        if not rows:
            raise UserError(f"{source}: holds no usable pair.")
        reports[name], _ = judge_pairs(reward, rows, None)
    write_text(out, json.dumps({"model": str(model), "data": reports}, indent=1) + "\n")
    return reports


def export_model(model: Path, out: Path) -> None:
    """Write a policy or reward model as one standard checkpoint; a reward model is checked on its probe afterwards.

    Raises:
        UserError: the target is not empty; the model was trained on 4-bit weights, which can't be merged exactly.
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
    reward = load_reward_model(model, device="cpu")
    network: Any = reward.model
    network = network.merge_and_unload() if isinstance(network, PeftModel) else network
    network.config.problem_type = "regression"
    save_model(network, reward.tokenizer, out)
    shutil.copy(model / CARD, out / CARD)
    assert find_source(out).adapter is None, "a merged model has no adapter"
    load_reward_model(out)
