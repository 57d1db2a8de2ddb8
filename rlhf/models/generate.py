"""Sampling answers: one function for sampling, evaluation and PPO."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.data.rows import Prompt, user_turn
from rlhf.errors import UserError
from rlhf.models.batching import batches_by_length, pad_batch, run_batches
from rlhf.models.blanks import decode_behind, lost_blank
from rlhf.models.engine import engine_answers
from rlhf.models.prompt_length import longest_prompt
from rlhf.models.templates import frame
from rlhf.models.text import encode, encode_answers, prompt_text, without_beginning
from rlhf.models.typed import as_words

Engine = Literal["transformers", "vllm"]
STRETCH = 16  # tokens after which rows that have ended leave the batch


@dataclass
class Completions:
    """Sampled answers, with explicit masks: no id is ever compared with the padding id.

    Attributes:
        prompt_ids, prompt_mask: [b, p] left-padded.
        response_ids, response_mask: [b, r] right-padded; the end token, where one was sampled, is the last under the mask.
        ended: [b] bool, whether the answer stopped by itself.
        texts: the answers without special tokens, and without white space that the chat template writes before each.
        logprobs_sampler: [b, r] what another engine says it sampled with, nats; None where this model sampled itself.
        blank: of answers to plain prompts, what the tokenizer's decoder leaves out at a beginning and `texts` have all the same.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    texts: list[str]
    logprobs_sampler: Tensor | None = None
    blank: str = ""


def completions_of(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    conversational: bool,
    device: torch.device,
) -> Completions:
    """Return answers that an engine gave as ids to prompts' ids, as tensors and texts.

    Args:
        answers: at least one token each; what an engine sampled behind the first end token is left out.
        end_ids: ids that end an answer.
        conversational: whether the prompts are conversations.
        device: of the tensors.
    """
    assert isinstance(tokenizer.pad_token_id, int), "check_tokenizer wants one"
    prompt_ids, prompt_mask = (x.to(device) for x in pad_left(rows, tokenizer.pad_token_id))
    answers = [until_end(answer, end_ids) for answer in answers]
    response_ids, response_mask = (x.to(device) for x in pad_batch(answers, pad_token_id=tokenizer.pad_token_id))
    ended = torch.tensor([answer[-1] in end_ids for answer in answers], device=device)
    texts = texts_of(tokenizer, answers, conversational=conversational)
    blank = "" if conversational else lost_blank(tokenizer)
    return Completions(prompt_ids, prompt_mask, response_ids, response_mask, ended, texts, blank=blank)


