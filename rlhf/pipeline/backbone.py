"""What is asked of a recipe's backbone before a folder is made: it can be opened, answer, be scored, and read the prompts."""

import warnings
from collections.abc import Iterator

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from trl import RewardConfig, SFTConfig

from rlhf.data.read import ReadReport, is_local
from rlhf.data.sources import Source, read_sources, to_prompts
from rlhf.errors import UserError
from rlhf.models.critiques import room_before_critique
from rlhf.models.generate import encode_prompts
from rlhf.models.load import encoder_type, find_source, load_tokenizer
from rlhf.models.look import check_model
from rlhf.models.open import open_config
from rlhf.models.prompt_length import context_length, room_for_prompt
from rlhf.models.templates import template_problems
from rlhf.models.text import check_vocabulary
from rlhf.pipeline.adapter_checks import adapter_problems
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.schema import Recipe

MEASURED_PROMPTS = 256  # prompts whose lengths are looked at
WITHOUT_A_POLICY = ("data", "vote", "reward")
STRETCHING = ("longrope", "dynamic")  # kinds of rotary positions


def check_backbone(recipe: Recipe, *, until: str | None = None, may_be_encoder: bool = False) -> None:
    """Refuse a backbone that could not be used to the end; warn where it can be used, but not as the recipe reads.

    Its configuration and its tokenizer are read, and of a folder on this machine its weights, of which none are kept.

    Args:
        until: the last stage that will run, if it is not the plan's.
        may_be_encoder: whether an encoder is no mistake, because nobody has said yet which stages will run.

    Raises:
        UserError: with a sentence for each reason.
    """
    name, revision = recipe.backbone.model, recipe.backbone.revision
    if name is None:
        return
    try:
        config = open_config(find_source(name).base, revision)
        if may_be_encoder and encoder_type(name, revision) is not None:
            until = "reward"
        problems = list(_misfits(name, revision, config, until))
        if recipe.reward.extra_kind in ("text", "critique") and encoder_type(name, revision) is not None:
            problems.append(
                f"{name} is an encoder, which writes no text; leave reward.extra: {recipe.reward.extra} out."
            )
        if recipe.reward.experts == "merged" and encoder_type(name, revision) is not None:
            problems.append(
                f"{name} is an encoder, whose head of several layers does not add up; take another way than reward.experts: merged."
            )
        tokenizer = load_tokenizer(name, conversational=True, revision=revision)
        check_vocabulary(tokenizer, config, name=name, pads=True)
        if recipe.reward.extra_kind == "critique":
            room = room_before_critique(config, tokenizer, recipe.reward.critique_tokens)
            if room is not None and room < 1:
                problems.append(
                    f"{name} reads {context_length(config)} tokens, of which reward.critique_tokens="
                    f"{recipe.reward.critique_tokens} and the turn that asks for the critique leave none for prompt and answer; "
                    "lower it."
                )
        if not problems:
            check_model(name, scores=until in WITHOUT_A_POLICY)
    except UserError as error:
        raise UserError([f"backbone.model: {problem}" for problem in error.problems]) from error
    if not problems and until in ("sft", "reward") and encoder_type(name, revision) is None:
        problems += _no_room(recipe, name, config)  # for the answers that show SFT's policy, or set the reward's scale
    elif not problems and until not in (*WITHOUT_A_POLICY, "sft"):
        problems += _short_context(recipe, name, config, tokenizer)
    if problems:
        raise UserError([f"backbone.model: {problem}" for problem in problems])
    _say_stretching(recipe, name, config)
    if problems := list(adapter_problems(recipe, config)):
        raise UserError(problems)


def _misfits(name: str, revision: str | None, config: PreTrainedConfig, until: str | None) -> Iterator[str]:
    """Yield why transformers can't make of this architecture what the stages need."""
    encoder = encoder_type(name, revision) if until not in WITHOUT_A_POLICY else None
    if encoder is not None:
        yield (
            f"{name} is an encoder ({encoder}), which cannot generate: a reward model can be made of it (`rlhf reward`, "
            "without data.sft), a policy cannot."
        )
    elif until not in WITHOUT_A_POLICY and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield f"{name}: transformers has no language model of the architecture {config.model_type!r}; take another model."
    elif until != "data" and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        yield (
            f"{name}: transformers has no sequence classifier of the architecture {config.model_type!r}, so no reward model can be "
            "made of it; take another model."
        )


