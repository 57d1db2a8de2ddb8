"""Ends: can an answer come to its end, and does it?

A chat template ends an assistant's turn with a token. SFT teaches the policy to write that token, and sampling waits for the
end tokens that tokenizer and generation configuration name. Where the first is not among the second, every answer is cut off
at its longest length, whatever is trained.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.invariants.checks import Check, CheckBook
from rlhf.models.templates import closing

REACHABLE, ENDS = "ends reachable", "policy ends"
SAMPLED = 16  # answers that "policy ends" looks at


def ends_reachable(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], *, is_trained_here: bool) -> Check:
    """Return the check "ends reachable": does the chat template end an answer with a token at which sampling stops?

    The statistic counts endings that sampling never sees: 1 where none of the tokens that the template writes after an
    answer is an end token, else 0, which is the bound.

    Args:
        tokenizer: with a chat template.
        end_ids: ids at which sampling stops (`rlhf.models.generate.end_token_ids`).
        is_trained_here: whether SFT teaches the policy the template's ending. A policy that somebody else trained may end
            its answers although its template writes nothing, or only plain text, behind them.
    """
    text = closing(tokenizer, [{"role": "user", "content": "question"}])
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    special_ids = [token for token in token_ids if token in special]
    is_missed = not set(token_ids) & set(end_ids) and (is_trained_here or bool(special_ids))
    stops = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(sorted(end_ids)))
    if special_ids:
        token = tokenizer.convert_ids_to_tokens(special_ids[0])
        written = repr(token)
        change = f"Set sft.eos_token: {token!r}, or eos_token in the model's tokenizer_config.json, or take the instruct model."
    else:
        written = repr(text) if text.strip() else "nothing"
        change = "Let the template write {{ eos_token }} after an assistant's turn (chat_template.jinja in the model's folder)."
    sentence = (
        f"The chat template ends an answer with {written} and sampling waits for {stops}, so no answer would ever end, and "
        f"a larger max_completion_length would not help. {change}"
    )
    return Check(REACHABLE, float(is_missed), 0.0, "endings missed", sentence)


def require_reachable_end(
    checks: CheckBook, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], *, stage: str, is_trained_here: bool
) -> None:
    """Enter "ends reachable" in a stage's checks before anything is trained; arguments as in `ends_reachable`.

    Raises:
        UserError: it does not hold.
    """
    check = ends_reachable(tokenizer, end_ids, is_trained_here=is_trained_here)
    checks.record(check)
    if not check.held:
        raise UserError(f"{stage}: {check.sentence}")


def policy_ends(ended: Sequence[bool], *, max_new_tokens: int) -> Check:
    """Return the check "policy ends": the share of sampled answers that end by themselves; one at least must.

    With 16 answers, a policy of whose answers a share p ends shows none with probability (1 - p)^16: below 10⁻⁴ from
    p = 0.44 on. A policy that ends more rarely can be told of by mistake, so the check is entered and said, and stops
    nothing.

    Args:
        ended: of each answer, whether it came to its end; one answer at least.
        max_new_tokens: the length at which answers were cut.
    """
    sentence = (
        f"None of {len(ended)} sampled answers ended within {max_new_tokens} tokens, so PPO would learn from answers that are cut "
        "off. Raise ppo.max_completion_length if good answers are longer than that; else start from a policy that ends its answers "
        "(a longer SFT, an instruct model), and see that its end token is the one that its chat template writes."
    )
    low = 1 / len(ended)
    return Check(ENDS, sum(ended) / len(ended), 1.0, f"of {len(ended)} answers", sentence, low=low)


def prompts_too_long(lengths: Sequence[int], limit: int | None) -> str | None:
    """Return a sentence where prompts are longer than what is read of them, else None.

    Args:
        lengths: tokens of some prompts.
        limit: tokens of a prompt that are read; longer ones lose their beginning. None: all are.
    """
    cut = 0 if limit is None else sum(length > limit for length in lengths)
    if not cut:
        return None
    whole = ", and the policy sees the beginning of none" if cut == len(lengths) else ""
    return (
        f"{cut} of the {len(lengths)} prompts that were looked at are longer than the {limit} tokens that are read of one (the "
        f"longest has {max(lengths)}): they lose their beginning, a system turn first{whole}; the reward model reads of them what "
        "fits with the answer in its own context. Raise ppo.max_prompt_length, lower ppo.max_completion_length, take a model with "
        "a longer context, or leave long prompts out (data.max_characters)."
    )
