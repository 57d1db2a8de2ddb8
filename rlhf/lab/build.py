"""Write the lab's files in ordinary Hugging Face formats: a base checkpoint, demonstrations, pairs and prompts."""

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rlhf.data.rows import Demonstration, Message, Messages, Pair, assistant_turn, completion, group_key
from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.lab.annotators import Label, flip_rate, label_pair, simulate_label, simulate_ratings
from rlhf.lab.instructions import write_prompts
from rlhf.lab.world import (
    DANGEROUS,
    HARMLESS,
    HELD_OUT_DANGEROUS,
    HELD_OUT_HARMLESS,
    all_prompts,
    parts_of,
    write_answer,
)
from rlhf.lab.worlds import INSTRUCTIONS, LISTS, World
from rlhf.models.scratch import build_base
from rlhf.models.text import plain

RATED = "rated.jsonl"
CONTEXT = 128  # tokens that the model of the world of lists reads
HELD_OUT_PROMPTS = 640
INSTRUCTION_PROMPTS = 2000  # training prompts of the world of instructions
FEWEST_DRAWN = 16  # prompts that are answered at once, also where fewer pairs are missing

# Prompts → an answer to each, and whether it came to its end.
Answers = Callable[[Sequence[str]], list[tuple[str, bool]]]


@dataclass(frozen=True)
class LabSettings:
    """Sizes of a lab, and who labels its training pairs (as `simulate_label`); the worlds themselves have no options.

    `demonstrations` and the sizes of the model are those of the world of lists; `answers`, to each prompt of the training pairs, is
    of the world of instructions; `critiques` is whether pairs have some.
    """

    demonstrations: int = 8000
    pairs: int = 6000
    answers: int = 2
    test_pairs: int = 1000
    hidden_size: int = 128
    num_hidden_layers: int = 3
    annotators: str = "crowd"
    flip_rate: float = 0.0
    critic_error_rate: float | None = None
    critiques: bool = False
    seed: int = 0


