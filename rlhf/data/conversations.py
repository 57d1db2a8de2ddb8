"""Which prompts are turns of one conversation or tree: they have each other's answers in them."""

from collections import defaultdict
from collections.abc import Sequence

from rlhf.data.rows import Messages, Prompt, prefix_keys, prompt_key, user_turn

# Next turns after one opening, or system turns before one question: people's conversations have fewer, and a template's more.
MOST_BRANCHES = 10


def conversation_keys(prompts: Sequence[Prompt]) -> list[str]:
    """Return for each of some prompts the identity of the conversation that it is of.

    That is the key of the user's first turn, whatever system turn stands before it: data sets repeat a question under several.
    Where these prompts have a first turn under more than `MOST_BRANCHES` system turns, it is what a template says and they say
    what is asked for, so they count. Where an opening that ends with an answer is followed by more than `MOST_BRANCHES` different
    turns, and so is a template too, the key is of the turns up to the one behind it.

    >>> from rlhf.data.rows import prompt_key
    >>> first, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    >>> system = {"role": "system", "content": "Be kind."}
    >>> keys = conversation_keys([[first], [first, reply, {"role": "user", "content": "Bye"}], [system, first]])
    >>> keys == [prompt_key([first])] * 3
    True
    """
    whole = [user_turn(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    conversations = _without_system(whole)
    keys = [prefix_keys(turns) for turns in conversations]  # [prompt][i]: of its turns up to the i-th
    followers: defaultdict[str, set[str]] = defaultdict(set)
    for turns, prefixes in zip(conversations, keys, strict=True):
        for i, turn in enumerate(turns[:-1]):
            if turn["role"] == "assistant":
                followers[prefixes[i]].add(prefixes[i + 1])
    result = []
    for turns, prefixes in zip(conversations, keys, strict=True):
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns) - 1)
        templates = [i + 1 for i, key in enumerate(prefixes[:-1]) if len(followers[key]) > MOST_BRANCHES]
        result.append(prefixes[max([first, *templates])])
    return result


def _without_system(conversations: Sequence[Messages]) -> list[Messages]:
    """Return conversations from the user's first turn on; as they are where that turn has many system turns, or there is none."""
    begins = [next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0) for turns in conversations]
    questions = [prompt_key(turns[i : i + 1]) for turns, i in zip(conversations, begins, strict=True)]
    before: defaultdict[str, set[str]] = defaultdict(set)
    for turns, i, question in zip(conversations, begins, questions, strict=True):
        before[question].add(prompt_key(turns[:i]) if i else "")
    return [
        turns if len(before[question]) > MOST_BRANCHES else turns[i:]
        for turns, i, question in zip(conversations, begins, questions, strict=True)
    ]
