"""Write the lab's files in ordinary Hugging Face formats: a base checkpoint, demonstrations, pairs and prompts."""

import random
from dataclasses import dataclass
from pathlib import Path

from rlhf.data.rows import Demonstration, Message, Messages, Pair, completion
from rlhf.files import write_jsonl
from rlhf.lab.annotators import Label, flip_rate, label_pair, simulate_label
from rlhf.lab.world import (
    DANGEROUS,
    HARMLESS,
    HELD_OUT_DANGEROUS,
    HELD_OUT_HARMLESS,
    all_prompts,
    parse_request,
    write_answer,
)
from rlhf.models.scratch import build_base
from rlhf.models.text import plain

HELD_OUT_PROMPTS = 640


@dataclass(frozen=True)
class LabSettings:
    """Sizes of a lab, and who labels its training pairs (as `simulate_label`); the world itself has no options."""

    demonstrations: int = 8000
    pairs: int = 6000
    test_pairs: int = 1000
    hidden_size: int = 128
    num_hidden_layers: int = 3
    annotators: str = "crowd"
    flip_rate: float = 0.0
    seed: int = 0


def build_lab(folder: Path, settings: LabSettings) -> dict[str, float]:
    """Build the world's files; the same settings give the same bytes.

    Writes `model/` (a randomly initialised Llama with tokenizer and chat template) and under `data/`: `sft.jsonl`,
    `preferences.jsonl`, `prompts.jsonl`, `test.jsonl`, `test_prompts.jsonl`, and `shift_test.jsonl`,
    `shift_prompts.jsonl` about kinds that no annotator saw.

    Returns:
        `flip_rate` and `annotator_agreement` of the training labels.
    """
    # 1. Prompts, split once: what is held out is never demonstrated, compared or practised on.
    rng = random.Random(settings.seed)
    prompts = all_prompts([*HARMLESS, *DANGEROUS])
    rng.shuffle(prompts)
    held_out, train = prompts[: 2 * HELD_OUT_PROMPTS], prompts[2 * HELD_OUT_PROMPTS :]
    test_prompts, test_pair_prompts = held_out[:HELD_OUT_PROMPTS], held_out[HELD_OUT_PROMPTS:]
    shift_prompts = all_prompts([*HELD_OUT_HARMLESS, *HELD_OUT_DANGEROUS])
    rng.shuffle(shift_prompts)
    shift_train, shift_test = shift_prompts[HELD_OUT_PROMPTS:], shift_prompts[:HELD_OUT_PROMPTS]

    # 2. Demonstrations of mixed quality, about all kinds: the writers know what the annotators never see.
    demonstration_prompts = train + shift_train
    demonstrations: list[Demonstration] = []
    for _ in range(settings.demonstrations):
        prompt = rng.choice(demonstration_prompts)
        demonstrations.append({"prompt": _user(prompt), "completion": _assistant(write_answer(prompt, rng))})

    # 3. Pairs of answers by the same writers, labelled by the crowd.
    labels = _label(settings.pairs, train, rng)
    if settings.annotators == "exact" or settings.flip_rate > 0:
        labels = _label_again(labels, settings)
    test_labels = _label(settings.test_pairs, test_pair_prompts, rng)
    shift_labels = _label(settings.test_pairs, shift_test, rng)

    # 4. Files.
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "sft.jsonl", demonstrations)
    write_jsonl(data / "preferences.jsonl", [_pair(label) for label in labels])
    write_jsonl(data / "test.jsonl", [_pair(label) for label in test_labels])
    write_jsonl(data / "shift_test.jsonl", [_pair(label) for label in shift_labels])
    write_jsonl(data / "prompts.jsonl", [{"prompt": _user(prompt)} for prompt in train])
    write_jsonl(data / "test_prompts.jsonl", [{"prompt": _user(prompt)} for prompt in test_prompts])
    write_jsonl(data / "shift_prompts.jsonl", [{"prompt": _user(prompt)} for prompt in shift_test])
    build_base(
        folder / "model",
        (plain(row["prompt"]) + "\n" + completion(row) for row in demonstrations),
        architecture="llama",
        settings={
            "hidden_size": settings.hidden_size,
            "intermediate_size": 2 * settings.hidden_size,
            "num_hidden_layers": settings.num_hidden_layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "vocab_size": 900,
        },
        seed=settings.seed,
    )
    agreement = sum(label.second_opinion_agrees for label in labels) / len(labels)
    return {"flip_rate": flip_rate(labels), "annotator_agreement": agreement}


def _label(count: int, prompts: list[str], rng: random.Random) -> list[Label]:
    """Let writers answer random prompts twice, and the crowd label the two answers where they differ."""
    labels: list[Label] = []
    while len(labels) < count:
        prompt = rng.choice(prompts)
        first, second = write_answer(prompt, rng), write_answer(prompt, rng)
        if first != second:
            labels.append(label_pair(prompt, first, second, rng))
    return labels


def _label_again(labels: list[Label], settings: LabSettings) -> list[Label]:
    """Label the same pairs by other annotators; those that the true reward calls equal stay as the crowd had them."""
    rng = random.Random(settings.seed + 1)
    relabelled = []
    for label in labels:
        better, name = simulate_label(
            label.prompt, label.chosen, label.rejected, rng, settings.annotators, settings.flip_rate
        )
        flipped = better == "second"
        chosen, rejected = (label.rejected, label.chosen) if flipped else (label.chosen, label.rejected)
        relabelled.append(Label(label.prompt, chosen, rejected, name, label.second_opinion_agrees != flipped))
    return relabelled


def _user(content: str) -> Messages:
    return [Message(role="user", content=content)]


def _assistant(content: str) -> Messages:
    return [Message(role="assistant", content=content)]


def _pair(label: Label) -> Pair:
    return {
        "prompt": _user(label.prompt),
        "chosen": _assistant(label.chosen),
        "rejected": _assistant(label.rejected),
        "annotator": label.annotator,
        "source": "harmless" if parse_request(label.prompt).is_dangerous else "helpful",
    }
