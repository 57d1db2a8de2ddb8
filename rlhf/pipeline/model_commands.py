"""Commands on a finished model: score lines with it, export it."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel

from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.models.load import find_source, load_policy, load_tokenizer, model_settings
from rlhf.models.merge import merge_adapter
from rlhf.models.save import save_model
from rlhf.models.text import check_vocabulary
from rlhf.pipeline.training import quiet_libraries
from rlhf.report.result_file import check_new_folder, whole_or_nothing
from rlhf.reward.certify import CERTIFICATE, certify, write_certificate
from rlhf.reward.digests import scoring_digests
from rlhf.reward.experts import EXPERTS
from rlhf.reward.gated import is_gated
from rlhf.reward.load import CARD, load_reward_model, open_reward_model, reward_card, template_digest
from rlhf.reward.score_jsonl import score_lines


def score_stream(model: str, lines: Iterable[str | None], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Score JSON lines with a reward model; None is a line that was too long to be read. Say at the end what was cut."""
    quiet_libraries()
    reward = open_reward_model(model)
    yield from score_lines(reward, lines)
    for sentence in reward.cuts(model):
        say(sentence)


def export_model(model: Path, out: Path) -> None:
    """Write a policy or reward model as one standard checkpoint; a reward model is checked on its probe afterwards.

    Raises:
        UserError: the target is not empty; the model was trained on 4-bit weights, which can't be merged exactly; it is
            several experts, or attributes under a gate; weights are missing or not finite; what was written can't be read. Then
            nothing is left.
    """
    quiet_libraries()
    model = model.expanduser()
    check_new_folder(out, "OUT")
    if not (model / CARD).is_file():
        merged = load_policy(model, model_settings({}))
        tokenizer = load_tokenizer(model, conversational=True)
        check_vocabulary(tokenizer, merged.config, name=str(model))
        with whole_or_nothing(out):
            save_model(merged, tokenizer, out)
            load_tokenizer(out, conversational=True)
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
    if is_gated(model):
        raise UserError(
            f"{model}: a gate that reads the prompt weighs its attributes, and no checkpoint of one label does that; use it here, "
            "over `rlhf serve`, or train with reward.objective: regression. To other programs its attributes are its labels."
        )
    reward = load_reward_model(model, device="cpu")
    network: Any = reward.model
    network = merge_adapter(network) if isinstance(network, PeftModel) else network
    network.config.problem_type = "regression"
    if card.get("critiques") is not None:
        warnings.warn(
            f"{out}: this model writes a critique before it gives its score. A server that reads a score in one forward (vLLM, "
            "text-embeddings-inference) gives other numbers; take `rlhf serve`, and ask any server by `rlhf verify`.",
            stacklevel=2,
        )
    with whole_or_nothing(out):
        save_model(network, reward.tokenizer, out)
        card["chat_template_sha256"], card["files"] = template_digest(reward.tokenizer), scoring_digests(out)
        write_text(out / CARD, json.dumps(card, indent=1, ensure_ascii=False))
        assert find_source(out).adapter is None, "a merged model has no adapter"
        write_certificate(out / CERTIFICATE, certify(load_reward_model(out)))
