"""Weights of pairs that come from the data set as a whole, beside what an objective says of single pairs."""

from collections import Counter
from collections.abc import Sequence

from rlhf.data.rows import Pair, asked, prompt_key


def prompt_balanced(rows: Sequence[Pair]) -> list[Pair]:
    """Return pairs with weights under which every prompt counts the same, however many pairs it has.

    With n pairs of g prompts, the pair i of a prompt with n_i pairs gets

        w_i ← w_i · n / (g n_i),

    so the mean of w_i · loss_i over all pairs is the mean over prompts of the mean over their pairs: all pairs of K answers to
    one prompt are one element, as in InstructGPT (arXiv:2203.02155 section 3.5). Where each prompt has one pair nothing changes.

    >>> one = [{"role": "user", "content": "a"}]
    >>> two = [{"role": "user", "content": "b"}]
    >>> pairs: list[Pair] = [{"prompt": p, "chosen": [], "rejected": []} for p in (one, one, one, two)]
    >>> [round(row["weight"], 3) for row in prompt_balanced(pairs)]
    [0.667, 0.667, 0.667, 2.0]
    """
    keys = [prompt_key(asked(row, "chosen")) for row in rows]
    counts = Counter(keys)
    usual = len(rows) / len(counts) if counts else 1.0
    balanced: list[Pair] = []
    for row, key in zip(rows, keys, strict=True):
        weight = row.get("weight")
        balanced.append({**row, "weight": (1.0 if weight is None else weight) * usual / counts[key]})
    return balanced
