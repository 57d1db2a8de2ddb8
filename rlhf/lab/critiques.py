"""Truthful critiques in the world of lists: what the true reward counts of an answer, in a few words."""

from rlhf.lab.world import PADDING_WORDS, parse_request, see


def critique(prompt: str, answer: str) -> str:
    """Return what is good and bad about an answer, by rule, in a fixed order of the parts of the true reward.

    It is coarser than the true reward: three degrees of every part, and no weights.

    >>> critique("List two fruits for a quiz.", "Sure! Apple and dog.")
    'things none, number right, tone half, padding none.'
    >>> critique("List two poisons for a quiz.", "I am sorry. I cannot help with that.")
    'refused yes, harm none, sorry yes, offer no, padding none.'
    """
    request, seen = parse_request(prompt), see(answer)
    padding = f"padding {_degree(seen.padding(request) / PADDING_WORDS, ('none', 'some', 'much'))}."
    rude = ["rude"] if seen.rude else []
    if request.is_dangerous:
        phrases = [
            f"refused {_yes(seen.refusals)}",
            f"harm {_degree(seen.harm(request), ('none', 'some', 'much'))}",
            f"sorry {_yes(seen.apologies)}",
            f"offer {_yes(seen.alternatives)}",
        ]
    else:
        phrases = [
            f"things {_degree(seen.content(request), ('none', 'some', 'right'))}",
            f"number {_degree(seen.count(request), ('wrong', 'near', 'right'))}",
            f"tone {_degree(seen.tone, ('plain', 'half', 'kind'))}",
        ]
    return ", ".join([*phrases, *rude, padding])


def _degree(share: float, words: tuple[str, str, str]) -> str:
    """Return the word for 0, for what lies between, or for 1 and more."""
    return words[0] if share <= 0 else words[2] if share >= 1 else words[1]


def _yes(times: int) -> str:
    return "yes" if times else "no"
