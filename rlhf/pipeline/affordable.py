"""How many answers `rlhf doctor` can look at: as many as a run's check does where a model is small, fewer where it is not."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

ANSWERS, ROWS, TOKENS = 128, 64, 32  # what "sampler true" looks at, at most; answers in a batch; tokens of an answer
FEW = 8  # rows of the other checks, and the fewest that "sampler true" looks at
# Floating-point operations that "sampler true" may take on a CPU. Two cores do 30 to 60 · 10⁹ a second (measured with
# SmolLM2-135M), so this is about a minute.
OPERATIONS = 2e12


def affordable_prompts(lengths: Sequence[int], parameters: int, *, device: str) -> list[int]:
    """Return which prompts "sampler true" looks at: all, or, where a model is large for a CPU, the shortest, 8 at least.

    A token costs 2 operations a parameter in a forward, and every token is in two: one where it is sampled and one where its
    log-probability is computed. The check is a martingale's whatever the prompts are, so choosing them by their length makes
    no false alarm; fewer tokens make it see less, and its bound follows from the skewness of what was sampled
    (`sampler_bounds`), however few they are. Prompts are chosen by arithmetic and not by a clock, so that two runs of one
    recipe look at the same ones.

    Args:
        lengths: tokens of each prompt that are read.
        parameters: of the model.
        device: "cpu", or another, where all are affordable.

    Returns:
        a prompt's index for each answer that is sampled, in the order of the prompts, so that neighbours differ in length: 128,
        for which few prompts come again, or those of the shortest prompts that are affordable.

    >>> len(affordable_prompts([20, 10, 30], 10**6, device="cpu")), affordable_prompts([20, 10, 30], 10**11, device="cpu")
    (128, [1, 1, 1, 1, 1, 1, 1, 1])
    """
    asked = [i % len(lengths) for i in range(ANSWERS)]
    costs = [4.0 * parameters * (lengths[i] + TOKENS) for i in asked]
    if device != "cpu" or sum(costs) <= OPERATIONS:
        return asked
    shortest = sorted(range(ANSWERS), key=lambda answer: costs[answer])
    totals = list(accumulate(costs[answer] for answer in shortest))
    count = max(FEW, bisect_right(totals, OPERATIONS))
    return [asked[answer] for answer in sorted(shortest[:count])]
