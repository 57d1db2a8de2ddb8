"""What a second look cost and gained, in sentences: for the audit's page and the terminal."""

from rlhf.report.records import Facts

SURPRISE = 3.0  # deviations
LEAST_SURPRISE = 2  # pairs: an expert may slip on a single sure one


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
        proved = f"; at least {rate['low']:.1%} are proved" if rate["low"] > 0 else ", which is not proved"
        sentences += [
            f"Of {facts['answered']} pairs with a verdict, experts agree with the label of {facts['agree']}, contradict that of "
            f"{facts['contradict']}, call the answers of {facts['ties']} equal (kept as ties){divided}; "
            f"{facts['skipped']} more are skipped.",
            f"An expert is taken to be wrong in {facts['expert_error']:.0%}. With the verdicts, {rate['mean']:.1%} of the "
            f"labels are estimated to be wrong as they stand in the file{proved}; {facts['flipped']} labels are flipped.",
            f"Wrong labels to expect by all that is known: {_count(wrong['file'])} as the file has them, {_count(wrong['before'])} "
            f"if each is flipped to the side that the votes make likelier, {_count(wrong['after'])} with the verdicts too.",
            f"All labels together are worth {worth['before']:.0f} sure ones before the verdicts and {worth['after']:.0f} after.",
            *joined_sentence(facts["joined"]),
            *alarm(facts["contradict"], facts["foreseen"]),
        ]
    verb = "The next" if facts["answered"] else "These"
    if facts["next"]["pairs"]:
        sentences.append(f"{verb} {gain_sentence(facts['next'])}")
    return sentences


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


def alarm(contradicted: int, foreseen: Facts) -> list[str]:
    """Say that experts contradict more labels than these and the votes foresaw, by two at least; nothing where they do not.

    Args:
        foreseen: how many labels they foresaw to be contradicted, `contradict`, and its `deviation`.
    """
    if contradicted <= foreseen["contradict"] + max(SURPRISE * foreseen["deviation"], LEAST_SURPRISE):
        return []
    return [
        f"Labels and votes foresaw {_count(foreseen['contradict'])} contradictions. So they share an error, such as a taste, which "
        "experts see and no vote does: labels that nobody looked at may be wrong more often than is said here. Look at more of "
        "them, and read what these labels want."
    ]


def gain_sentence(expected: Facts) -> str:
    """Say what verdicts on some pairs are expected to add.

    Args:
        expected: `next` of `second_look`.

    >>> gain_sentence({"pairs": 200, "worth": 150.2, "labels": 1613.0})
    '200 pairs are expected to add what 150 sure labels are worth, or what 1,613 more labels like these do.'
    """
    likewise = "" if expected["labels"] is None else f", or what {expected['labels']:,.0f} more labels like these do"
    return (
        f"{expected['pairs']} pairs are expected to add what {expected['worth']:.0f} sure labels are worth{likewise}."
    )
