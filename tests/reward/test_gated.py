"""Attributes under a gate: what is saved scores as plain torch does from the files, and what goes wrong is noticed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import GatedRewardTrainer, load_reward_model
from rlhf.errors import UserError
from rlhf.objectives.gated import gated_score
from rlhf.reward.gate import Gate
from rlhf.reward.gated import GatedRewards, prompt_features
from rlhf.reward.load import calibrate_reward_model
from tests.conftest import WORDS
from tests.reward.test_attributes import arguments, build

WEIGHTS = {"helpfulness": 1.0, "verbosity": -0.5, "humour": 0.25}
Rows = list[dict[str, Any]]


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows() -> tuple[Rows, Rows]:
    """Rated answers of which helpfulness rises with length, and pairs whose longer answer is the better one half of the time."""
    rated, pairs = [], []
    for i in range(48):
        prompt = turn("user", f"{('list', 'name')[i % 2]} {WORDS[i % 7]} {WORDS[i % 5]}")
        texts = [" ".join(WORDS[(i * k + j) % 13] for j in range(1 + (i + 3 * k) % 7)) for k in (1, 2)]
        for k, text in enumerate(texts):
            ratings = {"helpfulness": float(min(4, len(text.split()) - 1)), "humour": float((i + k) % 5)}
            ratings |= {"verbosity": float(i % 4)} if i % 3 else {}
            rated.append({"prompt": prompt, "completion": turn("assistant", text), "attributes": ratings})
        if texts[0] != texts[1]:
            chosen, rejected = sorted(texts, key=len, reverse=i % 2 == 0)
            pairs.append(
                {"prompt": prompt, "chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}
            )
    return rated, pairs


def trained(base: Path, tokenizer: Any, folder: Path, **settings: Any) -> tuple[Any, Any]:
    rated, pairs = rows()
    trainer = GatedRewardTrainer(
        build(base, tokenizer, **settings), arguments(learning_rate=1e-2, optim="adamw_torch"), weights=WEIGHTS, pairs=pairs,
        train_dataset=Dataset.from_list(rated), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.merge_head()
    trainer.save_model(str(folder))
    samples = [(row["prompt"], row["completion"][0]["content"]) for row in rated[:16]]
    return trainer, calibrate_reward_model(folder, samples=samples)


@pytest.fixture(scope="module")
def saved(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("gated") / "rm"
    return *trained(base_folder, tokenizer, folder), folder


def plain_scores(folder: Path, prompts: list[Any], texts: list[str]) -> list[float]:
    """The score of each answer by transformers and torch alone, from the files: Σ_a softmax(W z + b)_a (head · state + c)_a."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gate = load_file(folder / "gate.safetensors")
    facts = json.loads((folder / "gated.json").read_text())
    scores = []
    for prompt, text in zip(prompts, texts, strict=True):
        whole = tokenizer.apply_chat_template([*prompt, *turn("assistant", text)], tokenize=False)
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
            attributes = model(input_ids=ids).logits[0] + torch.tensor(facts["offsets"])
            ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
            state = model.model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        z = (state - gate["mean"]) / gate["scale"]
        logits = gate["weight"] @ z + gate["bias"]
        weights = logits.exp() / logits.exp().sum()
        if math.sqrt((z**2).mean()) > gate["radius"]:
            weights = torch.tensor(facts["mean_weights"])
        scores.append((weights * attributes).sum().item())
    return scores


def answers(count: int = 12) -> tuple[list[Any], list[str]]:
    rated, _ = rows()
    return [row["prompt"] for row in rated[:count]], [row["completion"][0]["content"] for row in rated[:count]]


def test_the_saved_model_scores_as_its_files_say(saved: tuple[Any, Any, Path]) -> None:
    _, reward, folder = saved
    prompts, texts = answers()
    expected = plain_scores(folder, prompts, texts)
    assert len({round(score, 4) for score in expected}) > 6, "answers differ"
    assert reward.score(prompts, texts).tolist() == pytest.approx(expected, abs=1e-4)
    again = load_reward_model(folder)
    assert isinstance(again, GatedRewards)
    assert again.score(prompts, texts).tolist() == pytest.approx(expected, abs=1e-4)
    assert again.model.config.id2label == dict(enumerate(WEIGHTS)), "other programs see attributes, and no score"


def test_with_lora_too(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer, reward = trained(base_folder, tokenizer, tmp_path / "rm", use_peft=True, lora_r=3)
    prompts, texts = answers(4)
    live = GatedRewards(trainer.model.eval(), tokenizer, trainer.fitted.attributes, conversational=True)
    assert live.score(prompts, texts).tolist() == pytest.approx(reward.score(prompts, texts).tolist(), abs=1e-5)


def test_weights_sum_to_one_and_see_the_prompt_alone(saved: tuple[Any, Any, Path]) -> None:
    _, reward, _ = saved
    prompts, _ = answers()
    weights = reward.weights_of(prompts)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(prompts)))
    assert (weights >= 0).all()
    assert weights.std(dim=0).max() > 1e-3, "prompts differ"
    # Between two answers to a prompt nothing counts but the attributes, at weights that are the same for both.
    first, second = reward.score_each(prompts, ["yes"] * 12), reward.score_each(prompts, ["no dog cat"] * 12)
    gap = reward.score(prompts, ["yes"] * 12) - reward.score(prompts, ["no dog cat"] * 12)
    torch.testing.assert_close(gap, ((first - second) * weights).sum(dim=1), atol=1e-5, rtol=1e-4)


