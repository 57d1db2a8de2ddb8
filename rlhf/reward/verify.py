"""What is wrong with served scores, told from numbers alone: the fault is the one under which the model itself would say them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

# For each fault: what it is, and what to do. The keys stand in the JSON.
FAULTS = {
    "sigmoid": 'A sigmoid was put on the scores. Ask for raw scores (vLLM: "use_activation": false in the request, or '
    "problem_type: regression in the model's config.json).",
    "softmax": 'Every text gets 1: a softmax over one label. Ask for raw scores (vLLM: "use_activation": false in the request, '
    "or problem_type: regression in the model's config.json).",
    "scaled": "The scores were scaled and shifted. Switch the server's normalisation off.",
    "critique_missing": "The score is read at the end of the answer, and no critique was written before. A server with one forward "
    "a text can't score with this model; serve it with `rlhf serve`.",
    "end_token_missing": "The end token is missing, or the score is read before it, as where the padding id is the end token. "
    "Send the text as the model's chat template writes it, and compare pad_token_id with eos_token_id in config.json.",
    "end_token_doubled": "The end token stands there twice. The chat template writes it already; let nothing add another.",
    "end_token_added": "Answers that were cut off are scored as if they had ended. Send text without an end token as it is.",
    "begin_token_doubled": "The begin token stands there twice. The chat template writes it already; tokenise with "
    "add_special_tokens=False.",
    "begin_token_missing": "The begin token is missing. Tokenise as the model was trained: the text that is certified begins "
    "with it.",
    "wrong_token": "The score is read at the wrong token. It belongs to the last token of the text that is no padding.",
    "template_twice": "The chat template is applied twice. Send messages, or rendered text to an endpoint that does not render.",
    "template_missing": "The chat template is not applied. Render the conversation with the model's template before it is scored.",
    "template_added": "A chat template is applied, but the model was trained on plain text. Send prompt and answer as one text.",
    "some_texts": "Only some texts get other scores.",
    "constant": "Every text gets the same score: the server does not read the texts, or reads the score at a token that is "
    "always the same.",
    "not_finite": "Some scores are not finite numbers. The server's dtype can't hold them, or its weights are damaged.",
    "labels": "The server answers several numbers for a text: the head has more than one label, so it is not this model's.",
    "other_weights": "These are scores of other weights: another head or another base, or a text that no fault known here makes.",
    "order": "The answers are right but stand in another order than the texts.",
    "padding": "A text gets another score beside longer ones than alone. Check the padding side, the padding id and the attention "
    "mask; the score belongs to the last token that is no padding.",
    "precision": "The scores are right but for rounding errors larger than the expected dtype's.",
}
DTYPES = ("float32", "float16", "bfloat16")  # in the order of their precision
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# One difference may be so many times the root mean square that is allowed for all.
LARGEST = 2.5
# Explanations nearly as good as the best: they can't be told apart, and the first of them in the list is the likelier one.
ALIKE, SLACK = 2.0, 0.05


@dataclass(frozen=True)
class Hypothesis:
    """What the model itself says of each golden text under one fault; None where the fault leaves a text impossible."""

    fault: str
    detail: str
    scores: Sequence[float | None]


@dataclass(frozen=True)
class Answers:
    """What a server answered in one form.

    Attributes:
        form: such as "/classify with messages".
        rows: which of the golden texts it was asked for.
        alone: their scores, each from a request of its own.
        together: their scores from one request; None where the server takes one text a request.
    """

    form: str
    rows: Sequence[int]
    alone: Sequence[float]
    together: Sequence[float] | None = None


class Fault(TypedDict):
    """One fault, as it stands in the JSON.

    `detail` says how it shows, `form` where; `difference` is the root mean square between the answers and what the model
    itself says under this fault; `also` lists faults that explain the answers as well.
    """

    fault: str
    form: str
    sentence: str
    detail: str
    difference: float | None
    also: list[str]


@dataclass(frozen=True)
class _Explanation:
    """Scores that a server might give, with the faults under which it would; `slope` scales the tolerance."""

    faults: tuple[str, ...]
    detail: str
    differences: tuple[float, ...]
    slope: float = 1.0
    rounds: bool = False  # whether the values themselves are rounded, as those of a sigmoid near 1

    def ratio(self, tolerance: float, roundoff: float) -> float:
        """Return the size of the differences as a share of what is allowed: an explanation fits up to 1."""
        allowed = self.slope * tolerance + (roundoff if self.rounds else 0.0)
        return size_ratio(self.differences, allowed)


def size_ratio(differences: Sequence[float], tolerance: float) -> float:
    """Return how large differences are, as a share of what is allowed: of their root mean square or of the largest one.

    >>> size_ratio([0.1, 0.1], 0.2), size_ratio([0.0, 0.0, 0.0, 1.0], 0.4)
    (0.5, 1.25)
    """
    return max(root_mean_square(differences) / tolerance, max(map(abs, differences)) / (LARGEST * tolerance))


def root_mean_square(values: Sequence[float]) -> float:
    """Return the root mean square of values.

    >>> root_mean_square([3.0, -4.0, 0.0, 0.0])
    2.5
    """
    return math.sqrt(sum(value * value for value in values) / len(values))


def agree(answers: Answers, scores: Sequence[float], tolerance: float) -> bool:
    """Tell whether a server's answers, alone and together, are the model's scores up to rounding.

    Args:
        scores: of all golden texts.
        tolerance: of the dtype in which the server should compute.
    """
    for values in (answers.alone, answers.together):
        if values is None:
            continue
        if not all(map(math.isfinite, values)):
            return False
        if size_ratio([x - scores[i] for x, i in zip(values, answers.rows, strict=True)], tolerance) > 1:
            return False
    return True


def diagnose(
    answers: Answers,
    scores: Sequence[float],
    hypotheses: Sequence[Hypothesis],
    tolerances: Mapping[str, float],
    *,
    dtype: str,
    names: Sequence[str],
) -> list[Fault]:
    """Name what is wrong with a server's answers; an empty list if nothing is.

    Explanations are tried from the finest precision down, so that a fault that explains the answers exactly comes before
    right scores with large rounding errors.

    Args:
        scores: the model's of all golden texts, in float32.
        hypotheses: the likelier first.
        tolerances: by dtype, as a root mean square.
        dtype: in which the server should compute.
        names: of the golden texts, for sentences.
    """
    if not all(map(math.isfinite, [*answers.alone, *(answers.together or [])])):
        return [_fault("not_finite", answers)]

    # 1. What each text gets by itself.
    levels = DTYPES[DTYPES.index(dtype) :]
    faults, level = _explain(answers, scores, hypotheses, tolerances, levels=levels, names=names)

    # 2. What it gets beside others, compared with that.
    if answers.together is not None:
        differences = [x - y for x, y in zip(answers.together, answers.alone, strict=True)]
        allowed = 1.5 * tolerances[level]  # both have errors
        if size_ratio(differences, allowed) > 1:
            faults += _beside_others(answers, differences, allowed, tolerances, names)
    return faults


def _explain(
    answers: Answers,
    scores: Sequence[float],
    hypotheses: Sequence[Hypothesis],
    tolerances: Mapping[str, float],
    *,
    levels: Sequence[str],
    names: Sequence[str],
) -> tuple[list[Fault], str]:
    """Return the faults that explain the scores of single texts, and the dtype to whose precision they do."""
    right, *others = _explanations(answers, scores, hypotheses)
    for level in levels:
        bounds = tolerances[level], ROUNDOFF[level]
        coarse = [] if level == levels[0] else [_precision(answers, right, levels[0], level)]
        if right.ratio(*bounds) <= 1:
            return coarse, level
        fitting = [x for x in others if x.ratio(*bounds) <= 1 and _shows(x, right, bounds)]
        if fitting:
            best = min(x.ratio(*bounds) for x in fitting)
            alike = [x for x in fitting if x.ratio(*bounds) <= ALIKE * best + SLACK]
            also = list(dict.fromkeys(" + ".join(x.faults) for x in alike if x.faults != alike[0].faults))
            difference = root_mean_square(alike[0].differences)
            named = [_fault(x, answers, alike[0].detail, difference, also) for x in alike[0].faults]
            return named + ([_fault("precision", answers, f"as in {level}")] if coarse else []), level

    # Nothing explains all of them: perhaps most texts are right.
    difference = root_mean_square(right.differences)
    wrong = [abs(x) > LARGEST * tolerances[levels[0]] for x in right.differences]
    if sum(wrong) <= len(wrong) / 3:
        shown = [names[i] for i, is_wrong in zip(answers.rows, wrong, strict=True) if is_wrong]
        detail = f"{', '.join(map(repr, shown))}: {_hint(set(shown))}"
        return [_fault("some_texts", answers, detail, difference)], levels[0]
    if max(answers.alone) - min(answers.alone) <= tolerances["float32"]:
        return [_fault("constant", answers, f"it is {answers.alone[0]:.4g}")], levels[0]
    return [_fault("other_weights", answers, difference=difference)], levels[-1]


def _explanations(answers: Answers, scores: Sequence[float], hypotheses: Sequence[Hypothesis]) -> list[_Explanation]:
    """Return the explanations of single texts' scores, the right scores first, then the likelier first."""
    healthy = Hypothesis("", "", scores)
    right, *rest = (_as_they_are(answers, x) for x in (healthy, *hypotheses))
    through_sigmoid = [_through_sigmoid(answers, x) for x in (healthy, *hypotheses)]
    ones = _Explanation(("softmax",), "", tuple(x - 1.0 for x in answers.alone), slope=0.0, rounds=True)
    return [right, through_sigmoid[0], ones, *rest, *through_sigmoid[1:], *_scaled(answers, scores)]


