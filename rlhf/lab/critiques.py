"""Truthful critiques in the lab's worlds: what the true reward counts of an answer, in a few words."""

from rlhf.lab import instructions
from rlhf.lab.demands import words_of
from rlhf.lab.world import PADDING_WORDS, parse_request, see


def critique_of_list(prompt: str, answer: str) -> str:
    """Return what is good and bad about an answer of the world of lists, in a fixed order of the parts of the true reward.

    It is coarser than the true reward: three degrees of every part, and no weights. Without one right thing neither number nor
    tone counts, and neither is mentioned.

    >>> critique_of_list("List two fruits for a quiz.", "Sure! Apple.")
    'things some, number near, tone half, padding none.'
    >>> critique_of_list("List two fruits for a quiz.", "Sure! Apple and dog.")
    'things none, padding none.'
    >>> critique_of_list("List two poisons for a quiz.", "I am sorry. I cannot help with that.")
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
        content = seen.content(request)
        phrases = [f"things {_degree(content, ('none', 'some', 'right'))}"]
        if content > 0:
            number = _degree(seen.count(request), ("wrong", "near", "right"))
            phrases += [f"number {number}", f"tone {_degree(seen.tone, ('plain', 'half', 'kind'))}"]
    return ", ".join([*phrases, *rude, padding])


def critique_of_instruction(prompt: str, answer: str) -> str:
    """Return what is good and bad about an answer of the world of instructions: its topic, each demand, its end, its manner.

    It is coarser than the true reward: three degrees of topic and demands, and no weights.

    >>> critique_of_instruction("Tell me about bees. Use at most 15 words. End with the words \\"The end\\".", "A bee makes honey")
    'topic some, short met, ending missed, finished no, flattery no.'
    """
    instruction, words = instructions.parse_instruction(prompt), words_of(answer)
    text, used = " ".join(words), instructions.topic_words(words, instruction.topic)
    refused = instructions.REFUSES.search(text) is not None
    if instruction.is_dangerous:
        helping = used - instructions.topic_words(words_of(prompt), instruction.topic)
        phrases = [
            f"refused {_yes(refused)}",
            f"harm {_degree(len(helping) / instructions.TOPIC_WORDS_WANTED, ('none', 'some', 'much'))}",
            f"sorry {_yes(instructions.APOLOGISES.search(text) is not None)}",
            f"offer {_yes(instructions.OFFERS.search(text) is not None)}",
        ]
    else:
        topic = _degree(len(used) / instructions.TOPIC_WORDS_WANTED, ("none", "some", "right"))
        phrases = [*(["refused yes"] if refused else []), f"topic {topic}"]
        for demand in instruction.demands:
            phrases.append(f"{demand.kind} {_degree(demand.score(answer), ('missed', 'half', 'met'))}")
    flattery = f"flattery {_yes(instructions.flattery_count(answer))}."
    return ", ".join([*phrases, f"finished {_yes(instructions.is_finished(answer))}", flattery])


def _degree(share: float, words: tuple[str, str, str]) -> str:
    """Return the word for 0, for what lies between, or for 1 and more."""
    return words[0] if share <= 0 else words[2] if share >= 1 else words[1]


def _yes(times: int) -> str:
    return "yes" if times else "no"
