"""Critiques: a causal model on a classifier's own decoder writes what it thinks of an answer, behind that answer.

    prompt, answer and its end     as every reward model reads them
    request                        one more turn of the user, as the chat template writes it
    critique and its end           written by the model; the score is read at its last token

The three are put together as token ids, so an answer that was cut off is one here too, and nothing is rendered twice.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.data.rows import Message
from rlhf.errors import UserError
from rlhf.models.batching import TOKENS_TOGETHER, batches_by_length, run_batches
from rlhf.models.generate import pad_left, without_declared_settings
from rlhf.models.heads import language_head
from rlhf.models.load import find_source, model_settings
from rlhf.models.prompt_length import context_length
from rlhf.models.templates import MARKER, closing, end_texts, rendered, without_ends
from rlhf.models.text import encode
from rlhf.models.typed import as_words
from rlhf.objectives.critiques import gumbel

REQUEST = "What is good and bad?"


class CritiqueForm(TypedDict):
    """How a reward model is asked for its critiques, as its card says.

    Attributes:
        request: the words of the turn that asks for one.
        tokens: a critique is cut after so many.
        samples: critiques of an answer, of which the scores are averaged; 1: the likeliest one, token by token.
    """

    request: str
    tokens: int
    samples: int


class Critiques(NamedTuple):
    """Critiques of some answers.

    Attributes:
        rows: token ids of each, with the end token where it came to its end.
        ended: whether it did.
    """

    rows: list[list[int]]
    ended: list[bool]


def request_ids(tokenizer: PreTrainedTokenizerBase, request: str = REQUEST) -> list[int]:
    """Return the ids that stand between an answer's end and its critique: the turn that asks, and the opening of the next one.

    Raises:
        UserError: the chat template does not write such a turn behind an answer.
    """
    asked, answered = Message(role="user", content="Which one?"), Message(role="assistant", content=MARKER)
    try:
        whole = rendered(tokenizer, [asked, answered, Message(role="user", content=request)], asks=True)
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"reward.extra: critique: the chat template refuses a turn behind an answer: {error}"
        ) from error
    close, behind = closing(tokenizer, [asked]), whole.rpartition(MARKER)[2]
    if not behind.startswith(close) or request not in behind:
        raise UserError(
            "reward.extra: critique: the chat template writes an answer otherwise once a turn follows, so nothing can be asked "
            "about it as it was read; take a model whose template writes all turns alike."
        )
    return encode(tokenizer, [behind.removeprefix(close)], conversational=True)[0]


def room_before_critique(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, tokens: int) -> int | None:
    """Return how many tokens of prompt and answer a model reads where a critique of so many tokens, and what asks for it, follow.

    None where a model's configuration does not say how much it reads.
    """
    positions = context_length(config)
    if positions is None:
        return None
    return int(min(positions, tokenizer.model_max_length)) - len(request_ids(tokenizer)) - tokens


def critique_ids(
    tokenizer: PreTrainedTokenizerBase, critiques: Sequence[str], ended: Sequence[bool]
) -> list[list[int]]:
    """Return the ids of critiques; those that came to their end have the end token, once. Typed special tokens are words."""
    ends = end_texts(tokenizer)
    words = [as_words(tokenizer, without_ends(critique, ends)) for critique in critiques]
    rows = encode(tokenizer, words, conversational=True) if words else []
    return [row + [tokenizer.eos_token_id] * is_whole for row, is_whole in zip(rows, ended, strict=True)]


def writer_on(model: PreTrainedModel | PeftModel, language_head: PreTrainedModel) -> PreTrainedModel:
    """Return a causal model that writes with a classifier's own decoder; nothing of that is copied.

    Its output layer becomes a part of the classifier, under the name that it has in the causal model: it is moved, converted
    and saved with the classifier, and the saved folder can be opened as either. It has weights of its own, also where it shared
    those of the embeddings. It is trained with a whole model; beside an adapter it stays as it is.

    Args:
        language_head: a causal model of the same architecture, of which the output layer is taken (`rlhf.models.heads`).

    Raises:
        UserError: the output layer lies deeper in the model.
    """
    inner, writer = _inner(model), cast(Any, language_head)
    setattr(writer, writer.base_model_prefix, getattr(inner, inner.base_model_prefix))
    layer = writer.get_output_embeddings()
    name = next((name for name, child in writer.named_children() if child is layer), None)
    if name is None:
        raise UserError(
            f"reward.extra: critique: the output layer of a {type(writer).__name__} has no place of its own; take another model."
        )
    setattr(inner, name, layer.requires_grad_(not isinstance(model, PeftModel)))
    for config in (inner.config, inner.config.get_text_config(), writer.config):
        config.tie_word_embeddings = False
    return language_head


def load_writer(folder: str | Path, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return what writes the critiques of a reward model that was loaded from a folder, frozen.

    The output layer of a whole model lies in the folder, that of an adapter in its base.
    """
    source = find_source(folder)
    with warnings.catch_warnings():  # a causal model has no place for the reward head, which is read elsewhere
        warnings.filterwarnings("ignore", message=".*has no place for score")
        head = language_head(source.base, model_settings({"dtype": "auto"}))
    return writer_on(model, head).eval().requires_grad_(False)