def until_end(answer: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Return an answer's ids up to and including the first end token; all where there is none.

    >>> until_end([5, 1, 7], [1]), until_end([5, 6], [1])
    ([5, 1], [5, 6])
    """
    stop = next((place + 1 for place, token in enumerate(answer) if token in end_ids), len(answer))
    return list(answer[:stop])


def texts_of(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]], *, conversational: bool
) -> list[str]:
    """Return the texts of sampled answers, so that `encode_answers` reads of each what SFT would have trained.

    They are without special tokens. A policy whose prompts end in "Assistant:", and whose chat template writes "Assistant: yes",
    learns to begin with the blank; it is left out here, because the template writes it before every answer.

    Args:
        answers: ids of whole answers, or of their beginnings.
        conversational: whether they answer conversations; what follows a plain text is read as it stands.
    """
    if not conversational:
        return decode_behind(tokenizer, answers)
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    lead = frame(tokenizer).lead
    if not lead.isspace():
        return texts
    # Some tokenizers leave a blank at the beginning out when they decode; then none is to be taken away.
    prompts = [user_turn("x")]
    rows, _ = encode_answers(tokenizer, prompts, ["x"])
    (start,) = answer_starts(tokenizer, prompts, rows)
    if not tokenizer.decode(rows[0][start:], skip_special_tokens=True).startswith(lead):
        return texts
    return [text.removeprefix(lead) for text in texts]


def has_hidden_tokens(tokenizer: PreTrainedTokenizerBase, completions: Completions) -> Tensor:
    """Tell of which answers the text leaves out special tokens other than their end, [b] bool: nobody who reads it sees them."""
    added = (x for x, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = torch.tensor(sorted({*added, *tokenizer.all_special_ids}), device=completions.response_ids.device)
    before_end = completions.response_mask.sum(dim=1) - completions.ended.long()
    places = torch.arange(completions.response_ids.shape[1], device=special.device)
    return (torch.isin(completions.response_ids, special) & (places < before_end[:, None])).any(dim=1)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends an answer: the tokenizer's, and those of the model's generation configuration."""
    declared = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    assert tokenizer.eos_token_id is not None, "check_tokenizer refuses tokenizers without an end token"
    return sorted({tokenizer.eos_token_id, *declared})


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [b, longest] of token rows, padded on the left, on the CPU."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def sampling_settings(*, temperature: float, pad_token_id: int, end_ids: Sequence[int]) -> GenerationConfig:
    """Return the settings under which every answer is sampled: the model's whole distribution at a temperature.

    Args:
        temperature: of the sampling, > 0.
        pad_token_id: what stands behind an end token.
        end_ids: the ids that end an answer; all that is taken over of what a checkpoint declares.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad_token_id,
        eos_token_id=list(end_ids),
        use_cache=True,
        return_dict_in_generate=True,
    )


@contextmanager
def without_declared_settings(model: torch.nn.Module) -> Iterator[None]:
    """Give a model, and every model that it wraps, a blank generation configuration for a while.

    `generate` fills what its caller left open from the model's own configuration, which is that of the checkpoint:
    suppressed tokens, penalties, beams, min-p. PEFT's wrapper hands its own down to the base at every call.
    """
    declared = [(m, m.__dict__["generation_config"]) for m in model.modules() if "generation_config" in m.__dict__]
    owners = {id(module) for module, _ in declared}
    for module, _ in declared:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module in model.modules():  # a wrapper may have written its own for the first time
            if id(module) not in owners:
                module.__dict__.pop("generation_config", None)
        for module, config in declared:
            module.generation_config = config


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    batch_size: int | None = None,
) -> Completions:
    """Sample one answer to each prompt from the model's whole distribution, whatever its checkpoint declares.

    Anything narrower would sample from another distribution than the one whose log-probabilities PPO computes.

    Args:
        model: a causal model in evaluation mode.
        prompts: strings, or conversations that the tokenizer's chat template renders.
        max_new_tokens: an answer is cut after this many tokens.
        temperature: of the sampling, > 0.
        max_prompt_length: in tokens; longer prompts lose their beginning, as do those that the answer leaves no room for.
        batch_size: rows whose keys and values are in memory at once; all where absent.

    Raises:
        UserError: an answer leaves no room for a prompt.
    """
    limit = longest_prompt(model.config, max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
    rows = encode_prompts(tokenizer, prompts, max_prompt_length=limit)
    end_ids, padding = end_token_ids(model, tokenizer), tokenizer.pad_token_id
    if padding >= model.config.get_text_config().vocab_size:  # added to the tokenizer alone, it has no embedding
        padding = next(x for x in range(len(end_ids) + 1) if x not in end_ids)
    prompt_ids, prompt_mask = (x.to(model.device) for x in pad_left(rows, padding))
    settings = sampling_settings(temperature=temperature, pad_token_id=padding, end_ids=end_ids)
    parts = (ids.split(batch_size or len(rows)) for ids in (prompt_ids, prompt_mask))
    with without_declared_settings(model):
        answers = [_sampled(model, ids, mask, settings, max_new_tokens) for ids, mask in zip(*parts, strict=True)]
    width = max(answer.shape[1] for answer in answers)
    response_ids = torch.cat(
        [pad(answer, (0, width - answer.shape[1]), value=settings.pad_token_id) for answer in answers]
    )
    response_mask, ended = mask_after_end(response_ids, end_ids)
    kept = [row[mask].tolist() for row, mask in zip(response_ids, response_mask.bool(), strict=True)]
    texts = texts_of(tokenizer, kept, conversational=not isinstance(prompts[0], str))
    blank = lost_blank(tokenizer) if isinstance(prompts[0], str) else ""
    return Completions(prompt_ids, prompt_mask, response_ids, response_mask, ended, texts, blank=blank)


def _sampled(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, config: GenerationConfig, max_new_tokens: int
) -> Tensor:
    """Sample answers [b, r] of at most so many tokens, in stretches.

    Between two stretches, rows that have ended leave the batch and the cache.
    """
    end_ids = torch.tensor(config.eos_token_id, device=prompt_ids.device)
    answers = torch.full((len(prompt_ids), max_new_tokens), config.pad_token_id, device=prompt_ids.device)
    rows, ids, mask, cache = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask, None
    done, ended = 0, torch.zeros(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    while done < max_new_tokens and len(rows) > 0:
        config.max_new_tokens = min(STRETCH, max_new_tokens - done)
        with warnings.catch_warnings():  # from 5.24 on it is `cache`, which older versions don't know
            warnings.filterwarnings("ignore", message=".*past_key_values.*", category=FutureWarning)
            output: Any = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config
            )
        new = output.sequences[:, ids.shape[1] :]
        answers[rows, done : done + new.shape[1]] = new
        done += new.shape[1]
        ended[rows] |= torch.isin(new, end_ids).any(dim=1)
        unfinished = (~ended[rows]).nonzero().flatten()
        cache = output.past_key_values  # None where a model keeps its state elsewhere; it reads its rows again then
        if cache is not None and not all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        ):
            # Of fixed size, quantised, or with a linear state: no row can leave, so all stay until the last has ended.
            unfinished = torch.arange(len(rows) if len(unfinished) > 0 else 0, device=unfinished.device)
        elif cache is not None and len(unfinished) < len(rows):
            cache.batch_select_indices(unfinished)
        rows, ids = rows[unfinished], output.sequences[unfinished]
        mask = torch.cat([mask[unfinished], mask.new_ones(len(unfinished), new.shape[1])], dim=1)
    return answers[:, :done]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, max_prompt_length: int | None
) -> list[list[int]]:
    """Return the token rows of prompts, through the chat template where these are conversations.

    Special tokens that somebody typed into messages are words; a prompt that is a string is read as it stands. Prompts of
    more than `max_prompt_length` tokens lose their beginning, but for the begin token.

    Raises:
        UserError: a prompt has no tokens. What comes before an answer's first token is then nothing, and its log-probability
            would be read behind another row's last token.
    """
    rows = encode(tokenizer, asked_texts(tokenizer, prompts), conversational=not isinstance(prompts[0], str))
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        raise UserError(
            f"prompts: {len(empty)} of {len(rows)} have no tokens (the first is index {empty[0]}: {prompts[empty[0]]!r}), and an "
            "answer needs one before it; leave them out, or write a token that begins a text."
        )
    most, begin = max_prompt_length, tokenizer.bos_token_id
    return rows if most is None else [without_beginning(row, most, begin) for row in rows]


def asked_texts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[str]:
    """Return the texts behind which answers are sampled; special tokens that somebody typed into messages are marked as words."""
    return [p if isinstance(p, str) else prompt_text(tokenizer, as_words(tokenizer, p)) for p in prompts]


def answer_starts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]
) -> list[int]:
    """Return where each answer begins in the ids of prompt and answer: where these and the ids of the prompt part."""
    conversational = not isinstance(prompts[0], str)
    prompt_rows = encode(tokenizer, asked_texts(tokenizer, prompts), conversational=conversational)
    return [
        next((i for i, (a, b) in enumerate(zip(prompt, row, strict=False)) if a != b), len(prompt))
        for prompt, row in zip(prompt_rows, rows, strict=True)
    ]


def completer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    engine: Engine = "transformers",
) -> Callable[[Sequence[int]], Completions]:
    """Return what gives one answer to each prompt of some indices; arguments as in `generate`.

    transformers samples them when asked, from torch's generator. vLLM samples the answers to all prompts here, since it starts
    for minutes and makes batches of its own.
    """
    if engine == "transformers":
        return lambda batch: generate(
            model,
            tokenizer,
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            max_prompt_length=max_prompt_length,
        )
    limit = longest_prompt(model.config, max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
    rows = encode_prompts(tokenizer, prompts, max_prompt_length=limit)
    ends, conversational = end_token_ids(model, tokenizer), not isinstance(prompts[0], str)
    answers = engine_answers(model, rows, end_ids=ends, max_new_tokens=max_new_tokens, temperature=temperature)
    return lambda batch: completions_of(
        tokenizer,
        [rows[i] for i in batch],
        [answers[i] for i in batch],
        end_ids=ends,
        conversational=conversational,
        device=model.device,
    )


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    engine: Engine = "transformers",
    label: str | None = None,
) -> tuple[list[str], list[bool]]:
    """Sample one answer to each prompt.

    Batches hold prompts of similar length, so that little is padding; the longest come first, so that what does not fit in
    memory fails at once.

    Args:
        batch_size: prompts that are answered together.
        max_new_tokens, temperature, max_prompt_length: as in `generate`.
        engine: what samples; vLLM makes batches of its own.
        label: what people know this work by; shows how far it is.

    Returns:
        the texts, and whether each ended by itself, in the order of the prompts.
    """
    limit = longest_prompt(model.config, max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
    lengths = [len(row) for row in encode_prompts(tokenizer, prompts, max_prompt_length=limit)]

    complete = completer(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        max_prompt_length=max_prompt_length,
        engine=engine,
    )

    def answer(batch: list[int]) -> Iterator[tuple[str, bool]]:
        completions = complete(batch)
        return zip(completions.texts, completions.ended.tolist(), strict=True)

    answers = run_batches(answer, batches_by_length(lengths, batch_size, longest_first=True), label=label)
    return [text for text, _ in answers], [ended for _, ended in answers]


def mask_after_end(response_ids: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a mask [b, r] with 1 up to and including the first end token, and whether there was one [b].

    >>> mask_after_end(torch.tensor([[5, 1, 1], [5, 6, 7]]), [1])
    (tensor([[1, 1, 0],
            [1, 1, 1]]), tensor([ True, False]))
    """
    is_end = torch.isin(response_ids, torch.tensor(list(end_ids), device=response_ids.device))
    ends_before = is_end.long().cumsum(dim=1) - is_end.long()
    return (ends_before == 0).long(), is_end.any(dim=1)
