"""A reward model that writes critiques: its step against plain autograd, its scores against plain transformers, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf import CritiqueRewardTrainer, PairRewardTrainer, load_reward_model, save_reward_model
from rlhf.data.rows import CRITIQUES
from rlhf.errors import UserError
from rlhf.models.critiques import REQUEST, drop_output_layer, writer_on
from rlhf.models.heads import language_head
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.pipeline.certificates import verify_target
from rlhf.pipeline.combine import combine_models
from rlhf.pipeline.model_commands import export_model
from rlhf.ppo.rewards import RewardSource
from rlhf.ppo.setup import _copy_of_reward_model
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.load import CARD
from rlhf.reward.model import RewardModel
from tests import conftest
from tests.reward.test_extras import SHAPES, SHARE, arguments, rows
from tests.unit_scale import build_reward_model

PROMPTS, WORDS = list[Any](conftest.PROMPTS), conftest.WORDS
TOKENS = 6
FORM: Any = {"request": REQUEST, "tokens": TOKENS, "samples": 1}


def critiqued(count: int = 8) -> list[dict[str, Any]]:
    """Pairs whose critiques have different lengths."""
    texts = [
        [" ".join(WORDS[(i + 2 * j + k) % 15] for j in range(1 + (i + 3 * k) % 4)) for k in (0, 1)]
        for i in range(count)
    ]
    return [
        {**row, "critique_chosen": a, "critique_rejected": b} for row, (a, b) in zip(rows(count), texts, strict=True)
    ]


def make(base: Any, data: Any, more: Any = None, cls: Any = CritiqueRewardTrainer, **settings: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base, conversational=True)
    model = build_reward_model(base, model_settings(settings), pad_token_id=tokenizer.pad_token_id)
    named: dict[str, Any] = {"train_dataset": Dataset.from_list(data), "processing_class": tokenizer, **(more or {})}
    if cls is CritiqueRewardTrainer:
        named["language_head"] = language_head(base, model_settings({}))
    return cls(model, named.pop("args", arguments()), **named)


def turns(row: Any, side: str) -> list[Any]:
    """The conversation that a stranger would write before a critique."""
    return [*row["prompt"], *row[side], {"role": "user", "content": REQUEST}]


@SHAPES
@SHARE
def test_a_step_is_that_of_both_losses_in_plain_torch(
    base_folder: Any, tokenizer: Any, batch: int, accumulation: int, share: bool
) -> None:
    """SGD's step against autograd of both losses written here, with the whole causal model of transformers; a ragged batch too."""
    data = critiqued()
    args = arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = make(base_folder, data, {"args": args, "share_prompts": share, "extra_weight": 0.4})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    head = before["score.weight"].clone().requires_grad_()

    causal: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    output_layer = causal.lm_head.weight.detach().clone().requires_grad_()
    losses = []
    for row in data:
        scores, written = [], []
        for side in ("chosen", "rejected"):
            asked = tokenizer.apply_chat_template(turns(row, side), tokenize=False, add_generation_prompt=True)
            whole = asked + row[f"critique_{side}"] + tokenizer.eos_token
            start, ids = (tokenizer(x, add_special_tokens=False, return_tensors="pt").input_ids for x in (asked, whole))
            states = causal.model(input_ids=ids).last_hidden_state[0]
            scores.append((states[-1] @ head.T).squeeze())
            logprobs = (states @ output_layer.T).log_softmax(dim=-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            written.append(-logprobs[start.shape[1] - 1 :].mean())
        losses.append(softplus(scores[1] - scores[0]) + 0.4 * (written[0] + written[1]) / 2)
    expected = torch.stack(losses).mean()
    expected.backward()

    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    trained = {"score.weight": head.grad, "lm_head.weight": output_layer.grad}
    trained |= {name: causal.get_parameter(name).grad for name in before if name.startswith("model.")}
    for name in (
        "score.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ):
        step = (before[name] - trainer.model.get_parameter(name).detach()) / 0.1
        assert trained[name].abs().max() > 1e-3
        torch.testing.assert_close(step, trained[name], atol=2e-4, rtol=1e-2)


def test_without_its_loss_the_critique_is_context_and_nothing_else(base_folder: Any) -> None:
    """λ = 0: the step of Bradley-Terry on the same conversations, whose last turn is the critique; the writer does not move."""
    data = critiqued()
    as_turns = [
        {
            "prompt": row["prompt"],
            **{
                side: [
                    *row[side],
                    {"role": "user", "content": REQUEST},
                    {"role": "assistant", "content": row[f"critique_{side}"]},
                ]
                for side in ("chosen", "rejected")
            },
        }
        for row in data
    ]
    ours, plain = make(base_folder, data, {"extra_weight": 0.0}), make(base_folder, as_turns, cls=PairRewardTrainer)
    before = ours.model.lm_head.weight.detach().clone()
    for trainer in (ours, plain):
        trainer.train()
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)
    assert torch.equal(ours.model.lm_head.weight, before)


def test_only_a_critique_that_came_to_its_end_has_an_end_token(tokenizer: Any) -> None:
    batch = {name: [row[name] for row in critiqued(2)] for name in ("prompt", "chosen", "rejected", *CRITIQUES)}
    made = {}
    for ended in (True, False):
        flags = {f"{name}_ended": [ended, True] for name in CRITIQUES}
        made[ended] = CritiqueRewardTrainer.tokenize({**batch, **flags}, tokenizer)
    assert made[True] == CritiqueRewardTrainer.tokenize(batch, tokenizer), (
        "critiques are whole unless something else is said"
    )
    for side in ("chosen", "rejected"):
        whole, cut = (made[ended][f"{side}_ids"] for ended in (True, False))
        assert whole[0] == [*cut[0], tokenizer.eos_token_id]
        assert whole[1] == cut[1]
        assert made[False][f"{side}_tokens"] == [made[True][f"{side}_tokens"][0] - 1, made[True][f"{side}_tokens"][1]]


@pytest.fixture(scope="module")
def trained(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved reward models that have learnt to say "yes" of one answer and "no" of the other: whole, and an adapter."""
    data = [
        {**row, "critique_chosen": "yes", "critique_rejected": "no please"}
        for row in rows(32)
    ]  # fmt: skip
    folders = {}
    for kind, settings in (("full", {}), ("lora", {"use_peft": True, "lora_r": 4})):
        args = arguments(
            learning_rate=2e-2 if settings else 1e-2, optim="adamw_torch", num_train_epochs=1 + bool(settings)
        )
        made = make(base_folder, data, {"args": args}, **settings)
        made.train()
        samples = [(prompt, f"{word} cat") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
        folders[kind] = tmp_path_factory.mktemp(kind)
        save_reward_model(folders[kind], made.model, made.processing_class, samples=samples, facts={"critiques": FORM})
    return folders


KINDS = pytest.mark.parametrize("kind", ["full", "lora"])


def plain_score(folder: Path, messages: list[Any]) -> tuple[float, list[int]]:
    """What somebody without this package gets: a greedy critique by the causal model, then the head at its last token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        writer: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
        network: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        network = PeftModel.from_pretrained(network, str(folder)).eval()
    else:
        writer = AutoModelForCausalLM.from_pretrained(folder).eval()
        network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    with torch.no_grad():
        whole = writer.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        network.config.pad_token_id = tokenizer.pad_token_id
        return network(input_ids=whole).logits.item(), whole[0, ids.shape[1] :].tolist()


@KINDS
def test_a_stranger_gets_the_same_score(trained: dict[str, Path], kind: str) -> None:
    reward = load_reward_model(trained[kind])
    assert isinstance(reward, CritiqueRewardModel)
    for row in rows(5):
        (score,) = reward.score([row["prompt"]], [row["chosen"][0]["content"]]).tolist()
        expected, critique = plain_score(trained[kind], turns(row, "chosen"))
        written = reward.write(reward.encode([row["prompt"]], [row["chosen"][0]["content"]], None))
        assert written.rows == [critique]
        assert score == pytest.approx(expected, abs=1e-5)
    without = reward.score_at_end(reward.encode([row["prompt"]], [row["chosen"][0]["content"]], None))
    assert abs(score - without.item()) > 1e-3, "the critique changes the score"


@KINDS
def test_the_folder_is_verified_exported_and_told_from_a_server_without_critiques(
    trained: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    asked: dict[str, Any] = {
        "kind": None,
        "token": None,
        "model": None,
        "dtype": None,
        "timeout": 9.0,
        "say": lambda _: None,
    }
    with pytest.warns(UserWarning, match="writes a critique before it gives its score"):
        export_model(trained[kind], tmp_path / "exported")
    assert not (tmp_path / "exported" / "adapter_config.json").exists()
    for target in (trained[kind], tmp_path / "exported"):
        verdict = verify_target(str(target), against=str(trained[kind]), **asked)
        assert verdict["held"], verdict["faults"]
    card = json.loads((tmp_path / "exported" / CARD).read_text())
    assert card["critiques"] == FORM

    # A plain classifier of the same weights, as a server reads it in one forward.
    one_forward = tmp_path / "one_forward"
    network: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    certificate = json.loads((tmp_path / "exported" / "certificate.json").read_text())
    assert certificate["critiques"] == FORM
    network.save_pretrained(one_forward)
    AutoTokenizer.from_pretrained(tmp_path / "exported").save_pretrained(one_forward)
    reward = load_reward_model(tmp_path / "exported")
    from rlhf.reward.hypotheses import suppose_faults

    (supposed,) = suppose_faults(reward, certificate["golden"])
    alone = [
        network.eval()(
            input_ids=torch.tensor([text["ids"]]), attention_mask=torch.ones(1, len(text["ids"]))
        ).logits.item()
        for text in certificate["golden"]
    ]
    assert supposed.fault == "critique_missing"
    assert supposed.scores == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_text_has_one_score_whatever_is_beside_it(trained: dict[str, Path], samples: int) -> None:
    """Alone, in a batch, in another order, at another batch size; sampled critiques too."""
    reward: Any = load_reward_model(trained["full"])
    reward.form = {**FORM, "samples": samples}
    prompts, texts = [row["prompt"] for row in rows(12)], [row["chosen"][0]["content"] for row in rows(12)]
    together = reward.score(prompts, texts)
    alone = torch.cat([reward.score([p], [t]) for p, t in zip(prompts, texts, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    reward.batch_size = 5
    torch.testing.assert_close(reward.score(prompts[::-1], texts[::-1]).flip(0), together, atol=1e-5, rtol=0)


def test_several_critiques_are_different_samples_and_their_scores_a_mean(trained: dict[str, Path]) -> None:
    reward: Any = load_reward_model(trained["full"])
    encoded = reward.encode(
        [row["prompt"] for row in rows(20)], [row["chosen"][0]["content"] for row in rows(20)], None
    )
    each = [reward.write(encoded, sample=number).rows for number in range(2)]
    assert each[0] != each[1]
    assert each[0] == reward.write(encoded, sample=0).rows, "a sample is a function of its row and number"
    reward.form = {**FORM, "samples": 2}
    by_sample = [
        RewardModel.score_rows(reward, [[*row, *reward.request, *c] for row, c in zip(encoded, critiques, strict=True)])
        for critiques in each
    ]
    torch.testing.assert_close(reward.score_rows(encoded), (by_sample[0] + by_sample[1]) / 2)


def test_critiques_are_samples_of_the_whole_distribution(base_folder: Any) -> None:
    """First tokens of 4,000 critiques of one answer against softmax of the causal model: χ² over the 8 likeliest and the rest."""
    tokenizer: Any = load_tokenizer(base_folder, conversational=True)
    causal: Any = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    torch.manual_seed(0)
    model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id).eval()
    reward = CritiqueRewardModel(
        model, tokenizer, writer=writer_on(model, language_head(base_folder, model_settings({}))).eval(),
        form={**FORM, "tokens": 1}, conversational=True, batch_size=500,
    )  # fmt: skip
    encoded = reward.encode([PROMPTS[0]], ["yes"], None)
    with torch.no_grad():
        logits = causal(input_ids=torch.tensor([[*encoded[0], *reward.request]])).logits[0, -1]
    top, count = logits.softmax(dim=0).topk(8), 4000
    drawn = torch.tensor([reward.write(encoded, sample=number).rows[0][0] for number in range(count)])
    observed = torch.tensor([float((drawn == token).sum()) for token in top.indices])
    observed = torch.cat([observed, (count - observed.sum())[None]])
    expected = count * torch.cat([top.values, (1 - top.values.sum())[None]])
    chi_squared = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_squared < 26.1, "the 0.999 quantile with 8 degrees of freedom"


def test_a_critique_that_never_ends_is_cut_counted_and_said(trained: dict[str, Path]) -> None:
    reward: Any = load_reward_model(trained["full"])
    before = (reward.critiques, reward.endless)
    reward.writer.lm_head.weight.data[reward.tokenizer.eos_token_id] = 0  # logit 0, where others are above
    scores = reward.score([PROMPTS[0]] * 3, ["yes", "no", "red blue"])
    assert scores.isfinite().all()
    assert (reward.critiques - before[0], reward.endless - before[1]) == (3, 3)
    assert all(len(row) == TOKENS for row in reward.write(reward.encode([PROMPTS[0]], ["yes"], None)).rows)
    (sentence,) = reward.cuts("x")
    assert "critiques never came to their end and were cut after 6 tokens" in sentence


def test_an_answer_that_was_cut_off_is_read_as_one(trained: dict[str, Path]) -> None:
    """Its row has no end token before the request, so its critique and score are its own."""
    reward: Any = load_reward_model(trained["full"])
    (whole,), (cut,) = (reward.encode([PROMPTS[0]], ["red blue"], [ended]) for ended in (True, False))
    assert whole[: len(cut)] == cut
    assert len(cut) < len(whole)
    scores = [reward.score([PROMPTS[0]], ["red blue"], ended=[ended]).item() for ended in (True, False)]
    assert abs(scores[0] - scores[1]) > 1e-4


def test_a_long_prompt_leaves_room_for_the_critique(trained: dict[str, Path]) -> None:
    """128 positions: the beginning of the prompt goes, and request and critique fit behind the answer."""
    reward: Any = load_reward_model(trained["full"])
    assert reward.max_length == 128 - len(reward.request) - TOKENS
    (row,) = reward.encode(["red blue " * 100], ["yes"], None)
    assert len(row) == reward.max_length
    assert reward.cut == 1
    (read,) = reward.rows_read([row])
    assert reward.max_length + len(reward.request) < len(read) <= 128


def test_features_are_what_the_head_reads_behind_the_critique(trained: dict[str, Path]) -> None:
    reward: Any = load_reward_model(trained["full"])
    features = reward.features([PROMPTS[0], PROMPTS[1]], ["yes", "no cat"])
    scores = reward.score([PROMPTS[0], PROMPTS[1]], ["yes", "no cat"])
    torch.testing.assert_close(features @ reward.model.score.weight[0], scores, atol=1e-5, rtol=1e-5)


def test_a_critic_of_ppo_starts_from_it_without_the_output_layer(trained: dict[str, Path]) -> None:
    source = RewardSource(load_reward_model(trained["full"]))
    critic: Any = _copy_of_reward_model(source, load_tokenizer(trained["full"], conversational=True))
    assert not any("lm_head" in name for name, _ in critic.named_parameters())
    reward: Any = source.function
    assert "lm_head.weight" in dict(reward.model.named_parameters()), "the reward model keeps its own"
    drop_output_layer(critic)  # has none any more


def test_what_can_not_hold_is_refused(
    base_folder: Any, encoder_folder: Any, trained: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the rows of train_dataset have no critique_chosen and critique_rejected"):
        make(base_folder, rows())
    with pytest.raises(UserError, match="the rows of eval_dataset have no critique_chosen"):
        make(base_folder, critiqued(), {"eval_dataset": Dataset.from_list(rows())})
    encoder = build_reward_model(encoder_folder, pad_token_id=0)
    with pytest.raises(UserError, match="an encoder writes no text"):
        CritiqueRewardTrainer(encoder, arguments(), language_head=encoder)
    with pytest.raises(UserError, match="it writes critiques"):
        combine_models([trained["full"], trained["full"]], [0.5, 0.5], tmp_path / "mean", samples=_samples(tmp_path))
    several = tmp_path / "several"
    reward: Any = load_reward_model(trained["full"])
    save_reward_model(
        several, reward.model, reward.tokenizer, samples=[(p, "yes") for p in PROMPTS[:9]], facts={"critiques": {**FORM, "samples": 2}}
    )  # fmt: skip
    with pytest.raises(UserError, match="means over 2 sampled critiques, and other programs draw other samples"):
        verify_target(
            str(several),
            against=str(several),
            kind=None,
            token=None,
            model=None,
            dtype=None,
            timeout=9.0,
            say=lambda _: None,
        )


def _samples(folder: Path) -> Path:
    file = folder / "samples.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[0], "completion": "yes"}) + "\n", encoding="utf-8")
    return file
