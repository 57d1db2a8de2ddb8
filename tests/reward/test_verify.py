"""`rlhf verify` names planted serving faults, passes healthy servers, and refuses what is no reward server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.pipeline.certificates import verify_target
from tests.reward.planted import Served, listening


def check(target: str | Path, against: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": None, "token": None, "model": None, "dtype": None, "timeout": 20.0}
    return verify_target(str(target), against=str(against), say=lambda _: None, **{**settings, **changes})


def named(verdict: dict[str, Any]) -> dict[str, set[str]]:
    """The faults of each form."""
    forms = [form["form"] for form in verdict["forms"]]
    return {form: {fault["fault"] for fault in verdict["faults"] if fault["form"] == form} for form in forms}


INPUT, MESSAGES = "/classify with input", "/classify with messages"


def _sigmoid(served: Served) -> None:
    served.activation = torch.sigmoid


def _softmax(served: Served) -> None:
    served.activation = lambda scores: torch.softmax(scores[:, None], dim=1)[:, 0]


def _earlier_token(served: Served) -> None:
    served.ids = lambda ids: ids[:-1]


def _end_missing(served: Served) -> None:
    served.texts = lambda text: text.removesuffix(served.tokenizer.eos_token)
    render = served.conversation
    served.conversation = lambda messages: render(messages).removesuffix(served.tokenizer.eos_token)


def _end_doubled(served: Served) -> None:
    end = served.tokenizer.eos_token_id
    served.ids = lambda ids: [*ids, end] if ids[-1] == end else ids


def _end_always(served: Served) -> None:
    end = served.tokenizer.eos_token_id
    served.ids = lambda ids: ids if ids[-1] == end else [*ids, end]


def _template_twice(served: Served) -> None:
    render = served.conversation
    served.texts = lambda text: render([{"role": "user", "content": text}])
    served.conversation = lambda messages: served.texts(render(messages))


def _template_missing(served: Served) -> None:
    served.conversation = lambda messages: "\n".join(message["content"] for message in messages)


def _other_head(served: Served) -> None:
    torch.manual_seed(1)
    torch.nn.init.normal_(served.model.score.weight, std=0.1)


def _other_base(served: Served) -> None:
    torch.manual_seed(1)
    for parameter in served.model.model.layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def _padding(served: Served) -> None:
    served.batch = served.padded_left_without_mask


def _precision(served: Served) -> None:
    served.model.to(torch.bfloat16)


def _order(served: Served) -> None:
    served.order = lambda scores: scores[::-1]


def _cut(served: Served) -> None:
    served.ids = lambda ids: ids[:80]


PLANTED: dict[str, tuple[Callable[[Served], None], dict[str, set[str]]]] = {
    "sigmoid": (_sigmoid, {INPUT: {"sigmoid"}, MESSAGES: {"sigmoid"}}),
    "softmax": (_softmax, {INPUT: {"softmax"}, MESSAGES: {"softmax"}}),
    # Where no answer is cut off, a score that is read one token early is the score of the text without its end token.
    "earlier token": (_earlier_token, {INPUT: {"wrong_token"}, MESSAGES: {"end_token_missing"}}),
    "end missing": (_end_missing, {INPUT: {"end_token_missing"}, MESSAGES: {"end_token_missing"}}),
    "end doubled": (_end_doubled, {INPUT: {"end_token_doubled"}, MESSAGES: {"end_token_doubled"}}),
    "end always": (_end_always, {INPUT: {"end_token_added"}, MESSAGES: set()}),
    "template twice": (_template_twice, {INPUT: {"template_twice"}, MESSAGES: {"template_twice"}}),
    "template missing": (_template_missing, {INPUT: set(), MESSAGES: {"template_missing"}}),
    "other head": (_other_head, {INPUT: {"other_weights"}, MESSAGES: {"other_weights"}}),
    "other base": (_other_base, {INPUT: {"other_weights"}, MESSAGES: {"other_weights"}}),
    "padding": (_padding, {INPUT: {"padding"}, MESSAGES: set()}),
    "precision": (_precision, {INPUT: {"precision"}, MESSAGES: {"precision"}}),
    "order": (_order, {INPUT: {"order"}, MESSAGES: set()}),
    "cut": (_cut, {INPUT: {"some_texts"}, MESSAGES: {"some_texts"}}),
}


@pytest.fixture(scope="module")
def address(reward_folder: Path) -> Iterator[str]:
    apps = {"healthy": Served(reward_folder).app(), "openrlhf": Served(reward_folder).openrlhf()}
    for name, (plant, _) in PLANTED.items():
        served = Served(reward_folder)
        plant(served)
        apps[name.replace(" ", "-")] = served.app()
    with listening(apps) as url:
        yield url


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named_and_no_other(name: str, address: str, reward_folder: Path) -> None:
    verdict = check(f"{address}/{name.replace(' ', '-')}", reward_folder)
    print([fault["sentence"] for fault in verdict["faults"]])
    assert verdict["kind"] == "vllm-classify"
    assert named(verdict) == PLANTED[name][1]
    assert not verdict["held"]


@pytest.mark.parametrize("kind", ["vllm-classify", "vllm-pooling", "openrlhf"])
def test_healthy_servers_pass(kind: str, address: str, reward_folder: Path) -> None:
    url = f"{address}/{'openrlhf' if kind == 'openrlhf' else 'healthy'}"
    verdict = check(f"{url}/pooling" if kind == "vllm-pooling" else url, reward_folder)
    assert verdict["held"], verdict["faults"]
    assert verdict["kind"] == kind
    assert all(form["largest_alone"] < 1e-5 for form in verdict["forms"])
