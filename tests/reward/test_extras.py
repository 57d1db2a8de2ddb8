"""Trainers with a term beside the loss (text, length, bottleneck): their step against plain autograd, and what they save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from rlhf import BottleneckRewardTrainer, LengthRewardTrainer, PairRewardTrainer, TextRewardTrainer
from rlhf.errors import UserError
from rlhf.models.heads import label_layer, language_head
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.pipeline.model_commands import export_model
from rlhf.pipeline.trainers import StageBottleneckRewardTrainer
from rlhf.reward.bottleneck import CODE_LABELS, CODE_SIZE
from rlhf.reward.cloud import latent_cloud, save_cloud
from rlhf.reward.length import HEADS
from rlhf.reward.load import load_reward_model, save_reward_model
from rlhf.reward.model import RewardModel
from tests import conftest
from tests.unit_scale import build_reward_model

WORDS, PROMPTS = conftest.WORDS, list[Any](conftest.PROMPTS)
LABELS: dict[Any, Any] = {LengthRewardTrainer: HEADS, BottleneckRewardTrainer: CODE_LABELS}


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Pairs whose answers have different lengths."""

    def answer(i: int, length: int) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": " ".join(WORDS[(i + j) % 15] for j in range(length))}]

    return [
        {"prompt": PROMPTS[i % 36], "chosen": answer(i, 1 + 5 * i % 7), "rejected": answer(2 * i + 3, 1 + 3 * i % 5)}
        for i in range(count)
    ]


def arguments(**changes: Any) -> RewardConfig:
    settings: dict[str, Any] = {
        "output_dir": "nowhere", "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "num_train_epochs": 1,
        "logging_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return RewardConfig(**{**settings, **changes})


def make(trainer: Any, base: Any, tokenizer: Any, data: Any, more: Any = None, **settings: Any) -> Any:
    """A trainer on a model with the head that it wants."""
    torch.manual_seed(0)
    labels = next(({"labels": LABELS[kind]} for kind in trainer.__mro__ if kind in LABELS), {})
    model = build_reward_model(base, model_settings(settings), pad_token_id=tokenizer.pad_token_id, **labels)
    arguments_of: dict[str, Any] = {
        "train_dataset": Dataset.from_list(data),
        "processing_class": tokenizer,
        **(more or {}),
    }
    args = arguments_of.pop("args", arguments())
    if trainer is TextRewardTrainer and "language_head" not in arguments_of:
        arguments_of["language_head"] = language_head(base, model_settings(settings))
    return trainer(model, args, **arguments_of)


def read(tokenizer: Any, row: Any, side: str) -> tuple[torch.Tensor, int]:
    """The ids of a whole conversation, and where the answer begins."""
    whole = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    ids, start = (tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in (whole, asked))
    return ids, start.shape[1]


SHAPES = pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 3), (1, 8)])
SHARE = pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])


