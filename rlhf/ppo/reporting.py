"""What people are told of a run: troubles and samples at every log, and the numbers of an evaluation."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor

from rlhf._trl import print_prompt_completions_sample
from rlhf.errors import UserError
from rlhf.models.text import plain
from rlhf.ppo.metrics import RolloutMetrics
from rlhf.ppo.processes import moments_of_all
from rlhf.ppo.scores import count_rewards

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

UNREAD = "reward cut"  # the alarm's name


def warn_of_cut_answers(trainer: "PPOTrainer", ended: Tensor) -> None:
    """Warn where most answers of a rollout were cut, before anything is learnt from it; end training after it where asked for.

    Args:
        ended: [b] whether each of this process's answers came to its end. Called by all processes together.
    """
    args = trainer.args
    _, share_cut, _ = moments_of_all(trainer.accelerator, (~ended).float())
    sentences = trainer.progress.health.look_at_ends(
        share_cut,
        rollout=trainer.state.global_step // args.steps_per_rollout + 1,
        limit=args.max_completion_length,
        penalty=args.missing_eos_penalty,
    )
    _tell(trainer, sentences)


@contextmanager
def count_cut_texts(trainer: "PPOTrainer", answers: int) -> Iterator[None]:
    """Count which of so many texts, prompt and answer, the reward models read without their beginning while they score them."""
    models = trainer.rewards.reward_models
    before = sum(reward.cut for reward in models)
    yield
    if models:
        trainer.metrics.count("rewards_cut", sum(reward.cut for reward in models) - before, answers * len(models))


def warn_of_unread_answers(trainer: "PPOTrainer") -> None:
    """Warn once where answers alone are longer than a reward model reads; end training after this rollout where asked for.

    Called by all processes together.
    """
    models, health = trainer.rewards.reward_models, trainer.progress.health
    if not models or UNREAD in health.raised:
        return
    cut = torch.tensor(sum(reward.cut_answers for reward in models), device=trainer.accelerator.device)
    if trainer.accelerator.reduce(cut, reduction="sum") == 0:
        return
    sentence = (
        f"ppo, rollout {trainer.state.global_step // trainer.args.steps_per_rollout + 1}: answers are longer than the "
        f"{min(reward.max_length for reward in models)} tokens that the reward model reads. They are scored without their own "
        "beginning, and answers that end alike get the same score: lower ppo.max_completion_length, or take a reward model that "
        "reads more."
    )
    health.raised.append(UNREAD)
    health.sentences.append(sentence)
    _tell(trainer, [sentence])


def note_cuts(trainer: "PPOTrainer") -> None:
    """Note for checkpoints what each reward model has counted so far. Called by all processes together."""
    counts = [reward.counts() for reward in trainer.rewards.reward_models]
    if counts:
        joined = torch.tensor([count for of_one in counts for count in of_one], device=trainer.accelerator.device)
        of_all = iter(trainer.accelerator.reduce(joined, reduction="sum").tolist())
        trainer.progress.cuts = [[next(of_all) for _ in of_one] for of_one in counts]


def take_cuts_back(trainer: "PPOTrainer") -> None:
    """Let reward models count on from a checkpoint: the first process has what all had counted."""
    if trainer.accelerator.is_main_process:
        for reward, counts in zip(trainer.rewards.reward_models, trainer.progress.cuts, strict=False):
            reward.count_from(counts)


def cuts_of_all(trainer: "PPOTrainer") -> list[str]:
    """Return a sentence for each way in which texts were too long for a reward model, over all processes together."""
    note_cuts(trainer)
    sentences = []
    for number, (reward, counts) in enumerate(
        zip(trainer.rewards.reward_models, trainer.progress.cuts, strict=True), 1
    ):
        with reward.uncounted():
            reward.count_from(counts)
            sentences += reward.cuts(f"ppo: reward model {number}")
    return sentences


def _tell(trainer: "PPOTrainer", sentences: Sequence[str]) -> None:
    """Warn of what is new to worry about, the same on every process; it is why training ends, where that was asked for."""
    for sentence in sentences:
        if trainer.args.stop_when_unhealthy:
            trainer.stop(trainer.stopped or sentence)
        if trainer.accelerator.is_main_process:
            warnings.warn(sentence, stacklevel=4)


def warn_of_trouble(trainer: "PPOTrainer", row: dict[str, float]) -> None:
    """Warn of what is new to worry about after a rollout with these metrics, and end training where that was asked for."""
    rollout = trainer.state.global_step // trainer.args.steps_per_rollout
    sentences = trainer.progress.health.look(row, rollout=rollout)
    _tell(trainer, sentences)
    if sentences and trainer.args.stop_when_unhealthy:
        trainer.control.should_save = trainer.control.should_training_stop = True


def print_samples(trainer: "PPOTrainer") -> None:
    """Print the first of the latest answers, as many as `num_completions_to_print`."""
    if not trainer.args.num_completions_to_print or not trainer.accelerator.is_main_process:
        return
    samples = trainer.latest_samples[: trainer.args.num_completions_to_print]
    print_prompt_completions_sample(
        [plain(sample.prompt) for sample in samples],
        [sample.completion for sample in samples],
        {"proxy": [sample.proxy for sample in samples]},
        [sample.kl for sample in samples],
        trainer.state.global_step,
    )


def evaluate(trainer: "PPOTrainer", dataset: Dataset | None) -> dict[str, float]:
    """Sample and score the prompts of a dataset with the current policy, every process its share, and train nothing.

    Returns:
        the metrics of the answers, means over all processes; what was counted for the next log is left as it was.

    Raises:
        UserError: there is no dataset, or not a prompt for each process.
    """
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    if dataset is None:
        raise UserError("ppo: evaluation was asked for but there is no eval_dataset.")
    if len(dataset) < accelerator.num_processes:
        raise UserError(
            f"ppo: {len(dataset)} evaluation prompts for {accelerator.num_processes} processes; give one to each."
        )
    # Whom vLLM serves ask it together, each for as many answers.
    is_asked_together = trainer.args.use_vllm and trainer.args.vllm_mode == "server"
    left_out = len(dataset) % accelerator.num_processes if is_asked_together else 0
    if left_out and accelerator.is_main_process:
        warnings.warn(
            f"ppo: {left_out} of {len(dataset)} evaluation prompts are left out, as {accelerator.num_processes} processes ask one "
            "vLLM server for equally many answers.",
            stacklevel=3,
        )
    kept_metrics, kept_samples = trainer.metrics, trainer.latest_samples
    trainer.metrics = RolloutMetrics(accelerator)
    indices = list(range(len(dataset) - left_out))[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(indices), size):
        count_rewards(trainer, trainer.experience(dataset.select(indices[start : start + size]).to_list()))
    means = trainer.metrics.take()
    trainer.metrics, trainer.latest_samples = kept_metrics, kept_samples
    return means