def _pairs(answers: Answers, hypothesis: Hypothesis) -> list[tuple[float, float]]:
    """Return what was answered and what would be, for the texts that the fault leaves possible."""
    expected = [hypothesis.scores[i] for i in answers.rows]
    return [(x, y) for x, y in zip(answers.alone, expected, strict=True) if y is not None]


def _as_they_are(answers: Answers, hypothesis: Hypothesis) -> _Explanation:
    faults = (hypothesis.fault,) if hypothesis.fault else ()
    differences = tuple(x - y for x, y in _pairs(answers, hypothesis))
    return _Explanation(faults, hypothesis.detail, differences or (math.inf,))


def _through_sigmoid(answers: Answers, hypothesis: Hypothesis) -> _Explanation:
    """Return an explanation by scores through a sigmoid, whose slope is 1/4 at most."""
    faults = ("sigmoid", hypothesis.fault) if hypothesis.fault else ("sigmoid",)
    differences = tuple(x - sigmoid(y) for x, y in _pairs(answers, hypothesis))
    return _Explanation(faults, hypothesis.detail, differences or (math.inf,), slope=0.25, rounds=True)


def sigmoid(x: float) -> float:
    """Return 1 / (1 + e^-x), without overflow.

    >>> sigmoid(0.0), sigmoid(-1000.0)
    (0.5, 0.0)
    """
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _scaled(answers: Answers, scores: Sequence[float]) -> list[_Explanation]:
    """Return the explanation by the best line through right scores and answers, where there are enough of them to tell."""
    expected = [scores[i] for i in answers.rows]
    n = len(expected)
    mean_x, mean_y = sum(expected) / n, sum(answers.alone) / n
    spread = sum((x - mean_x) ** 2 for x in expected)
    if n < 5 or spread == 0:
        return []
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(expected, answers.alone, strict=True)) / spread
    shift = mean_y - slope * mean_x
    differences = tuple(y - slope * x - shift for x, y in zip(expected, answers.alone, strict=True))
    if abs(slope) < 1e-3:
        return []
    detail = f"answer = {slope:.4g} · score {'+' if shift >= 0 else '-'} {abs(shift):.4g}"
    return [_Explanation(("scaled",), detail, differences, slope=abs(slope))]


