"""Golden texts and their scores, which travel with a reward model: whoever serves it can be asked for the same numbers."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Message, Messages, Prompt
from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.invariants.scores import score_tolerance
from rlhf.models.critiques import CritiqueForm
from rlhf.models.text import answer_text, encode, encode_answers
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.model import Network, RewardModel
from rlhf.versions import version_of

CERTIFICATE = "certificate.json"
# In the order of their precision; half the distance of 1 to the next number.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Times the rounding error that was measured: other kernels add up in another order, and make other errors of that size.
TOLERATED = 3.0
# Of the largest score in size, at least of 1: what float32 is promised to agree to, whatever its errors.
FLOOR = 1e-5
LONG = 300  # tokens of the long text, where the model reads as many
PACKAGES = ("rlhf-pipeline", "torch", "transformers", "tokenizers")
SENTENCE = "In year {} the river rose by {} feet, the bridge held, and the market moved up the hill."


class GoldenText(NamedTuple):
    """A conversation whose last turn is scored.

    `ended` says whether that turn came to its end: the text of one that was cut off has no end token.
    """

    name: str
    messages: Messages
    ended: bool = True


class Golden(TypedDict):
    """A golden text as a reward model read it, and its score.

    `text` is what the chat template writes, `ids` what was read. `as_rendered` says whether a program that tokenises the text
    reads the same ids: where special tokens that a person typed are words to the model, other programs can't know that.
    `score` was computed by itself, without padding.
    """

    name: str
    messages: Messages
    ended: bool
    text: str
    ids: list[int]
    as_rendered: bool
    score: float


class Certificate(TypedDict):
    """What `certificate.json` holds.

    `dtype` is that of the saved weights, `computed_in` that in which the scores were computed: float32, but for weights that
    can't be converted. `tolerance` says, for each dtype, how far the answers of a correct server that computes in it may lie from
    the scores, as a root mean square.
    `critiques` says how a model that writes critiques is asked for them: `ids` and `text` are then what stands before.
    `left_out` names the golden texts that this model can't read, with the reason. A model that is not `conversational` reads
    the first turn and the last one as one text.
    """

    conversational: bool
    dtype: str
    computed_in: str
    tolerance: dict[str, float]
    versions: dict[str, str]
    left_out: dict[str, str]
    golden: list[Golden]
    critiques: NotRequired[CritiqueForm]


def certify(reward: RewardModel) -> Certificate:
    """Score the golden texts with a reward model, and measure how far rounding moves their scores.

    The tolerance of bfloat16 is 3 times the root mean square of what it changes on these very texts (without the long one, which
    takes longest); those of float16 and float32 are this times the ratio of the unit roundoffs (2^-11 and 2^-24 to 2^-8), to
    which rounding errors are proportional. To each are added 1e-5 of the largest score.

    Raises:
        UserError: scores are not finite numbers; the model can read none of the texts.
    """
    # 1. The texts that this model can read.
    texts, left_out = readable_texts(reward)
    if not texts:
        raise UserError("certify: this model can read none of the golden texts; it reads too few tokens.")
    dtype = _name(reward.model.dtype)

    # 2. Their scores, each by itself, and their rounding errors.
    with computed_in(reward.model, torch.float32) as exact:
        scores = scores_alone(reward, texts)
    if not all(map(math.isfinite, scores)):
        raise UserError(
            "certify: the scores of golden texts are not finite numbers; the weights or their dtype are bad."
        )
    largest = max(map(abs, scores)) or 1.0
    if exact:
        with computed_in(reward.model, torch.bfloat16):
            measured = [i for i, text in enumerate(texts) if text.name != "long" or len(texts) == 1]
            rounded = scores_alone(reward, [texts[i] for i in measured])
        errors = [x - scores[i] for x, i in zip(rounded, measured, strict=True)]
        error = math.sqrt(sum(x * x for x in errors) / len(errors))
        tolerance = {x: TOLERATED * error * u / ROUNDOFF["bfloat16"] + FLOOR * largest for x, u in ROUNDOFF.items()}
    else:
        tolerance = {x: largest * score_tolerance(getattr(torch, x)) for x in ROUNDOFF}

    # 3. What was read, token by token.
    golden = []
    for text, score in zip(texts, scores, strict=True):
        whole = _whole(reward.tokenizer, text, conversational=reward.conversational)
        ids = _ids(reward.tokenizer, text, conversational=reward.conversational)
        (plain_ids,) = encode(reward.tokenizer, [whole], conversational=reward.conversational)
        golden.append(
            Golden(
                name=text.name,
                messages=text.messages,
                ended=text.ended,
                text=whole,
                ids=ids,
                as_rendered=ids == plain_ids,
                score=score,
            )
        )
    certificate = Certificate(
        conversational=reward.conversational,
        dtype=dtype,
        computed_in="float32" if exact else dtype,
        tolerance=tolerance,
        versions={name: version_of(name) for name in PACKAGES},
        left_out=left_out,
        golden=golden,
    )
    if isinstance(reward, CritiqueRewardModel):
        certificate["critiques"] = reward.form
    return certificate


def readable_texts(reward: RewardModel) -> tuple[list[GoldenText], dict[str, str]]:
    """Return the golden texts that a model can read, and why it can't read the others."""
    tokenizer, conversational = reward.tokenizer, reward.conversational
    readable: list[GoldenText] = []
    left_out: dict[str, str] = {}
    for text in golden_texts(tokenizer, tokens=min(LONG, reward.max_length * 3 // 4)):
        if not conversational and len(text.messages) > 2:
            left_out[text.name] = "the model reads plain text, which has no turns"
            continue
        try:
            length = len(_ids(tokenizer, text, conversational=conversational))
        except Exception as error:  # a chat template may raise anything
            (reason, *_) = [*str(error).splitlines(), type(error).__name__]
            left_out[text.name] = f"the chat template refuses it: {reason}"
            continue
        if length > reward.max_length:
            left_out[text.name] = f"it has {length} tokens, and the model reads {reward.max_length}"
        else:
            readable.append(text)
    return readable, left_out


def golden_texts(tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> list[GoldenText]:
    """Return the golden texts, which hold what servers get wrong.

    Args:
        tokenizer: its own special tokens stand in one of the texts, as a person may type them.
        tokens: about how many the long one has.
    """
    typed = " ".join(dict.fromkeys(x for x in (tokenizer.bos_token, tokenizer.eos_token) if x))
    size = len(tokenizer(SENTENCE.format(1900, 10), add_special_tokens=False)["input_ids"])
    story = " ".join(SENTENCE.format(1900 + i, 10 + 7 * i % 20) for i in range(max(1, (tokens - 30) // (size + 2))))
    river = "Name a river."
    return [
        GoldenText("short", _turns(river, "The Danube.")),
        GoldenText("short, worse", _turns(river, "I would rather not.")),
        GoldenText("one word", _turns("Is 7 a prime?", "Yes")),
        GoldenText("long", _turns("Write the story of a town.", story)),
        GoldenText("several turns", _turns("Hi!", "Hello.", "What is 2 + 3?", "5, I think.")),
        GoldenText("system turn", [Message(role="system", content="Be brief."), *_turns("Why rain?", "Clouds cool.")]),
        GoldenText("unicode", _turns("¿Qué es “ß”? 日本", "Eszett: ß, e\u0301, 👩‍🚀.")),
        GoldenText("typed special tokens", _turns(f"What is {typed} for?", f"So: {typed} ends it.")),
        GoldenText("white space", _turns(" Two\n\nlines?  ", "One,\n  two.\n")),
        GoldenText("cut off", _turns("List three fruits.", "Apple, pear and"), ended=False),
        GoldenText("cut off at once", _turns("Who wrote Faust?", "It"), ended=False),
    ]


def _turns(*contents: str) -> Messages:
    return [Message(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents)]


def prompt_of(text: GoldenText | Golden, *, conversational: bool) -> Prompt:
    """Return what stands before the turn that is scored: messages, or plain text where the model reads that."""
    messages = text["messages"] if isinstance(text, dict) else text.messages
    return messages[:-1] if conversational else messages[0]["content"]


def _whole(tokenizer: PreTrainedTokenizerBase, text: GoldenText, *, conversational: bool) -> str:
    """Return the text that the model reads."""
    prompt = prompt_of(text, conversational=conversational)
    return answer_text(tokenizer, prompt, text.messages[-1]["content"], ended=text.ended)


def _ids(tokenizer: PreTrainedTokenizerBase, text: GoldenText, *, conversational: bool) -> list[int]:
    """Return the ids that the model reads."""
    prompt = prompt_of(text, conversational=conversational)
    (ids,), _ = encode_answers(tokenizer, [prompt], [text.messages[-1]["content"]], ended=[text.ended])
    return ids


def scores_alone(reward: RewardModel, texts: Sequence[GoldenText]) -> list[float]:
    """Return the raw score of each text, each in a forward of its own."""
    return [
        reward.score(
            [prompt_of(text, conversational=reward.conversational)], [text.messages[-1]["content"]], ended=[text.ended]
        ).item()
        for text in texts
    ]


@contextmanager
def computed_in(model: Network, dtype: torch.dtype) -> Iterator[bool]:
    """Convert a model's parameters for a while; the value is whether it could be done.

    Quantised weights stay as they are, and so does a model for whose copy there is no memory. Buffers, such as the
    frequencies of rotary positions, keep their dtype, as they do where a checkpoint is loaded in another one.
    """
    parameters = list(model.parameters())
    originals = [parameter.data for parameter in parameters]
    able = all(parameter.is_floating_point() for parameter in parameters)
    try:
        if able:
            try:
                for parameter in parameters:
                    parameter.data = parameter.data.to(dtype)
            except torch.OutOfMemoryError:
                able = False
                _restore(parameters, originals)
        yield able
    finally:
        _restore(parameters, originals)


def _restore(parameters: Sequence[torch.nn.Parameter], originals: Sequence[torch.Tensor]) -> None:
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.data = original


def write_certificate(file: Path, certificate: Certificate) -> None:
    """Write a certificate, readable by people too."""
    write_text(file, json.dumps(certificate, indent=1, ensure_ascii=False) + "\n")


def read_certificate(file: Path) -> Certificate:
    """Read a certificate.

    Raises:
        UserError: it is damaged, or holds no golden texts.
    """
    try:
        certificate: Certificate = json.loads(file.read_text(encoding="utf-8"))
        missing = sorted(Certificate.__required_keys__ - set(certificate))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: can't be read ({error}); delete it and run `rlhf certify` again.") from error
    if missing:
        raise UserError(f"{file}: no {', '.join(missing)}; delete it and run `rlhf certify` again.")
    return certificate


def check_certificate(reward: RewardModel, certificate: Certificate, *, name: str | Path) -> list[float]:
    """Compare a reward model as it is now with its certificate; return its scores of the golden texts.

    Raises:
        UserError: other texts are read, or the scores differ by more than rounding.
    """
    texts = [GoldenText(x["name"], x["messages"], x["ended"]) for x in certificate["golden"]]
    remedy = (
        f"it is not the model that was certified. If it should be, delete {CERTIFICATE} and run `rlhf certify` again."
    )
    for text, golden in zip(texts, certificate["golden"], strict=True):
        if _whole(reward.tokenizer, text, conversational=certificate["conversational"]) != golden["text"]:
            raise UserError(f"{name}: the golden text {text.name!r} is now another one to this model; {remedy}")
    with computed_in(reward.model, torch.float32) as exact:
        scores = scores_alone(reward, texts)
    tolerance = certificate["tolerance"]["float32" if exact else certificate["computed_in"]]
    worst = max(abs(score - golden["score"]) for score, golden in zip(scores, certificate["golden"], strict=True))
    if not worst <= tolerance:
        raise UserError(
            f"{name}: golden scores differ by {worst:.3g} from its {CERTIFICATE}, allowed {tolerance:.3g}; {remedy}"
        )
    return scores


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
