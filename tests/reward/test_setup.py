"""What a reward trainer puts right or refuses before it trains: tokenizer, adapter, head, columns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from rlhf import MarginRewardTrainer, PairRewardTrainer, RankingRewardTrainer, TextRewardTrainer, load_reward_model
from rlhf.errors import UserError
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.models.scalar_head import score_exactly
from rlhf.objectives.rankings import is_best
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.experts import merge_experts
from rlhf.reward.load import save_reward_model
from rlhf.reward.trainer import training_columns
from tests.conftest import PROMPTS
from tests.unit_scale import build_reward_model


def trainer(model: Any, pairs: Dataset, arguments: dict[str, Any], cls: type = PairRewardTrainer, **extra: Any) -> Any:
    torch.manual_seed(0)
    args = RewardConfig(**{"per_device_train_batch_size": 8, "learning_rate": 1e-3, "num_train_epochs": 1, **arguments})
    return cls(model, args, train_dataset=pairs, **extra)


@pytest.fixture(scope="module")
def unpadded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as many lie on the hub: nobody says which token pads."""
    folder = tmp_path_factory.mktemp("unpadded") / "model"
    shutil.copytree(base_folder, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    return folder


@pytest.mark.fault("padding is the end")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pads", [None, "end"])
def test_the_token_that_is_trained_is_the_token_that_is_read(
    unpadded: Path, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path, share: bool, pads: str | None
) -> None:
    """TRL pads with the end token then, and transformers reads the score before it: 0.97 in training, 0.16 when loaded."""
    given = {}
    if pads == "end":
        given["processing_class"] = AutoTokenizer.from_pretrained(unpadded)
        given["processing_class"].pad_token = given["processing_class"].eos_token
    model = trainer(str(unpadded), pairs, cpu_arguments, share_prompts=share, **given)
    model.train()
    samples = [(row["prompt"], row["chosen"][0]["content"]) for row in pairs][:8]
    save_reward_model(tmp_path / "rm", model.model, model.processing_class, samples=samples)
    loaded = load_reward_model(tmp_path / "rm")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (
        loaded.score(prompts, [row[side][0]["content"] for row in pairs]) for side in ("chosen", "rejected")
    )
    assert (chosen > rejected).float().mean() > 0.95
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = [
        tokenizer.apply_chat_template(p + row["chosen"], return_dict=True)["input_ids"]
        for p, row in zip(prompts, pairs, strict=True)
    ]
    with torch.no_grad():
        scores = plain(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(scores, chosen, atol=1e-5, rtol=1e-5)
    assert plain.config.problem_type == "regression", "or vLLM lays a sigmoid on it"


def test_no_end_token_may_be_asked_for_as_padding(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="reward: pad_token is the end token"):
        trainer(str(base_folder), pairs, {**cpu_arguments, "pad_token": tokenizer.eos_token})


@pytest.mark.fault("adapter read back")
@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({}, "does not train the head, which was drawn at random; give LoraConfig task_type='SEQ_CLS'"),
        ({"task_type": "CAUSAL_LM"}, "the adapter's task_type is CAUSAL_LM"),
        ({"task_type": "SEQ_CLS"}, None),
        ({"modules_to_save": ["score"]}, None),
    ],
    ids=str,
)
def test_an_adapter_that_leaves_the_head_random_is_refused(
    base_folder: Path, pairs: Dataset, cpu_arguments: dict[str, Any], lora: dict[str, Any], said: str | None
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], **lora)
    if said is None:
        trainer(str(base_folder), pairs, cpu_arguments, peft_config=config)
        return
    with pytest.raises(UserError) as error:
        trainer(str(base_folder), pairs, cpu_arguments, peft_config=config)
    assert said in str(error.value)


@pytest.mark.fault("margin out of range")
@pytest.mark.parametrize(("column", "value"), [("confidence", 7.0), ("margin", None), ("weight", -1.0)])
def test_columns_of_held_out_rows_are_checked_too(
    base_folder: Path, pairs: Dataset, cpu_arguments: dict[str, Any], column: str, value: float | None
) -> None:
    """A confidence of 7 was an evaluation loss of 354; a margin that is missing ended the run at its first evaluation."""
    held_out = pairs.select(range(4)).add_column(column, [0.5, value, 0.5, 0.5])
    with pytest.raises(UserError, match=f"evaluation row 1, column '{column}'"):
        trainer(str(base_folder), pairs, cpu_arguments, eval_dataset={"other": held_out})


def test_a_clip_is_for_every_margin(base_folder: Path, pairs: Dataset, cpu_arguments: dict[str, Any]) -> None:
    """Margins of the file were not clipped beside those of ratings in it; a scale that scales nothing is refused."""
    row = pairs[0]
    rows: list[Any] = [{**row, "margin": 50.0}, {**row, "margin": -0.1}, {**row, "rating_gap": 50.0}]
    made = denoised(rows, DenoiseConfig("margin", margin_clip=2.0, margin_scale=0.1)).rows
    assert [pair["margin"] for pair in made] == [2.0, -0.1, 2.0]
    tie: Any = {**row, "rating_gap": 3.0, "confidence": 0.5}
    assert denoised([tie], DenoiseConfig("margin")).rows[0]["margin"] == 0.0, "people called them equal"
    assert training_columns([{**tie, "margin": 3.0}])[0]["margin"] == 0.0
    data = pairs.add_column("margin", [50.0] * len(pairs))
    clipped = trainer(str(base_folder), data, cpu_arguments, MarginRewardTrainer, margin_clip=2.0)
    assert set(clipped.train_dataset["margin"]) == {2.0}
    with pytest.raises(UserError, match=r"reward\.margin_scale is for ratings, and all 40 pairs bring a margin"):
        trainer(str(base_folder), data, cpu_arguments, MarginRewardTrainer, margin_scale=0.1)


