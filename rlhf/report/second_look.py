"""What a second look cost and gained, in sentences: for the audit's page and the terminal."""

from rlhf.report.records import Facts

SURPRISE = 3.0  # deviations


def second_look_sentences(facts: Facts) -> list[str]:
    """Say how far experts are, what their verdicts changed, and what the next pairs are expected to add.

    Args:
        facts: `second_look` of `audit.json`.
    """
    sentences = [f"Second look: {facts['asked']} pairs are asked about, {facts['open']} of them have no verdict yet."]
    if facts["answered"]:
        worth, wrong, rate = facts["worth"], facts["wrong"], facts["noise_rate"]
        proved = f"; at least {rate['low']:.1%} are proved" if rate["low"] > 0 else ", which is not proved"
        sentences += [
            f"Of {facts['answered']} pairs, experts agree with the label of {facts['agree']}, contradict that of "
            f"{facts['contradict']}, call the answers of {facts['ties']} equal (kept as ties), and skip {facts['skipped']}.",
            f"An expert is taken to be wrong in {facts['expert_error']:.0%}. With the verdicts, {rate['mean']:.1%} of the "
            f"labels are estimated to be wrong as they stand in the file{proved}; {facts['flipped']} labels are flipped.",
            f"Expected wrong labels: {wrong['file']:.0f} as the file has them, {wrong['before']:.0f} if each is flipped to the "
            f"side that the votes make likelier, {wrong['after']:.0f} with the verdicts too.",
            f"All labels together are worth {worth['before']:.0f} sure ones before the verdicts and {worth['after']:.0f} after.",
        ]
        foreseen = facts["foreseen"]
        if facts["contradict"] > foreseen["contradict"] + SURPRISE * foreseen["deviation"]:
            sentences.append(
                f"Labels and votes foresaw {foreseen['contradict']:.0f} contradictions. So they share an error, such as a taste, "
                "which experts see and no vote does: labels that nobody looked at may be wrong more often than is said here. Look "
                "at more of them, and read what these labels want."
            )
    verb = "The next" if facts["answered"] else "These"
    sentences.append(f"{verb} {gain_sentence(facts['next'])}")
    return sentences


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
