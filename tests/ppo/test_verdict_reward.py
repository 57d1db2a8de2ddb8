"""Verdicts as a reward: whom an answer is compared with, that the reference's mean reward is 0, what is refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rlhf import PPOConfig, PPOTrainer
from rlhf.errors import TrainingError, UserError
from rlhf.models.generate import Completions
from rlhf.models.load import load_tokenizer
from rlhf.models.verdicts import load_verdict_model
from rlhf.ppo.rewards import RewardSource
from rlhf.ppo.setup import check_opponents
from rlhf.ppo.source_kinds import source_problem
from tests.conftest import PROMPTS
from tests.ppo.test_options import TWO

ALONE = {"reward_weights": [0.0, 1.0], "reward_clip": None, "missing_eos_penalty": None, "kl_coef": 0.0}


def make(base: Path, reward: Path, verdicts: Path, arguments: dict[str, Any], *, own: bool = False) -> PPOTrainer:
    """A trainer whose only reward that counts are verdicts."""
    sizes = {"per_device_train_batch_size": 8, "num_mini_batches": 1, "total_episodes": 8, "max_completion_length": 8}
    beside = {"reference_answer": "yes"} if own else {}
    return PPOTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        [str(reward), f"verdicts:{verdicts}"],
        PPOConfig(**{**arguments, **sizes, **ALONE}),
        Dataset.from_list([{"prompt": prompt, **beside} for prompt in PROMPTS[:8]]),
        processing_class=load_tokenizer(base, conversational=True),
    )


def test_an_answer_is_compared_with_a_fresh_one_of_the_reference(
    base_folder: Path, reward_folder: Path, verdict_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer = make(base_folder, reward_folder, verdict_folder, cpu_arguments)
    sampled: list[Completions] = []
    generate = trainer.generate
    trainer.generate = lambda model, rows: sampled.append(generate(model, rows)) or sampled[-1]  # type: ignore
    rows = trainer.prompts_of(0)
    experience = trainer.experience(rows)
    policy, reference = sampled
    assert policy.texts != reference.texts
    # The stranger's own sum: one pair at a time, forward minus backward.
    model = load_verdict_model(str(verdict_folder))
    for i, row in enumerate(rows):
        orders = model.compare([row["prompt"]], [policy.texts[i]], [reference.texts[i]]).orders
        assert experience.scores[i].item() == pytest.approx(orders.log_odds.item(), abs=1e-5)


def test_a_reference_answer_in_the_data_is_the_one_that_counts(
    base_folder: Path, reward_folder: Path, verdict_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer = make(base_folder, reward_folder, verdict_folder, cpu_arguments, own=True)
    rows = trainer.prompts_of(0)
    experience = trainer.experience(rows)
    texts = [sample.completion for sample in trainer.latest_samples]
    expected = load_verdict_model(str(verdict_folder)).compare([r["prompt"] for r in rows], texts, ["yes"] * 8)
    torch.testing.assert_close(experience.scores, expected.orders.log_odds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compares", [True, False])
def test_a_column_of_its_name_is_anyone_s_where_nothing_compares(
    base_folder: Path, reward_folder: Path, verdict_folder: Path, cpu_arguments: dict[str, Any], compares: bool
) -> None:
    """Tasks with a known solution often have a column of this name, of numbers too, which reward functions read."""
    solutions = [{"prompt": prompt, "reference_answer": i} for i, prompt in enumerate(PROMPTS[:4])]
    functions: Any = [str(reward_folder), f"verdicts:{verdict_folder}" if compares else solved]
    sizes = {"per_device_train_batch_size": 4, "num_mini_batches": 1, "total_episodes": 4, "max_completion_length": 8}

    def trainer() -> PPOTrainer:
        return PPOTrainer(
            AutoModelForCausalLM.from_pretrained(base_folder),
            functions,
            PPOConfig(**{**cpu_arguments, **sizes}),
            Dataset.from_list(solutions),
            processing_class=load_tokenizer(base_folder, conversational=True),
        )

    if compares:
        with pytest.raises(
            UserError, match="4 of 4 rows of train_dataset have no text in the column 'reference_answer'"
        ):
            trainer()
        return
    made = trainer()
    made.experience(made.prompts_of(0))


def solved(completions: list[str], reference_answer: list[int], **_: Any) -> list[float]:
    return [float(str(solution) in text) for solution, text in zip(reference_answer, completions, strict=True)]


def test_equally_good_policies_have_a_mean_of_0(verdict_folder: Path) -> None:
    """Over all ordered pairs of four answers, which is what two draws from one policy are, the mean is 0."""
    source = RewardSource(f"verdicts:{verdict_folder}")
    answers = ["yes", "no dog", "three blue pears", ""]
    pairs = [(one, other) for one in answers for other in answers]
    scores = source.function(  # type: ignore[operator]
        prompts=[PROMPTS[0]] * 16, completions=[a for a, _ in pairs], reference_answer=[b for _, b in pairs]
    )
    assert sum(scores) == pytest.approx(0, abs=1e-4)
    assert max(scores) > 0.01


def test_answers_that_do_not_fit_get_nothing_and_are_said_once(verdict_folder: Path) -> None:
    source: Any = RewardSource(f"verdicts:{verdict_folder}").function
    arguments = {"prompts": PROMPTS[:2], "completions": ["dog " * 600, "yes"], "reference_answer": ["no", "no"]}
    with pytest.warns(UserWarning, match="1 of 2 pairs of answers do not fit in its context"):
        first = source(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = source(**arguments)
    assert first == second
    assert first[0] == 0 != first[1]


def test_what_it_cannot_do_is_said(verdict_folder: Path, encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="give it a column 'reference_answer'"):
        RewardSource(f"verdicts:{verdict_folder}")(PROMPTS[:2], TWO, {})
    rows = [
        {"prompt": prompt, "reference_answer": answer}
        for prompt, answer in zip(PROMPTS, ("yes", None, ""), strict=False)
    ]
    with pytest.raises(UserError, match=r"1 of 3 rows .* no text in the column 'reference_answer', .* row 1 \(None\)"):
        check_opponents(Dataset.from_list(rows))
    with pytest.raises(UserError, match="an encoder says no next token"):
        RewardSource(f"verdicts:{encoder_folder}")
    assert source_problem(f"verdicts:{tmp_path}/none") == f"{tmp_path}/none: no such folder."
    assert source_problem(f"verdicts:{verdict_folder}") is None
    assert source_problem("verdicts:org/name") is None, "a hub id is looked up when it is loaded"