def followed_length(reward: Any) -> list[float]:
    """Rank correlation of every attribute, as the model scores with it, with the answers' tokens."""
    rated, _ = rows()
    texts = [row["completion"][0]["content"] for row in rated]
    tokens = [len(ids) for ids in reward.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    each = reward.score_each([row["prompt"] for row in rated], texts)
    return [abs(spearmanr(column, tokens).statistic) for column in each.T.tolist()]


def test_no_attribute_that_is_scored_with_follows_length(saved: tuple[Any, Any, Path]) -> None:
    """The public code computes the debiased rewards and trains on the others; here what is scored with is measured."""
    trainer, reward, _ = saved
    assert abs(trainer.fitted.length_before["helpfulness"]) > 0.5, "longer answers were rated better"
    assert max(followed_length(reward)) < 0.03
    assert all(abs(value) < 0.03 for value in trainer.fitted.length_after.values())


def test_a_length_that_is_found_and_not_taken_off_is_noticed(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.reward.gated.length_multiple", lambda *_: 0.0)
    _, reward = trained(base_folder, tokenizer, tmp_path / "rm")
    assert max(followed_length(reward)) > 0.5


def test_a_gate_that_reads_the_answer_is_noticed(saved: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, reward, folder = saved
    prompts, texts = answers()

    def of_answers(self: Any, prompts: Any, responses: Any, *, ended: Any = None) -> Any:
        whole = [[*prompt, *turn("assistant", text)] for prompt, text in zip(prompts, responses, strict=True)]
        return gated_score(self.score_each(prompts, responses, ended=ended), self.weights_of(whole))

    monkeypatch.setattr(GatedRewards, "score", of_answers)
    assert reward.score(prompts, texts).tolist() != pytest.approx(plain_scores(folder, prompts, texts), abs=1e-3)


def test_a_prompt_unlike_all_has_the_mean_weights_and_is_said_once(saved: tuple[Any, Any, Path]) -> None:
    _, _, folder = saved
    reward = load_reward_model(folder)
    assert isinstance(reward, GatedRewards)
    strange = [turn("user", "§ ± ¿ ß " * 12)] * 2
    assert prompt_features(reward, strange).shape == (2, 64)
    with pytest.warns(UserWarning, match="2 of the first 2 prompts are unlike any .* the mean weights"):
        weights = reward.weights_of(strange)
    assert weights[0].tolist() == reward.attributes.usual.tolist()
    reward.weights_of(strange)
    assert (reward.unfamiliar, reward.weighed) == (4, 4)
    assert reward.cuts("G")[-1].startswith("G: 4 of 4 prompts are unlike any that its gate was fitted on;")


def test_the_critic_starts_from_the_score_at_the_mean_weights(saved: tuple[Any, Any, Path]) -> None:
    _, reward, _ = saved
    network = reward.copy_of_network()
    assert network.config.num_labels == 1
    assert reward.model.config.num_labels == len(WEIGHTS), "the model itself stays as it is"
    ids = torch.tensor(reward.encode(*[[x] for x in (turn("user", "list red dog"), "yes no")], None))
    with torch.no_grad():
        expected = reward.model(input_ids=ids).logits @ reward.attributes.usual
        torch.testing.assert_close(network(input_ids=ids).logits[0], expected, atol=1e-5, rtol=1e-5)


def test_faults_lower_the_score(saved: tuple[Any, Any, Path]) -> None:
    """The head's row of an attribute with a negative weight predicts its ratings with the sign changed."""
    trainer, reward, _ = saved
    rated, _ = rows()
    known = [row for row in rated if "verbosity" in row["attributes"]]
    each = reward.score_each([row["prompt"] for row in known], [row["completion"][0]["content"] for row in known])
    columns = dict(zip(trainer.fitted.attributes.names, each.T, strict=True))
    said = [row["attributes"]["verbosity"] for row in known]
    assert spearmanr(columns["verbosity"], said).statistic < -0.2


def test_what_a_gate_can_not_be_made_of_is_refused(base_folder: Path, encoder_folder: Path, tokenizer: Any) -> None:
    rated, pairs = rows()
    data = Dataset.from_list(rated)

    def refused(sentence: str, base: Path = base_folder, **changes: Any) -> None:
        settings = {"weights": WEIGHTS, "pairs": pairs, "train_dataset": data, "processing_class": tokenizer}
        with pytest.raises(UserError, match=sentence):
            GatedRewardTrainer(build(base, tokenizer), arguments(), **(settings | changes))

    refused("a gate is fitted to pairs, and there are none", pairs=[])
    refused("humour has weight 0", weights={**WEIGHTS, "humour": 0.0})
    refused("a gate reads the states of a decoder", base=encoder_folder)
    nobody = [{**row, "attributes": {"helpfulness": 1.0, "verbosity": 2.0}} for row in rated]
    refused("nobody rated humour", train_dataset=Dataset.from_list(nobody))


def test_a_gate_over_unlike_prompts_is_planted_and_found() -> None:
    """Two kinds of prompts, for each of which another attribute decides: the gate gives each its own."""
    from rlhf.reward.gate import fit_gate

    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 2, (1500,), generator=generator)
    features = torch.randn(1500, 4, generator=generator)
    features[:, 0] += 3.0 * kind
    differences = torch.randn(1500, 3, generator=generator)
    decides = differences[torch.arange(1500), kind]
    differences *= torch.where(torch.rand(1500, generator=generator) < decides.mul(4).sigmoid(), 1.0, -1.0)[:, None]
    gate, sharpness = fit_gate(features, differences)
    weights, _ = gate(features)
    assert isinstance(gate, Gate)
    assert sharpness == pytest.approx(4.0, rel=0.35), "nats per unit, as they were planted"
    assert weights[torch.arange(1500), kind].mean() > 0.7, "equal weights are 1/3"
    assert weights[:, 2].mean() < 0.1, "the third decides nothing"
