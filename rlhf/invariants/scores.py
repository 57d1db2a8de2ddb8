"""Scores: a text has one score, alone or beside others, and it is that of the text as the model's own template writes it."""

import torch
from torch import Tensor

from rlhf.invariants.checks import Check

ALONE, RENDERED = "score alone = in a batch", "score as its template renders"
# Of the scale of the scores (`score_scale`). Another layout of a batch moves a float32 score by about 1e-5 of that and a
# 16-bit one by a few of its own roundings (2^-8, 2^-11), once a layer; a score that is read at another token, or of
# another text, moves by 0.1 to 3.
SCORE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def score_tolerance(dtype: torch.dtype) -> float:
    """Return how far two computations of one score may lie apart, as a share of the largest score in size."""
    return SCORE_TOLERANCE.get(dtype, 0.1)


def score_scale(scores: Tensor) -> float:
    """Return what a difference of scores is measured by: the largest in size, and up to three times that where it is below 1.

    Rounding is a share of what a score is a sum of, and not of the score: the largest of a few small ones may be small by chance.
    Scores of at least 1/3 so have the scale that scores around 1 have.

    >>> [round(score_scale(torch.tensor([x, -x / 2])), 3) for x in (5.0, 0.5, 0.01)]
    [5.0, 1.0, 0.03]
    """
    largest = scores.abs().max().item()
    return float(max(largest, min(1.0, 3 * largest)))


def alone_in_batch(alone: Tensor, together: Tensor, *, dtype: torch.dtype) -> Check:
    """Compare scores of texts of different lengths, each computed by itself, with those of one padded batch.

    Args:
        alone, together: [n] raw scores of the same texts.
        dtype: in which the model computes.
    """
    sentence = (
        "A text has another score beside longer ones than alone, so nothing that is trained or measured with these scores "
        "means anything. Likely causes: a padding id that the model takes for the end of a text or that is not the "
        "tokenizer's (pad_token_id in config.json), attention that sees padding, a layer that mixes the rows of a batch."
    )
    return _agreement(ALONE, alone, together, dtype, sentence)


def as_rendered(scores: Tensor, expected: Tensor, *, dtype: torch.dtype) -> Check:
    """Compare scores with those that the network gives at the last token of what the tokenizer's template renders.

    Args:
        scores: [n] raw scores as they are used.
        expected: [n] of transformers' own rendering and tokens, one text in a forward, no padding.
        dtype: in which the model computes.
    """
    sentence = (
        "The score is read elsewhere, or of another text, than where the model was trained to give it. Likely causes: a chat "
        "template that writes something after the end of an answer, begin tokens written twice, a padding id that stands "
        "in the text (pad_token_id in config.json)."
    )
    return _agreement(RENDERED, scores, expected, dtype, sentence)


def _agreement(name: str, first: Tensor, second: Tensor, dtype: torch.dtype, sentence: str) -> Check:
    """Return the check of the largest difference of two rows of scores, as a share of their scale."""
    difference = (first - second).abs().max().item()
    if difference > 0:
        difference /= max(score_scale(first), score_scale(second))
    return Check(name, difference, score_tolerance(dtype), "of the largest score", sentence)