def _shows(explanation: _Explanation, right: _Explanation, bounds: tuple[float, float]) -> bool:
    """Tell whether an explanation says more than rounding: it must be much better than the right scores are."""
    return explanation.ratio(*bounds) < 0.5 * right.ratio(*bounds)


def _beside_others(
    answers: Answers,
    differences: Sequence[float],
    allowed: float,
    tolerances: Mapping[str, float],
    names: Sequence[str],
) -> list[Fault]:
    """Return the fault of a batch whose scores are not those of its texts alone."""
    assert answers.together is not None
    difference = root_mean_square(differences)
    in_order = [x - y for x, y in zip(sorted(answers.together), sorted(answers.alone), strict=True)]
    if size_ratio(in_order, allowed) <= 1:
        moved = sum(abs(x) > LARGEST * allowed for x in differences)
        return [_fault("order", answers, f"{max(moved, 1)} of {len(differences)} are moved", difference)]
    if size_ratio(differences, 1.5 * tolerances["bfloat16"]) <= 1:
        return [_fault("precision", answers, "in a batch", difference)]
    wrong = [names[i] for i, x in zip(answers.rows, differences, strict=True) if abs(x) > allowed]
    worst = names[answers.rows[max(range(len(differences)), key=lambda i: abs(differences[i]))]]
    return [_fault("padding", answers, f"{len(wrong)} of {len(differences)} texts, most of all {worst!r}", difference)]


def _precision(answers: Answers, right: _Explanation, expected: str, level: str) -> Fault:
    difference = root_mean_square(right.differences)
    return _fault("precision", answers, f"expected {expected}, the errors are those of {level}", difference)


def _hint(shown: set[str]) -> str:
    """Return what a server does that reads only these texts otherwise."""
    causes = {
        "long": "long texts are cut",
        "system turn": "the system turn is dropped or rendered otherwise",
        "typed special tokens": "special tokens that a person typed are read otherwise",
        "white space": "white space is changed",
        "unicode": "text that is not ASCII is changed on its way",
    }
    if len(shown) == 1 and (cause := causes.get(*shown)):
        return cause
    if all(name.startswith("cut off") for name in shown):
        return "answers without an end token are changed before they are read"
    return "the tokenizer or the chat template is another one"


def _fault(
    name: str, answers: Answers, detail: str = "", difference: float | None = None, also: Sequence[str] = ()
) -> Fault:
    return Fault(
        fault=name,
        form=answers.form,
        sentence=f"{answers.form}: {FAULTS[name]}{f' ({detail})' if detail else ''}",
        detail=detail,
        difference=difference,
        also=list(also),
    )
