"""Whom other people's labels can tell anything of: how often two agree does not say which of them errs."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from rlhf.objectives.annotators import PairLabels

ALONE = 0.9  # of the labels that others share, from which a single other one is all that there is


def told_by_others(labels: PairLabels, names: Sequence[str]) -> set[str]:
    """Return the annotators whose accuracy shows in what else is known of the pairs that they labelled.

    With a yardstick beside the labels (a vote, a gold question: a prior) that is everybody on such a pair. Without one it takes
    three who share pairs with each other: of two, and of a chain of people, only products of accuracies are known.

    Args:
        names: [n] who gave each label.
    """
    people: defaultdict[int, set[str]] = defaultdict(set)
    told: set[str] = set()
    priors = labels.prior.tolist()
    for pair, name, sign in zip(labels.pair.tolist(), names, labels.sign.tolist(), strict=True):
        if sign:
            people[pair].add(name)
            if priors[pair]:
                told.add(name)
    beside: defaultdict[str, set[str]] = defaultdict(set)
    shared: Counter[str] = Counter()
    alone_with: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group in people.values():
        for name in group if len(group) > 1 else ():
            others = group - {name}
            beside[name] |= others
            shared[name] += 1
            if len(others) == 1:
                alone_with[name].update(others)
    for name, others in beside.items():
        most = max(alone_with[name].values(), default=0)
        if most < ALONE * shared[name] and any(beside[other] & others for other in others):
            told.add(name)
    return told
