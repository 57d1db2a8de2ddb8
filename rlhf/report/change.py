"""What the policy's rewards did since the start, in three words: they rise, they fall, or there is no clear change."""

from collections.abc import Sequence

from rlhf.report.records import Facts

GOLD, SCORE = "The true reward", "The reward model's score"
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
    return f"{difference:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


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
    values = f"from {start[name]:.2f} ({start_name}) to {policy[name]:.2f}"
    if figures is None:
        return f"{subject} goes {values}; the same `rlhf run` again tests whether that is a change."
    interval = policy[f"{name}_change_ci"]
    if interval is None:
        return f"{subject} goes {values}: {figures}; all prompts are of one conversation, so nothing says what others would give."
    word = direction(interval)
    return f"{subject} {'shows ' if word == UNCLEAR else ''}{word} {values}: {figures}, paired on the same prompts."