def build_lab(folder: Path, settings: LabSettings) -> dict[str, float]:
    """Build the files of the world of lists; the same settings give the same bytes.

    Writes `model/` (a randomly initialised Llama with tokenizer and chat template) and under `data/`: `sft.jsonl`,
    `preferences.jsonl`, `rated.jsonl` (the same pairs, each answer rated by whoever compared them), `prompts.jsonl`,
    `test.jsonl`, `test_prompts.jsonl`, and `shift_test.jsonl`, `shift_prompts.jsonl` about kinds that no annotator was asked
    about (`rlhf.lab.world`).

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

    # 2. Demonstrations of mixed quality, about all kinds: the writers know what the annotators are never asked.
    demonstration_prompts = train + shift_train
    demonstrations: list[Demonstration] = []
    for _ in range(settings.demonstrations):
        prompt = rng.choice(demonstration_prompts)
        demonstrations.append({"prompt": _user(prompt), "completion": assistant_turn(write_answer(prompt, rng))})

    # 3. Pairs of answers by the same writers, labelled by the crowd.
    labels = _as_settings_say(_label(settings.pairs, train, rng), settings, LISTS)
    test_labels = _label(settings.test_pairs, test_pair_prompts, rng)
    shift_labels = _label(settings.test_pairs, shift_test, rng)

    # 4. Files.
    prompts_by_file = {"prompts": train, "test_prompts": test_prompts, "shift_prompts": shift_test}
    labels_by_file = {"preferences": labels, "test": test_labels, "shift_test": shift_labels}
    data = _write_data(folder, prompts_by_file, labels_by_file, LISTS, critiques=settings.critiques)
    texts = [plain(row["prompt"]) + "\n" + completion(row) for row in demonstrations]
    if settings.critiques:  # their words are words of the tokenizer too
        texts += [LISTS.critique(label.prompt, label.chosen) for label in labels]
    write_jsonl(data / "sft.jsonl", demonstrations)
    ratings = random.Random(f"{settings.seed} ratings")
    write_jsonl(data / RATED, [_rated(label, ratings) for label in labels])
    build_base(
        folder / "model",
        texts,
        architecture="llama",
        settings={
            "hidden_size": settings.hidden_size,
            "intermediate_size": 2 * settings.hidden_size,
            "num_hidden_layers": settings.num_hidden_layers,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "vocab_size": 900,
        },
        seed=settings.seed,
    )
    return _facts(labels, LISTS)


def build_instructions(folder: Path, settings: LabSettings, answers: Answers) -> dict[str, float]:
    """Build the files of the world of instructions, whose answers a language model gives.

    Writes under `data/`: `preferences.jsonl`, `prompts.jsonl`, `test.jsonl`, `test_prompts.jsonl`, and `shift_test.jsonl`,
    `shift_prompts.jsonl` about topics and with demands that no annotator saw. Nobody writes demonstrations: the model that
    answers here takes SFT's place.

    Args:
        settings: with more than two `answers` a prompt, all pairs of them are labelled, each by another pair of annotators.
        answers: samples one answer to each of some prompts; two answers to the same prompt should differ.

    Returns:
        `flip_rate` and `annotator_agreement` of the training labels.

    Raises:
        UserError: the model's two answers are the same, whatever the prompt.
    """
    # 1. Prompts, split once: what is held out is never compared or practised on.
    rng = random.Random(settings.seed)
    prompts = write_prompts(INSTRUCTION_PROMPTS + 2 * HELD_OUT_PROMPTS, rng)
    test_prompts, test_pair_prompts = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS : 2 * HELD_OUT_PROMPTS]
    train = prompts[2 * HELD_OUT_PROMPTS :]
    shift_test = write_prompts(HELD_OUT_PROMPTS, rng, shifted=True)

    # 2. Pairs of the model's answers, labelled by the crowd.
    cut_off: set[tuple[str, str]] = set()
    labels = _label_answers(settings.pairs, train, answers, rng, cut_off, each=settings.answers)
    test_labels = _label_answers(settings.test_pairs, test_pair_prompts, answers, rng, cut_off)
    shift_labels = _label_answers(settings.test_pairs, shift_test, answers, rng, cut_off)
    labels = _as_settings_say(labels, settings, INSTRUCTIONS)

    # 3. Files.
    prompts_by_file = {"prompts": train, "test_prompts": test_prompts, "shift_prompts": shift_test}
    labels_by_file = {"preferences": labels, "test": test_labels, "shift_test": shift_labels}
    grouped = ["preferences"] if settings.answers > 2 else []
    _write_data(folder, prompts_by_file, labels_by_file, INSTRUCTIONS, grouped, cut_off, critiques=settings.critiques)
    return _facts(labels, INSTRUCTIONS)


def _label_answers(
    count: int,
    prompts: list[str],
    answers: Answers,
    rng: random.Random,
    cut_off: set[tuple[str, str]],
    *,
    each: int = 2,
) -> list[Label]:
    """Let a model answer random prompts several times, and the crowd label every two answers to one that differ.

    Args:
        cut_off: takes up (prompt, answer) of the answers that did not come to their end.
        each: answers to a prompt.

    Raises:
        UserError: the model's answers are the same, whatever the prompt.
    """
    labels: list[Label] = []
    while len(labels) < count:
        missing = math.ceil((count - len(labels)) / math.comb(each, 2))
        drawn = [rng.choice(prompts) for _ in range(max(missing, FEWEST_DRAWN))]
        repeated = [prompt for prompt in drawn for _ in range(each)]
        answered = answers(repeated)
        texts = [text for text, _ in answered]
        cut_off |= {(prompt, text) for prompt, (text, ended) in zip(repeated, answered, strict=True) if not ended}
        before = len(labels)
        for start, prompt in zip(range(0, len(texts), each), drawn, strict=True):
            for first, second in combinations(texts[start : start + each], 2):
                if first.strip() != second.strip() and len(labels) < count:
                    labels.append(label_pair(prompt, first, second, rng, INSTRUCTIONS))
        if len(labels) == before:
            raise UserError(
                f"lab: the model gave the same answer every time to each of {len(drawn)} prompts, so there is nothing to compare; "
                "take a backbone.model whose answers differ."
            )
    return labels


def _label(count: int, prompts: list[str], rng: random.Random) -> list[Label]:
    """Let writers answer random prompts twice, and the crowd label the two answers where they differ."""
    labels: list[Label] = []
    while len(labels) < count:
        prompt = rng.choice(prompts)
        first, second = write_answer(prompt, rng), write_answer(prompt, rng)
        if first != second:
            labels.append(label_pair(prompt, first, second, rng))
    return labels


def _as_settings_say(labels: list[Label], settings: LabSettings, world: World) -> list[Label]:
    """Label the same pairs by the annotators of the settings, where these are not the crowd as it is.

    Pairs that the true reward calls equal stay as the crowd had them.
    """
    if settings.annotators == "crowd" and settings.flip_rate == 0 and settings.critic_error_rate is None:
        return labels
    rng = random.Random(settings.seed + 1)
    relabelled = []
    for label in labels:
        who = (rng, settings.annotators, settings.flip_rate, world)
        better, name = simulate_label(
            label.prompt, label.chosen, label.rejected, *who, critic_error_rate=settings.critic_error_rate
        )
        flipped = better == "second"
        chosen, rejected = (label.rejected, label.chosen) if flipped else (label.chosen, label.rejected)
        relabelled.append(Label(label.prompt, chosen, rejected, name, label.second_opinion_agrees != flipped))
    return relabelled


def _write_data(
    folder: Path,
    prompts: dict[str, list[str]],
    labels: dict[str, list[Label]],
    world: World,
    grouped: Collection[str] = (),
    cut_off: Collection[tuple[str, str]] = (),
    *,
    critiques: bool = False,
) -> Path:
    """Write files of prompts and of labelled pairs, by their names; return the folder that they are in.

    Args:
        grouped: the files of pairs that have several pairs of the same answers.
        cut_off: (prompt, answer) of the answers that did not come to their end.
        critiques: whether pairs have critiques of both answers.
    """
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, texts in prompts.items():
        write_jsonl(data / f"{name}.jsonl", [{"prompt": _user(text)} for text in texts])
    for name, rows in labels.items():
        write_jsonl(
            data / f"{name}.jsonl",
            [_pair(label, world, cut_off, grouped=name in grouped, critiques=critiques) for label in rows],
        )
    return data


def _facts(labels: list[Label], world: World) -> dict[str, float]:
    """Return the share of wrong labels, and of those that a second annotator gave too."""
    agreement = sum(label.second_opinion_agrees for label in labels) / len(labels)
    return {"flip_rate": flip_rate(labels, world), "annotator_agreement": agreement}


def _user(content: str) -> Messages:
    return [Message(role="user", content=content)]


def _pair(label: Label, world: World, cut_off: Collection[tuple[str, str]], *, grouped: bool, critiques: bool) -> Pair:
    """Return a labelled pair as a row; with its `group`, where several pairs are of the same answers, and with critiques."""
    chosen, rejected = (
        assistant_turn(text, ended=(label.prompt, text) not in cut_off) for text in (label.chosen, label.rejected)
    )
    pair: Pair = {
        "prompt": _user(label.prompt),
        "chosen": chosen,
        "rejected": rejected,
        "annotator": label.annotator,
        "source": "harmless" if world.is_dangerous(label.prompt) else "helpful",
    }
    if critiques:
        pair["critique_chosen"], pair["critique_rejected"] = (
            world.critique(label.prompt, text) for text in (label.chosen, label.rejected)
        )
    return {**pair, "group": group_key(pair["prompt"])} if grouped else pair


def _rated(label: Label, rng: random.Random) -> dict[str, object]:
    """Return a labelled pair as a ranking of two answers, with the ratings that its annotator gave each."""
    answers = [
        {
            "content": text,
            "rank": rank,
            "attributes": simulate_ratings(label.prompt, text, label.annotator, rng, parts_of),
        }
        for rank, text in ((1, label.chosen), (2, label.rejected))
    ]
    return {"prompt": _user(label.prompt), "responses": answers}