@pytest.mark.parametrize("other", ["model.embed_tokens.weight", "model.embed_tokens.lora_embedding_A"])
def test_merged_adds_up_nothing_but_factors_and_linear_heads(tmp_path: Path, other: str) -> None:
    """An embedding table came out 0.375 times as large: it was taken for a head."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
        weights = {"base_model.model.score.weight": torch.ones(1, 2), f"base_model.model.{other}": torch.ones(2, 2)}
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"an expert also holds base_model.model.{other}"):
        merge_experts([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], [0.25, 0.125], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert load_file(tmp_path / "a/adapter_model.safetensors"), "and nothing of them is touched"


def test_numbers_that_would_teach_the_labels_turned_round_are_refused(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """A text share of 2 ended at accuracy 0.00, and so did a smoothing of 0.8 that was meant as a confidence."""
    model = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    with pytest.raises(UserError, match=r"extra_weight is 1\.0: of `text` it is a share"):
        trainer(model, pairs, cpu_arguments, TextRewardTrainer, extra_weight=1.0)
    with pytest.raises(UserError, match=r"reward\.smoothing is 0\.5"):
        DenoiseConfig("smoothing", smoothing=0.5)


def test_what_would_teach_nothing_is_refused(base_folder: Path, pairs: Dataset, cpu_arguments: dict[str, Any]) -> None:
    nothing = pairs.add_column("weight", [0.0] * len(pairs))
    with pytest.raises(UserError, match="column 'weight' is 0 in all 40 rows"):
        trainer(str(base_folder), nothing, cpu_arguments)
    some = pairs.add_column("weight", [0.0] * 3 + [1.0] * (len(pairs) - 3))
    with pytest.warns(UserWarning, match="3 of 40 rows have weight 0; they are read and teach nothing"):
        trainer(str(base_folder), some, cpu_arguments)
    unread = pairs.add_column("margin", [3.0] * len(pairs))
    with pytest.raises(UserError, match="no ranking has a place for the column 'margin'"):
        trainer(str(base_folder), unread, cpu_arguments, RankingRewardTrainer)


def test_one_score_for_all_samples_is_no_scale(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """PPO multiplied rewards by a million."""
    torch.manual_seed(0)
    model = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    with pytest.warns(UserWarning, match="all 3 samples have one score"):
        saved = save_reward_model(tmp_path, model, tokenizer, samples=[(PROMPTS[0], "yes")] * 3)
    assert saved.std == 1.0
    with pytest.raises(UserError, match="no samples, so the scale"):
        save_reward_model(tmp_path, model, tokenizer, samples=[])


def test_the_best_of_comparisons_that_were_drawn_is_one_that_nothing_beats() -> None:
    """Of a seven-answer order four comparisons are left: most wins minus losses took another answer in a quarter."""
    draws = torch.Generator().manual_seed(0)
    places = torch.triu_indices(7, 7, offset=1)
    for _ in range(200):
        kept = places[:, torch.randperm(21, generator=draws)[:4]]
        beats = torch.zeros(1, 7, 7, dtype=torch.bool)
        beats[0, kept[0], kept[1]] = True
        best = is_best(beats)[0]
        assert best[kept.min()], "the first of all that are left"
        assert not beats[0, :, best].any(), "and none of the best is beaten"


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_computes_in_its_own_precision_under_autocast(bias: bool) -> None:
    """The layers below may round; scores of 2 in 16 bits are 0.05 nats off, and their differences are what is learnt."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1, bias=bias)
    states = torch.randn(100, 64).bfloat16()
    expected = head(states.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(states).dtype == torch.bfloat16
        score_exactly(head)
        exact = head(states)
    torch.testing.assert_close(exact, expected, atol=1e-6, rtol=1e-6)
    exact.sum().backward()
    torch.testing.assert_close(head.weight.grad, states.float().sum(dim=0)[None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_an_encoders_scores_are_as_exact_under_autocast(
    encoder_folder: Path, pairs: Dataset, cpu_arguments: dict[str, Any], lora: bool
) -> None:
    """Its last linear layer was left to autocast: scores near 9 had steps of 0.06."""
    settings = model_settings({"use_peft": True, "lora_r": 2, "lora_target_modules": ["query"]} if lora else {})
    model: Any = build_reward_model(encoder_folder, settings, pad_token_id=0)
    plain = load_tokenizer(encoder_folder, conversational=True)
    trained = trainer(model, pairs, cpu_arguments, processing_class=plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = trained.model(input_ids=torch.arange(5, 21).view(4, 4)).logits
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16()).any()
