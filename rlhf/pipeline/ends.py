"""Before SFT and PPO train: the chat template accepts the data, an answer can end, and the policy's answers do."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.invariants.checks import CheckBook
from rlhf.invariants.ends import SAMPLED, policy_ends, prompts_too_long, require_reachable_end
from rlhf.models.generate import encode_prompts, end_token_ids
from rlhf.models.templates import template_problems
from rlhf.pipeline.context import StageContext
from rlhf.ppo.trainer import PPOTrainer

MEASURED_PROMPTS = 256  # prompts whose lengths are looked at


def check_ends_before_ppo(context: StageContext, trainer: PPOTrainer, checks: CheckBook) -> None:
    """Enter "ends reachable" and "policy ends" before PPO trains, and say what a person should know.

    Sixteen answers are sampled by the main process alone; every random state is afterwards what it was.

    Raises:
        UserError: the template refuses the prompts, or ends an answer with a token at which sampling does not stop.
    """
    tokenizer = trainer.processing_class
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    refuse_unreadable_turns(tokenizer, trainer.train_dataset["prompt"], source="data.prompts")
    is_trained_here = context.find_parent("sft") is not None
    require_reachable_end(
        checks, tokenizer, end_token_ids(policy, tokenizer), stage="ppo", is_trained_here=is_trained_here
    )
    if not context.is_main:
        return
    rows = trainer.train_dataset.select(range(min(MEASURED_PROMPTS, len(trainer.train_dataset)))).to_list()
    encoded = encode_prompts(tokenizer, [row["prompt"] for row in rows], max_prompt_length=None)
    sentence = prompts_too_long([len(ids) for ids in encoded], trainer.longest_prompt)
    if sentence is not None:
        context.say(f"ppo: {sentence}")
    with torch.random.fork_rng():
        completions = trainer.generate(policy, rows[:SAMPLED])
    check = policy_ends(completions.ended.tolist(), max_new_tokens=trainer.args.max_completion_length)
    checks.record(check)
    if not check.held:
        context.say(f"ppo: {check.sentence}")


def refuse_unreadable_turns(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, source: str) -> None:
    """Refuse prompts whose order of roles the chat template does not accept, such as a system turn in Gemma's.

    Of all prompts with the same order of roles one is rendered, so a template that refuses a text for what it says is not
    seen.

    Args:
        source: what they are, for messages: "data.sft".

    Raises:
        UserError: with the number of prompts, the roles, and the template's own reason.
    """
    problems = template_problems(tokenizer, prompts)
    if problems:
        raise UserError([f"{source}: {problem}" for problem in problems])
