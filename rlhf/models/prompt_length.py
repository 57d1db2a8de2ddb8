"""How long a prompt may be: the one place that decides it, for PPO, for sampling outside it, and for `rlhf check`."""

from transformers import PreTrainedConfig

from rlhf.errors import UserError


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a causal model was made for, prompt and answer together; None where it does not say.

    Beyond them a model with learnt positions fails, and one with rotary positions writes what it was never trained on. YaRN, as
    Qwen2.5's card tells people to write it, stretches them by a factor that `max_position_embeddings` does not hold.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type") != "yarn":
        return positions
    return max(positions, round(rope.get("factor", 1.0) * (rope.get("original_max_position_embeddings") or positions)))


def room_for_prompt(config: PreTrainedConfig, *, max_new_tokens: int) -> int | None:
    """Return how many tokens of a model's context an answer leaves, 0 or less where none; None for a model without a limit.

    Args:
        max_new_tokens: the longest answer.
    """
    context = context_length(config)
    return None if context is None else context - max_new_tokens


def longest_prompt(config: PreTrainedConfig, *, max_new_tokens: int, max_prompt_length: int | None) -> int | None:
    """Return how many tokens of a prompt are read: `max_prompt_length`, or what an answer leaves; None where all are.

    Args:
        config: of a causal model.
        max_new_tokens: the longest answer.
        max_prompt_length: what was asked for; None for as much as there is room for.

    Raises:
        UserError: an answer leaves nothing.
    """
    room = room_for_prompt(config, max_new_tokens=max_new_tokens)
    if room is None:
        return max_prompt_length
    if room < 1:
        raise UserError(
            f"ppo: max_completion_length={max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context_length(config)} tokens; lower it, or take a model with a longer context."
        )
    return room if max_prompt_length is None else min(room, max_prompt_length)
