"""Any reward model that is opened: the right last token whatever pads, one score a text, and a sentence where there is none."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.score import padding_of
from rlhf.pipeline.evaluate import evaluate_models
from rlhf.pipeline.model_commands import export_model
from rlhf.reward.load import CARD, load_reward_model, open_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.score_jsonl import score_lines
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

ANSWERS = ["yes", "no " * 9, "yes please, two and three"]
PADS = ("same", "end", "other", "none")

pytestmark = pytest.mark.filterwarnings("ignore:.*not checked against stored")


def foreign(base: Path, tokenizer: Any, folder: Path) -> PreTrainedModel:
    """A classifier that lies on the disk without a card."""
    torch.manual_seed(0)
    network = build_reward_model(base, pad_token_id=tokenizer.pad_token_id).eval()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network


@pytest.mark.fault("padding is the end")
@pytest.mark.parametrize("in_tokenizer", ["same", "end", "none"])
@pytest.mark.parametrize("in_config", PADS)
def test_the_last_token_is_found_whatever_pads(
    base_folder: Path, tokenizer: Any, tmp_path: Path, in_config: str, in_tokenizer: str
) -> None:
    own = copy.deepcopy(tokenizer)
    if in_tokenizer != "same":
        own.pad_token = own.eos_token if in_tokenizer == "end" else None
    network = foreign(base_folder, tokenizer, tmp_path)
    own.save_pretrained(tmp_path)
    pad = {"same": own.pad_token_id, "end": own.eos_token_id, "other": own.convert_tokens_to_ids("e"), "none": None}
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "pad_token_id": pad[in_config]}), encoding="utf-8")
    expected = []
    for answer in ANSWERS:
        conversation = [*PROMPTS[0], {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected.append(network.score(network.model(ids).last_hidden_state[0, -1]).item())
    reward = open_reward_model(str(tmp_path))
    together = reward.score([PROMPTS[0]] * 3, ANSWERS)
    alone = torch.cat([reward.score([PROMPTS[0]], [answer]) for answer in ANSWERS])
    torch.testing.assert_close(together, torch.tensor(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(alone, torch.tensor(expected), atol=1e-4, rtol=0)
    assert reward.model.config.pad_token_id == pad[in_config], "the configuration is put back"
    assert reward.checks.entries["score alone = in a batch"]["held"]
    assert reward.checks.entries["score as its template renders"]["held"]


def test_a_padding_id_is_one_that_no_text_ends_in(base_folder: Path, tokenizer: Any) -> None:
    network = build_reward_model(base_folder, pad_token_id=7)
    with padding_of(network, 7, [[1, 2], [7, 0]]) as pad:
        assert (pad, network.config.pad_token_id) == (7, 7)
    with padding_of(network, 7, [[1, 7], [3, 0], [3, 1]]) as pad:
        assert pad not in (7, 0, 1)
        assert network.config.pad_token_id == pad
    assert network.config.pad_token_id == 7


@pytest.mark.fault("weights no numbers")
def test_scores_that_are_no_numbers(base_folder: Path, tokenizer: Any, tmp_path: Path, reward_folder: Path) -> None:
    network = foreign(base_folder, tokenizer, tmp_path / "all")
    torch.nn.init.constant_(network.score.weight, float("nan"))
    network.save_pretrained(tmp_path / "all")
    with pytest.raises(UserError, match="not finite numbers"):
        open_reward_model(str(tmp_path / "all"))
    # One text only: each line its error, every other its score.
    reward = load_reward_model(reward_folder)
    with torch.no_grad():
        reward.model.model.embed_tokens.weight[reward.tokenizer("!", add_special_tokens=False)["input_ids"]] = float(
            "nan"
        )
    lines = [json.dumps({"prompt": "one", "response": text}) for text in ("yes", "no!", "two")]
    rows = list(score_lines(reward, lines))
    assert [set(row) for row in rows] == [{"prompt", "response", "score"}, {"error"}, {"prompt", "response", "score"}]
    assert "not a finite number" in rows[1]["error"]
    json.dumps(rows, allow_nan=False)


@pytest.mark.fault("weights no numbers")
def test_evaluate_and_export_refuse_them(
    base_folder: Path, tokenizer: Any, tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": "one", "chosen": "yes!", "rejected": "no"}
    data.write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "two"}) + "\n", encoding="utf-8")

    def broken(_: str) -> RewardModel:
        reward = load_reward_model(reward_folder)
        reward.model.score.weight.data.fill_(float("nan"))
        return reward

    monkeypatch.setattr("rlhf.pipeline.evaluate.open_reward_model", broken)
    with pytest.raises(UserError, match="2 of 2 pairs of pairs are not finite"):
        evaluate_models(["x"], [str(data)], tmp_path / "out.json", say=print)
    assert not (tmp_path / "out.json").exists()
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(base_folder)
    policy.lm_head.weight.data[3] = float("inf")
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="not finite numbers"):
        export_model(tmp_path / "policy", tmp_path / "exported")


@pytest.mark.fault("rows too long")
def test_answers_longer_than_the_positions_are_counted(tmp_path: Path, reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    assert (reward.cut, reward.cut_answers) == (0, 0), "what was scored to check it does not count"
    long = " ".join(WORDS) * 20
    reward.score([PROMPTS[0]] * 3, [long, "yes", "no " + long])
    assert (reward.cut, reward.cut_answers) == (2, 2)
    said: list[str] = []
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"one {i}", "chosen": f"yes {long}", "rejected": f"no {long}"} for i in range(3)]
    rows.append({"prompt": "two", "chosen": "yes", "rejected": "no"})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluate_models([str(reward_folder)], [str(data)], tmp_path / "out.json", say=said.append)
    assert any("3 of 4 pairs have two answers that are the same" in sentence for sentence in said)
    assert any("answers alone are longer than that" in sentence for sentence in said)


def test_a_model_whose_scores_depend_on_the_batch_is_refused(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(base_folder, tokenizer, tmp_path)
    # The padding is not found: as before it was mended.
    from contextlib import nullcontext

    monkeypatch.setattr("rlhf.models.score.padding_of", lambda model, pad, rows: nullcontext(tokenizer.eos_token_id))
    with pytest.raises(UserError, match="score alone = in a batch"):
        open_reward_model(str(tmp_path))


def test_a_model_that_is_read_elsewhere_is_refused(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    foreign(base_folder, own, tmp_path)
    encode = RewardModel.encode
    monkeypatch.setattr(RewardModel, "encode", lambda self, *texts: [row[:-1] for row in encode(self, *texts)])
    with pytest.raises(UserError, match="score as its template renders"):
        open_reward_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_false_alarm(base_folder: Path, tokenizer: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    largest = 0.0
    for seed in range(10):
        torch.manual_seed(seed)
        network = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id).eval().to(dtype)
        torch.nn.init.normal_(network.score.weight, std=1.0)
        network.save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
        entries = open_reward_model(str(tmp_path / str(seed))).checks.entries
        assert all(entry["held"] for entry in entries.values())
        largest = max(largest, *(entry["statistic"] / entry["bound"] for entry in entries.values()))
    assert largest < 0.5, f"{largest:.2f} of the bound"


def test_a_broken_card(reward_folder: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="JSON"):
        load_reward_model(tmp_path)
    (tmp_path / CARD).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no chat_template_sha256, mean, probe, std"):
        load_reward_model(tmp_path)


def test_a_plain_load_gives_the_same(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    network = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    rows = reward.encode(PROMPTS[:3], ANSWERS, None)
    with torch.no_grad():
        expected = torch.cat([network(input_ids=torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(reward.score(PROMPTS[:3], ANSWERS), expected, atol=1e-5, rtol=0)
