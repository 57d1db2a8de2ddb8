"""What a second look cost and gained, in sentences: for the audit's page and the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.report.records import Facts

SURPRISE = 1 / 740  # as likely as three deviations of a normal count
LEAST_SURPRISE = 2  # pairs: an expert may slip on a single sure one


def before_verdicts(result: Facts) -> list[str]:
    """Say that an audit's first figures know no expert's verdict, once there are some.

    >>> before_verdicts({"second_look": {"answered": 3}})
    ['What follows, up to the second look, is by labels and votes alone, before the verdicts.']
    """
    if not result.get("second_look", {}).get("answered"):
        return []
    return ["What follows, up to the second look, is by labels and votes alone, before the verdicts."]


def second_look_sentences(facts: Facts) -> list[str]:
    """Say how far experts are, what their verdicts changed, and what the next pairs are expected to add.

    Args:
        facts: `second_look` of `audit.json`.
    """
    sentences = [f"Second look: {facts['asked']} pairs are asked about, {facts['open']} of them have no verdict yet."]
    if facts["answered"]:
        worth, wrong, rate = facts["worth"], facts["wrong"], facts["noise_rate"]
        apart = facts["answered"] - facts["agree"] - facts["contradict"] - facts["ties"]
        divided = f", and are divided on {apart}" if apart else ""
        after = "" if worth["before"] is None else " after"
        proved = f"; at least {percent(rate['low'])} are proved" if rate["low"] > 0 else ", which is not proved"
        sentences += [
            f"Of {facts['answered']} pairs with a verdict, experts agree with the label of {facts['agree']}, contradict that of "
            f"{facts['contradict']}, call the answers of {facts['ties']} equal (kept as ties){divided}; "
            f"{facts['skipped']} more are skipped.",
            *(["The voters voted again with these verdicts."] if facts.get("voted_again") else []),
            *unused_vote(is_used=facts.get("second_vote") != "not used"),
            f"An expert is taken to be wrong in {percent(facts['expert_error'])}. With the verdicts, {rate['mean']:.1%} of the "
            f"labels are estimated to be wrong as they stand in the file{proved}; {facts['flipped']} labels are flipped.",
            f"Wrong labels to expect by all that is known: {_count(wrong['file'])} as the file has them, {_count(wrong['before'])} "
            f"if each is flipped to the side that the votes make likelier, {_count(wrong['after'])} with the verdicts too.",
            f"All labels together, with the votes, {_before(worth['before'])} worth {worth['after']:.0f}{after}.",
            *joined_sentence(facts["joined"]),
            *alarm(facts["contradict"], facts["foreseen"], facts["expert_error"]),
        ]
    verb = "The next" if facts["answered"] else "These"
    if facts["next"]["pairs"]:
        sentences.append(f"{verb} {gain_sentence(facts['next'])}")
    return sentences


def _before(worth: float | None) -> str:
    """Return what leads over to the labels' worth with the verdicts: their worth before, where votes said any.

    >>> _before(120.2), _before(None)
    ('were worth 120 sure ones before the verdicts and are', 'are, counted in sure ones,')
    """
    return (
        "are, counted in sure ones,"
        if worth is None
        else f"were worth {worth:.0f} sure ones before the verdicts and are"
    )


def percent(share: float) -> str:
    """Write a share with a decimal, with two where it is small, with none where it needs none.

    >>> percent(0.05), percent(0.127), percent(0.0003)
    ('5%', '12.7%', '0.03%')
    """
    return f"{round(100 * share, 1 if share >= 0.001 else 2):g}%"


def _count(expected: float) -> str:
    """Write an expected number of labels, with a decimal where it is small.

    >>> _count(0.44), _count(38.4)
    ('0.4', '38')
    """
    return f"{expected:.0f}" if expected >= 10 else f"{round(expected, 1):g}"


def joined_sentence(joined: int) -> list[str]:
    """Say how many rows were further labels of a pair; nothing where none was.

    >>> joined_sentence(2)
    ['2 rows are further labels of a pair: its one row holds what all its labels say.']
    """
    return [f"{joined} rows are further labels of a pair: its one row holds what all its labels say."] if joined else []


def unused_confidence(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say that labels have a confidence of their own, which a second look overwrites; nothing where none has.

    >>> unused_confidence([{"confidence": 0.7}, {"confidence": 1.0}, {}])
    ['1 of 3 labels has a `confidence`, which only the first vote reads; else each is a plain label until somebody looks at it.']
    """
    count = sum(0 < (pair.get("confidence") or 1.0) < 1 for pair in pairs)
    if not count:
        return []
    return [
        f"{count} of {len(pairs)} labels {'has' if count == 1 else 'have'} a `confidence`, which only the first vote reads; else "
        "each is a plain label until somebody looks at it."
    ]


def unused_vote(*, is_used: bool) -> list[str]:
    """Say that a second vote is not used; nothing where it is.

    >>> unused_vote(is_used=True)
    []
    """
    sentence = "The first vote foretells the verdicts surely better than the second one, which is not used."
    return [] if is_used else [sentence]


def alarm(contradicted: int, foreseen: Facts | None, expert_error: float) -> list[str]:
    """Say that experts contradict more labels than these and the votes foresaw, by two at least; nothing where they do not.

    Pairs that were asked about for their doubt can rarely surprise: there, almost any number is foreseen.

    Args:
        foreseen: how many labels they foresaw to be contradicted, `contradict`, and the `chance` of as many as came, or more; None
            if nothing was foreseen.
        expert_error: how often experts are taken to be wrong.
    """
    if foreseen is None or foreseen["chance"] >= SURPRISE or contradicted <= foreseen["contradict"] + LEAST_SURPRISE:
        return []
    return [
        f"Labels and votes foresaw {_count(foreseen['contradict'])} contradictions. Either they share an error, such as a taste, "
        "which experts see and no vote does; then labels that nobody looked at may be wrong more often than is said here: look at "
        f"more of them, and read what these labels want. Or these experts are wrong in more than {percent(expert_error)}: read "
        "some of the contradicted pairs yourself."
    ]


def gain_sentence(expected: Facts) -> str:
    """Say what verdicts on some pairs are expected to add.

    Args:
        expected: `next` of `second_look`.

    >>> gain_sentence({"pairs": 200, "worth": 150.2, "labels": 1613.0})
    '200 pairs are expected to add what 150 sure labels are worth, or what 1,613 more labels like these do, on new pairs: \
where votes are sure of a pair, its label says little.'
    """
    sentence = f"{expected['pairs']} pairs are expected to add what {_count(expected['worth'])} sure labels are worth"
    if expected["labels"] is None:
        return f"{sentence}."
    return (
        f"{sentence}, or what {expected['labels']:,.0f} more labels like these do, on new pairs: where votes are sure of a pair, "
        "its label says little."
    )