def _no_room(recipe: Recipe, name: str, config: PreTrainedConfig, *, default: int = 0) -> Iterator[str]:
    """Yield a sentence where answers leave no room for a prompt.

    Args:
        default: tokens of an answer where the recipe does not say; a run that ends before PPO need not.
    """
    answer = recipe.ppo.trl_settings().get("max_completion_length", default)
    room = room_for_prompt(config, max_new_tokens=answer)
    if room is not None and room < 1:
        yield (
            f"{name} reads {context_length(config)} tokens, which ppo.max_completion_length={answer} leaves no prompt of; lower "
            "it, or take a model with a longer context."
        )


def _short_context(
    recipe: Recipe, name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield why the context is too short for PPO; warn where prompts only lose their beginning."""
    if problems := list(_no_room(recipe, name, config, default=PPOConfig.max_completion_length)):
        yield from problems
        return
    ppo = recipe.ppo.trl_settings()
    answer = ppo.get("max_completion_length", PPOConfig.max_completion_length)
    prompt = ppo.get("max_prompt_length", PPOConfig.max_prompt_length)
    positions, room = context_length(config), room_for_prompt(config, max_new_tokens=answer)
    if room is None or (prompt is not None and prompt <= room):
        return
    lengths = _prompt_lengths(recipe, tokenizer)
    if lengths and min(lengths) > room:
        yield (
            f"{name} reads {positions} tokens, of which ppo.max_completion_length={answer} leaves {room} for a prompt, and every "
            f"one of the {len(lengths)} prompts that were looked at is longer (the shortest has {min(lengths)} tokens). Lower "
            "ppo.max_completion_length, or take a model with a longer context."
        )
    elif prompt is not None or (lengths and max(lengths) > room):
        limit = "without a limit" if prompt is None else f"ppo.max_prompt_length is {prompt}"
        warnings.warn(
            f"{name} reads {positions} tokens, of which ppo.max_completion_length={answer} leaves {room} for a prompt ({limit}); "
            "longer prompts lose their beginning.",
            stacklevel=4,
        )


def _say_stretching(recipe: Recipe, name: str, config: PreTrainedConfig) -> None:
    """Warn where a forward looks at its longest text to choose how all of its positions turn: scores depend on neighbours."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope.get("rope_type") not in STRETCHING or original is None:
        return
    sft, reward, ppo = (section.trl_settings() for section in (recipe.sft, recipe.reward, recipe.ppo))
    prompt, answer = (ppo.get(n, getattr(PPOConfig, n)) for n in ("max_prompt_length", "max_completion_length"))
    asked = [sft.get("max_length", SFTConfig.max_length), reward.get("max_length", RewardConfig.max_length)]
    asked.append(None if prompt is None else prompt + answer)
    if any(length is None or length > original for length in asked):
        warnings.warn(
            f"{name} chooses its positions ({rope['rope_type']}) by the longest text of a forward, so beyond {original} tokens "
            "scores and log-probabilities depend on what else is in the batch; keep sft.max_length, reward.max_length and "
            f"ppo.max_prompt_length + ppo.max_completion_length within {original}.",
            stacklevel=4,
        )


def _prompt_lengths(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of the first prompts of the recipe's local files.

    None where they lie on a hub, or where the chat template refuses them, which is told when they are read.
    """
    entries = recipe.data.sources("prompts") or recipe.data.sources("preferences")
    sources = [Source(**entry.model_dump()) for entry in entries if is_local(entry.source)]
    reports: list[ReadReport] = []
    rows = read_sources(sources, to_prompts, reports, "prompts", recipe.seed)
    prompts = [row.values["prompt"] for row in rows.train[:MEASURED_PROMPTS]]
    if not prompts or template_problems(tokenizer, prompts):
        return []
    return [len(ids) for ids in encode_prompts(tokenizer, prompts, max_prompt_length=None)]
