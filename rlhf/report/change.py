"""What the policy's rewards did since the start, in three words: they rise, they fall, or there is no clear change."""

from collections.abc import Sequence

from rlhf.report.records import Facts

GOLD, SCORE = "The true reward", "The reward model's score"
MOST_DECIMALS = 6
RISES, FALLS, UNCLEAR = "rises", "falls", "no clear change"


def direction(interval: Sequence[float] | None) -> str:
    """Return the word for the 95 % interval of a paired difference; None: nothing is known of it.

    >>> direction([0.1, 0.3]), direction([-0.3, -0.1]), direction([-0.1, 0.3])
    ('rises', 'falls', 'no clear change')
    """
    low, high = interval or (0.0, 0.0)
    return RISES if low > 0 else FALLS if high < 0 else UNCLEAR


def change_figures(policy: Facts, name: str) -> str | None:
    """Return the paired difference of a reward from the start, with its interval where the prompts were of more than one
    conversation; None where no samples were compared.

    >>> change_figures({"proxy_change": -0.61, "proxy_change_ci": [-0.84, -0.4]}, "proxy")
    '-0.61 [-0.84, -0.40]'
    """
    difference, interval = policy.get(f"{name}_change"), policy.get(f"{name}_change_ci")
    if difference is None:
        return None
    form = f"+.{_decimals(difference, interval)}f"
    return f"{difference:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def _decimals(difference: float, interval: Sequence[float] | None) -> int:
    """Return how many decimals tell a difference, or the ends of its interval, from 0: two or more.

    >>> _decimals(0.0012, [0.0004, 0.002]), _decimals(0.1, [-0.1, 0.3]), _decimals(0.0, [0.0, 0.0])
    (4, 2, 2)
    """
    ends = [end for end in interval or [difference] if end != 0]
    return next((n for n in range(2, MOST_DECIMALS) if all(round(end, n) != 0 for end in ends)), MOST_DECIMALS)


def change_sentence(subject: str, policy: Facts, start: Facts, name: str, *, start_name: str) -> str:
    """Return what a reward did from the start to the policy, tested on the same prompts.

    Args:
        subject: "The true reward".
        policy, start: sections of `summary.json`.
        name: "gold" or "proxy".
        start_name: what the policy is compared with: "SFT".

    >>> policy = {"proxy": 0.77, "proxy_change": -0.61, "proxy_change_ci": [-0.84, -0.4]}
    >>> change_sentence("The score", policy, {"proxy": 1.38}, "proxy", start_name="SFT")
    'The score falls from 1.38 (SFT) to 0.77: -0.61 [-0.84, -0.40], paired on the same prompts.'
    """
    figures = change_figures(policy, name)
    change, interval = policy.get(f"{name}_change"), policy.get(f"{name}_change_ci")
    form = ".2f" if change is None else f".{_decimals(change, interval)}f"
    values = f"from {start[name]:{form}} ({start_name}) to {policy[name]:{form}}"
    if figures is None:
        return f"{subject} goes {values}; the same `rlhf run` again tests whether that is a change."
    if interval is None:
        return f"{subject} goes {values}: {figures}; all prompts are of one conversation, so nothing says what others would give."
    word = direction(interval)
    return f"{subject} {'shows ' if word == UNCLEAR else ''}{word} {values}: {figures}, paired on the same prompts."