@SHAPES
@SHARE
def test_the_text_term_is_that_of_the_language_model(
    base_folder: Any, tokenizer: Any, batch: int, accumulation: int, share: bool
) -> None:
    """SGD's step against autograd of both losses written here, with the whole causal model of transformers; a ragged batch too."""
    data = rows()
    args = arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = make(
        TextRewardTrainer, base_folder, tokenizer, data, {"args": args, "share_prompts": share, "extra_weight": 0.3}
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    head = before["score.weight"]

    causal: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    causal.lm_head.requires_grad_(False)
    causal.lm_head.weight = torch.nn.Parameter(causal.lm_head.weight.detach().clone(), requires_grad=False)
    losses = []
    for row in data:
        scores = []
        for side in ("chosen", "rejected"):
            ids, start = read(tokenizer, row, side)
            output = causal(input_ids=ids, output_hidden_states=True)
            scores.append((output.hidden_states[-1][0, -1] @ head.T).squeeze())
            if side == "chosen":
                logprobs = output.logits[0].log_softmax(dim=-1)[:-1].gather(1, ids[0, 1:, None])[start - 1 :]
                text = softplus(-0.1 * logprobs.sum())
        losses.append(0.7 * softplus(scores[1] - scores[0]) + 0.3 * text)
    expected = torch.stack(losses).mean()
    expected.backward()

    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        step = (before[name] - trainer.model.get_parameter(name).detach()) / 0.1
        torch.testing.assert_close(step, causal.get_parameter(name).grad, atol=2e-4, rtol=1e-2)


def test_the_text_term_finds_an_answer_behind_others(base_folder: Any, tokenizer: Any) -> None:
    """Pairs of one ranking share a row, in which a chosen answer may lie behind another one: the loss is that of plain rows."""
    data = []
    for i, (best, middle, worst) in enumerate(
        [("yes", "apple pear plum", "no"), ("red blue", "cat dog", "two three no")]
    ):
        turns = [[{"role": "assistant", "content": text}] for text in (best, middle, worst)]
        sides = (turns[:2], turns[1:])
        data += [{"prompt": PROMPTS[i], "chosen": a, "rejected": b, "group": i} for a, b in sides]
    losses = {}
    for share in (True, False):
        made = make(TextRewardTrainer, base_folder, tokenizer, data, {"share_prompts": share, "extra_weight": 0.99})
        batch = next(iter(made.get_train_dataloader()))
        assert ("segments" in batch) == share
        made.model.train()
        losses[share] = made.compute_loss(made.model, dict(batch), num_items_in_batch=torch.tensor(4)).item()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@SHAPES
@SHARE
def test_the_length_terms_are_those_of_the_whole_step(
    base_folder: Any, tokenizer: Any, batch: int, accumulation: int, share: bool
) -> None:
    """SGD's step of both heads against autograd of ODIN's loss over all eight pairs at once, however they are cut."""
    data = rows()
    args = arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = make(
        LengthRewardTrainer, base_folder, tokenizer, data, {"args": args, "share_prompts": share, "extra_weight": 0.5}
    )
    heads = trainer.model.score.weight.detach().clone().requires_grad_()
    features, tokens = [], []
    for row in data:
        for side in ("chosen", "rejected"):
            ids, start = read(tokenizer, row, side)
            with torch.no_grad():
                features.append(trainer.model.model(input_ids=ids).last_hidden_state[0, -1])
            tokens.append(float(ids.shape[1] - start))
    assert len(set(tokens)) > 4
    both, n = torch.stack(features) @ heads.T, torch.tensor(tokens)
    total = both.sum(dim=1)
    in_quality, in_length = (torch.corrcoef(torch.stack([both[:, i], n]))[0, 1] for i in (0, 1))
    between = torch.cosine_similarity(heads[0], heads[1], dim=0).abs()
    expected = softplus(total[1::2] - total[0::2]).mean() + 0.5 * (in_quality.abs() - in_length + between)
    expected.backward()

    trainer.train()
    log = trainer.state.log_history[0]
    assert trainer.state.global_step == 1
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert log["length_in_quality"] == pytest.approx(in_quality.item(), abs=1e-4)
    assert heads.grad is not None
    step = (heads.detach() - trainer.model.score.weight.detach()) / 0.1
    torch.testing.assert_close(step, heads.grad, atol=1e-4, rtol=1e-3)


def test_the_bottleneck_is_read_with_noise_and_pays_for_its_code(base_folder: Any, tokenizer: Any) -> None:
    """SGD's step of the head against autograd written here, under the same noise."""
    data = rows()
    trainer = make(
        BottleneckRewardTrainer, base_folder, tokenizer, data, {"share_prompts": False, "extra_weight": 0.02},
    )  # fmt: skip
    with torch.no_grad():
        trainer.model.score.weight[CODE_SIZE:] = 0.01 * torch.randn(CODE_SIZE, 64)
    head, decoder = (p.detach().clone().requires_grad_() for p in (trainer.model.score.weight, trainer.decoder))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        features = torch.stack(
            [
                trainer.model.model(input_ids=ids[None, mask.bool()]).last_hidden_state[0, -1]
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        )
    mean, log_variance = (features @ head.T).chunk(2, dim=1)
    torch.manual_seed(5)
    scores = (mean + log_variance.exp().sqrt() * torch.randn(16, CODE_SIZE)) @ decoder
    nats = (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
    expected = (softplus(scores[8:] - scores[:8]) + 0.02 * (nats[:8] + nats[8:])).mean()
    expected.backward()

    trainer.model.train()
    torch.manual_seed(5)
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(8))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert head.grad is not None
    torch.testing.assert_close(trainer.model.score.weight.grad, head.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(trainer.decoder.grad, decoder.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("trainer", [TextRewardTrainer, LengthRewardTrainer, BottleneckRewardTrainer])
@pytest.mark.parametrize("kind", ["full", "lora", "encoder"])
def test_what_is_saved_is_an_ordinary_reward_model(
    base_folder: Any, encoder_folder: Any, tokenizer: Any, tmp_path: Path, trainer: Any, kind: str
) -> None:
    """One label in plain transformers and PEFT: quality alone of the two heads, the code's mean, and nothing of the text's."""
    if kind == "encoder" and trainer is TextRewardTrainer:
        pytest.skip("an encoder writes no text")
    settings = {"use_peft": True, "lora_r": 4} if kind == "lora" else {}
    folder = encoder_folder if kind == "encoder" else base_folder
    tokenizer = load_tokenizer(folder, conversational=True)
    held_out = {"eval_dataset": Dataset.from_list(rows(13)), "args": arguments(learning_rate=1e-2, optim="adamw_torch")}
    made = make(trainer, folder, tokenizer, rows(16), held_out, **settings)
    made.train()
    metrics = made.evaluate()
    ids = tokenizer.apply_chat_template(
        [*PROMPTS[0], {"role": "assistant", "content": "yes"}], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        said = made.model.eval()(input_ids=ids["input_ids"]).logits[0]
    expected = said[0] if trainer is not BottleneckRewardTrainer else said[:CODE_SIZE] @ made.decoder.detach()
    if trainer in LABELS:
        layer = label_layer(made.model, len(LABELS[trainer]))
        assert layer.weight.requires_grad, "of an adapter's head, the copy that is trained"
    made.merge_head()
    again = made.evaluate()
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5), "the scores are the same"
    assert again["eval_accuracy"] == metrics["eval_accuracy"]
    save_reward_model(tmp_path / "rm", made.model, tokenizer, samples=[(p, "yes") for p in PROMPTS[:9]])
    if kind == "lora":
        from peft import AutoPeftModelForSequenceClassification

        plain: Any = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.config.num_labels == 1
    plain.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "rm").pad_token_id
    with torch.no_grad():
        assert plain.eval()(input_ids=ids["input_ids"]).logits.item() == pytest.approx(expected.item(), abs=1e-5)
    score = load_reward_model(tmp_path / "rm").score([PROMPTS[0]], ["yes"]).item()
    assert score == pytest.approx(expected.item(), abs=1e-5)
    assert not list((tmp_path / "rm").glob("decoder*")), "what lies beside the model belongs to its training"


@pytest.mark.parametrize(
    "trainer", [TextRewardTrainer, LengthRewardTrainer, BottleneckRewardTrainer, StageBottleneckRewardTrainer]
)
def test_a_resumed_run_ends_bit_for_bit(base_folder: Any, tokenizer: Any, tmp_path: Path, trainer: Any) -> None:
    """The decoder and its optimizer state come back too, and the noise goes on where it was."""
    args = arguments(
        output_dir=str(tmp_path), save_strategy="steps", save_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
        gradient_accumulation_steps=2, optim="adamw_torch",
    )  # fmt: skip
    through, resumed = (make(trainer, base_folder, tokenizer, rows(16), {"args": args}) for _ in range(2))
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, resumed.model.get_parameter(name)) for name, p in through.model.named_parameters())
    if issubclass(trainer, BottleneckRewardTrainer):
        assert torch.equal(through.decoder, resumed.decoder)


def test_the_code_is_kept_and_its_cloud_read_again(base_folder: Any, tokenizer: Any, tmp_path: Path) -> None:
    """What is kept is the head's rows of μ: the score is linear in the code, up to nothing, and answers far away are outside."""
    made = make(BottleneckRewardTrainer, base_folder, tokenizer, rows(16))
    made.train()
    made.merge_head()
    texts = [" ".join(WORDS[(i + j) % 15] for j in range(1 + i % 6)) for i in range(60)]
    samples = [(PROMPTS[i % 36], text) for i, text in enumerate(texts)]
    reward = save_reward_model(tmp_path / "rm", made.model, tokenizer, samples=samples)
    assert load_reward_model(tmp_path / "rm").cloud is None
    features = reward.features(*zip(*samples, strict=True))
    torch.testing.assert_close(
        features @ made.code.T @ made.decoder.detach(), reward.score(*zip(*samples, strict=True))
    )
    save_cloud(tmp_path / "rm", latent_cloud(made.code, features))
    again = load_reward_model(tmp_path / "rm").cloud
    assert again is not None
    assert again.is_outside(features).double().mean() < 0.15
    assert again.is_outside(features + 50.0).all()
    assert torch.equal(again.is_outside(features), latent_cloud(made.code, features).is_outside(features))
    export_model(tmp_path / "rm", tmp_path / "exported")
    files = [file.name for file in (tmp_path / "exported").glob("*.safetensors")]
    assert files == ["model.safetensors"], "servers read every such file of a folder as weights"


CENTRED = {PairRewardTrainer: 1.0, TextRewardTrainer: 0.7, LengthRewardTrainer: 1.0, BottleneckRewardTrainer: 1.0}


@pytest.mark.parametrize("trainer", CENTRED)
def test_rewards_are_centred_beside_every_term(base_folder: Any, tokenizer: Any, trainer: Any) -> None:
    """Loss(c) - Loss(0) = c · mean (r_c + r_r)² over the rewards that the pair loss reads; of GRM its share of the pair loss."""
    by_coefficient, rewards = {}, []
    for coefficient in (None, 0.5):
        more = {"args": arguments(center_rewards_coefficient=coefficient), "share_prompts": False}
        made = make(
            trainer,
            base_folder,
            tokenizer,
            rows(),
            more | ({"extra_weight": 0.3} if trainer is TextRewardTrainer else {}),
        )
        batch = next(iter(made.get_train_dataloader()))
        made.model.train()
        pair_loss = made.loss_function

        def watched(chosen: Any, rejected: Any, pair_loss: Any = pair_loss) -> Any:
            rewards.append(chosen + rejected)
            return pair_loss(chosen, rejected)

        made.loss_function = watched
        torch.manual_seed(7)
        by_coefficient[coefficient] = made.compute_loss(
            made.model, dict(batch), num_items_in_batch=torch.tensor(8)
        ).item()
    expected = 0.5 * CENTRED[trainer] * (rewards[-1] ** 2).mean().item()
    assert by_coefficient[0.5] - by_coefficient[None] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_planted_length_leaves_the_quality_head(base_folder: Any, tokenizer: Any) -> None:
    """Labels follow a word (4 of 5) and length (4 of 5): Bradley-Terry learns both, ODIN's quality head the word alone."""
    generator = torch.Generator().manual_seed(0)

    def answer(word: str, length: int) -> str:
        return " ".join([word, *(WORDS[int(k)] for k in torch.randint(2, 8, (length,), generator=generator))])

    def pair(i: int) -> dict[str, Any]:
        good, longer = (torch.rand(2, generator=generator) < 0.8).tolist()
        lengths = sorted(torch.randint(1, 9, (2,), generator=generator).tolist(), reverse=longer)
        texts = [answer(word, n) for word, n in zip(("yes", "no") if good else ("no", "yes"), lengths, strict=True)]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
        return {"prompt": PROMPTS[i % 36], "chosen": chosen, "rejected": rejected}

    data = [pair(i) for i in range(256)]
    lengths = [1 + i % 8 for i in range(64)]
    new = [answer("yes" if i % 16 < 8 else "no", n) for i, n in enumerate(lengths)]
    has_word = torch.tensor([float(i % 16 < 8) for i in range(64)])
    found = {}
    for trainer in (PairRewardTrainer, LengthRewardTrainer):
        args = arguments(learning_rate=3e-3, optim="adamw_torch", num_train_epochs=3, per_device_train_batch_size=32)
        made = make(trainer, base_folder, tokenizer, data, {"args": args})
        made.train()
        made.merge_head()
        scores = RewardModel(made.model, tokenizer, conversational=True).score([PROMPTS[0]] * 64, new)
        found[trainer] = [
            torch.corrcoef(torch.stack([scores, x]))[0, 1].item() for x in (torch.tensor(lengths).float(), has_word)
        ]
    of_length, of_word = found[LengthRewardTrainer]
    assert abs(of_length) < found[PairRewardTrainer][0] / 2
    assert of_word > found[PairRewardTrainer][1]


def test_what_can_not_be_trained_is_refused(base_folder: Any, encoder_folder: Any, tokenizer: Any) -> None:
    one_label = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
    data = {"train_dataset": Dataset.from_list(rows()), "processing_class": tokenizer}
    with pytest.raises(UserError, match="the head has 1 labels where 2 are trained"):
        LengthRewardTrainer(one_label, arguments(), **data)
    with pytest.raises(UserError, match="an encoder writes no text"):
        make(
            TextRewardTrainer,
            encoder_folder,
            load_tokenizer(encoder_folder, conversational=True),
            rows(),
            {"language_head": None},
        )
    bare = [{"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}]
    with pytest.raises(UserError, match="don't say where an answer begins"):
        make(TextRewardTrainer, base_folder, tokenizer, bare)
