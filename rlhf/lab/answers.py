"""Answers of a language model for the lab, in blocks that are kept, so that an interrupted stage goes on where it was."""

import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf.data.rows import Message, Prompt
from rlhf.files import json_lines, read_jsonl, write_text
from rlhf.lab.build import Answers
from rlhf.models.generate import Engine, sample_texts
from rlhf.progress import duration

BLOCK = 128  # answers that are sampled, kept and reported together


def answers_of_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_prompt_length: int | None,
    engine: Engine = "transformers",
    seed: int,
    keep: Path,
    say: Callable[[str], None],
) -> Answers:
    """Return what samples a model's answers, a block at a time.

    Each block has a seed of its own and is written when it is whole; the same calls in the same order read it back. vLLM, which
    takes longer to start than to answer a block, answers all prompts of a call as one.

    Args:
        model: a causal model in evaluation mode.
        batch_size: answers that are sampled at once.
        max_new_tokens, temperature, max_prompt_length: as `rlhf.models.generate.sample_texts` takes them.
        engine: what samples.
        keep: the folder of the blocks.
        say: is told after each block that was sampled.
    """
    keep.mkdir(parents=True, exist_ok=True)
    numbers = count()

    def answer(prompts: Sequence[str]) -> list[tuple[str, bool]]:
        answers: list[tuple[str, bool]] = []
        size = BLOCK if engine == "transformers" else len(prompts)
        for start in range(0, len(prompts), size):
            block, number = prompts[start : start + size], next(numbers)
            file, began = keep / f"answers-{number}.jsonl", time.monotonic()
            if not file.is_file():
                set_seed(seed * 100_003 + number)
                turns: list[Prompt] = [[Message(role="user", content=prompt)] for prompt in block]
                sampled, ended = sample_texts(
                    model,
                    tokenizer,
                    turns,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    max_prompt_length=max_prompt_length,
                    engine=engine,
                    label="lab: answers",
                )
                rows = [{"completion": text, "ended": end} for text, end in zip(sampled, ended, strict=True)]
                write_text(file, json_lines(rows))
                done, seconds = start + len(block), time.monotonic() - began
                rest = seconds / len(block) * (len(prompts) - done)
                say(f"lab: {done} of {len(prompts)} answers sampled; about {duration(rest)} to go with these.")
            answers += [(row["completion"], row["ended"]) for row in read_jsonl(file)]
        return answers

    return answer


def stand_in_answers(tokens: int) -> Answers:
    """Return what gives a different answer every time, each of about so many tokens, and samples nothing.

    For who needs the sizes of the data, or their form, before any model runs.
    """
    numbers = count()
    return lambda prompts: [(f"{next(numbers)}" + " the" * (tokens - 2), True) for _ in prompts]
