"""One model from the weights of several: their mean (WARM), or a step beyond the better of two (ExPO)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.messages import ended_of
from rlhf.data.read import BadRow, ReadReport, read_rows
from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.models.load import load_policy, load_tokenizer, model_settings
from rlhf.models.merge import merge_adapter
from rlhf.models.save import BOOKKEEPING, save_model
from rlhf.pipeline.training import quiet_libraries
from rlhf.recipe.document import differences
from rlhf.report.result_file import check_new_folder, whole_or_nothing
from rlhf.reward.experts import EXPERTS
from rlhf.reward.gated import is_gated
from rlhf.reward.load import CARD, load_reward_model, reward_card, save_reward_model

# What a training writes into a configuration, and no weight is computed by.
NAMES = ("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type", "quantization_config")


class Opened(NamedTuple):
    """A model whose adapter, if it had one, is merged into its base, with its tokenizer."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def combine_models(folders: Sequence[Path], factors: Sequence[float], out: Path, *, samples: Path | None) -> None:
    """Write the model whose every weight is Σ factor · weight of some models, as one standard checkpoint.

    The mean of M models that share their start: factors 1/M (WARM, arXiv:2401.12187). Beyond the better of two, `a` times the
    way from the other: factors a and 1 - a (ExPO, arXiv:2404.16792).

    Args:
        folders: policies, or reward models, of one architecture and vocabulary; the first gives tokenizer and settings.
        factors: one for each folder, with sum 1.
        out: a new folder.
        samples: JSON lines with `prompt` and `completion` (a run's `round-0/sft/samples.jsonl`), which set the scale of a
            reward model's scores: it is no mean of the scales of the models that it is made of.

    Raises:
        UserError: the models don't fit together, the target is not empty, or a reward model comes without samples.
    """
    quiet_libraries()
    check_new_folder(out, "OUT")
    are_rewards = [(folder / CARD).is_file() for folder in folders]
    # Policies may lie on a hub; of this pipeline's reward models one is known by its folder.
    if any(are_rewards) and (missing := [folder for folder in folders if not folder.is_dir()]):
        raise UserError([f"{folder}: no such folder." for folder in missing])
    if len(set(are_rewards)) > 1:
        odd = folders[are_rewards.index(not are_rewards[0])]
        raise UserError(f"{odd}: {folders[0]} is {_kind(are_rewards[0])} and this is {_kind(not are_rewards[0])}.")
    is_reward = are_rewards[0]
    answers = _answers(samples) if is_reward else []

    # Each weight is summed in double precision, so that M copies of one model are that model again.
    opened = [_open_reward(folder) if is_reward else _open_policy(folder) for folder in folders]
    check_alike(opened)
    first = opened[0]
    states = [one.model.state_dict() for one in opened]
    first.model.load_state_dict({name: combined([state[name] for state in states], factors) for name in states[0]})
    if not is_reward:
        with whole_or_nothing(out):
            save_model(first.model, first.tokenizer, out)
        return
    first.model.config.problem_type = "regression"
    facts = {
        "objective": reward_card(folders[0]).get("objective"),
        "combined": [{"model": str(folder), "factor": factor} for folder, factor in zip(folders, factors, strict=True)],
    }
    with whole_or_nothing(out):
        save_reward_model(
            out,
            first.model,
            first.tokenizer,
            samples=[(prompt, text) for prompt, text, _ in answers],
            ended=[ended for _, _, ended in answers],
            facts=facts,
        )


def combined(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return Σ factor · tensor in the tensors' own type; of numbers that are not floating, the first's.

    >>> from torch import tensor
    >>> combined([tensor([1.0]), tensor([3.0])], [0.5, 0.5])
    tensor([2.])
    >>> combined([tensor([1.0]), tensor([3.0])], [1.5, -0.5])
    tensor([0.])
    """
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = sum(factor * tensor.double() for tensor, factor in zip(tensors, factors, strict=True))
    assert isinstance(total, Tensor), "there is a tensor at least"
    return total.to(tensors[0].dtype)


def check_alike(opened: Sequence[Opened]) -> None:
    """Refuse models whose weights or tokens are not the same things.

    Raises:
        UserError: the first that differs, and in what.
    """
    first, shapes = opened[0], _shapes(opened[0].model)
    for other in opened[1:]:
        others = _shapes(other.model)
        odd = sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        if odd:
            raise UserError(
                f"{other.folder}: its weights are not those of {first.folder}: {odd[0]} is {_written(others.get(odd[0]))} here and "
                f"{_written(shapes.get(odd[0]))} there; only models of one base can be combined."
            )
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise UserError(
                f"{other.folder}: its vocabulary is not that of {first.folder}, so a row of one is another token's in the other."
            )
        if changed := differences(_configuration(first.model), _configuration(other.model)):
            raise UserError(
                f"{other.folder}: is computed otherwise than {first.folder} ({changed[0]}); only models of one base can "
                "be combined."
            )
        templates = {tokenizer.chat_template for tokenizer in (first.tokenizer, other.tokenizer)} - {None}
        if len(templates) > 1:
            raise UserError(
                f"{other.folder}: its chat template is not that of {first.folder}, so one of both would read texts it was "
                "not trained on; combine models of one template."
            )


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    """Return what decides how a model computes."""
    return {name: value for name, value in model.config.to_dict().items() if name not in (*BOOKKEEPING, *NAMES)}


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _written(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "a number"


def _kind(is_reward: bool) -> str:
    return "a reward model" if is_reward else "a policy"


def _open_policy(folder: Path) -> Opened:
    model: Any = load_policy(folder, model_settings({}))
    return Opened(folder, model, load_tokenizer(folder, conversational=True))


def _open_reward(folder: Path) -> Opened:
    """Open a reward model, checked on its probe.

    Raises:
        UserError: it was trained on 4-bit weights, is several experts, has a gate, or writes critiques.
    """
    if reward_card(folder).get("critiques") is not None:
        raise UserError(
            f"{folder}: it writes critiques; whether a mean of such models still writes them is not known, so none is made."
        )
    if reward_card(folder).get("load_in_4bit"):
        raise UserError(f"{folder}: trained on 4-bit weights; merging rounds them again and changes the scores.")
    if (folder / EXPERTS).is_file():
        raise UserError(f"{folder}: several experts are no single model; train with reward.experts: merged.")
    if is_gated(folder):
        raise UserError(
            f"{folder}: weights of gates can't be added up; combine models of reward.objective: regression."
        )
    reward = load_reward_model(folder, device="cpu")
    network: Any = reward.model
    return Opened(folder, merge_adapter(network) if isinstance(network, PeftModel) else network, reward.tokenizer)


def _answers(samples: Path | None) -> list[tuple[Prompt, str, bool]]:
    """Read prompts, answers and whether these came to their end.

    Raises:
        UserError: there is no file, or a row without prompt or answer.
    """
    if samples is None:
        raise UserError(
            "export: the scores of a combined reward model have a scale of their own; give --samples, answers of the policy before "
            "PPO (RUN/round-0/sft/samples.jsonl)."
        )
    rows: list[tuple[Prompt, str, bool]] = []
    for number, row in read_rows(str(samples), ReadReport(str(samples))):
        prompt, text = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, list | str) or not isinstance(text, str):
            raise UserError(f"{samples}: row {number} has no `prompt` and `completion`; take the samples of a run.")
        try:
            rows.append((prompt, text, ended_of(row)))
        except BadRow as error:
            raise UserError(f"{samples}: row {number}: {error}.") from error
    if not rows:
        raise UserError(f"{samples}: no rows.")
    return rows