def drop_output_layer(model: PreTrainedModel | PeftModel) -> None:
    """Take the output layer that `writer_on` gave a classifier away again; others have none."""
    inner = _inner(model)
    vocabulary = inner.config.get_text_config().vocab_size
    for name, child in list(inner.named_children()):
        if isinstance(child, nn.Linear) and child.out_features == vocabulary:
            delattr(inner, name)


def _inner(model: nn.Module) -> Any:
    """Return a classifier without an adapter's wrapper."""
    return model.base_model.model if isinstance(model, PeftModel) else model


@torch.no_grad()
def write_critiques(
    writer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    tokens: int,
    sample: int | None = None,
    batch_size: int = 64,
    label: str | None = None,
) -> Critiques:
    """Write a critique behind each row: the likeliest one, token by token, or a sample at temperature 1.

    A sample is a function of its row and number, whatever else is in the batch, and so is all that is made of it.

    Args:
        writer: in evaluation mode.
        rows: ids of prompt, answer and request.
        tokens: a critique is cut after so many; it did not end then.
        sample: the number of the sample; None for the likeliest critique.
        label: what people know this work by; shows how far it is.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=[end], pad_token_id=pad, use_cache=True
    )

    def write(batch: list[int]) -> Iterator[list[int]]:
        ids, mask = (x.to(writer.device) for x in pad_left([rows[i] for i in batch], pad))
        noise = [] if sample is None else [SampleNoise([rows[i] for i in batch], sample)]
        with without_declared_settings(writer):
            written: Any = writer.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList(noise),
            )
        for row in written[:, ids.shape[1] :].tolist():
            yield row[: row.index(end) + 1] if end in row else row[:tokens]

    lengths = [len(row) + tokens for row in rows]
    batches = batches_by_length(lengths, batch_size, longest_first=True, most_tokens=TOKENS_TOGETHER)
    critiques = run_batches(write, batches, label=label)
    return Critiques(critiques, [row[-1:] == [end] for row in critiques])


class SampleNoise(LogitsProcessor):
    """Adds to each row's log-probabilities the noise under which the largest is a sample, drawn from the row's own ids.

    Args:
        rows: what the critiques are written behind.
        sample: another number gives other samples.
    """

    def __init__(self, rows: Sequence[Sequence[int]], sample: int):
        self.generators = [torch.Generator().manual_seed(_seed(row, sample)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [b, v] with noise."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=draw) for draw in self.generators])
        return scores.float() + gumbel(uniform).to(scores.device)


def _seed(row: Sequence[int], sample: int) -> int:
    """Return a seed that is the same in every process.

    >>> _seed([1, 2], 0) == _seed([1, 2], 0), _seed([1, 2], 0) == _seed([1, 2], 1)
    (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr((list(row), sample)).encode()).digest()[:7], "big")
