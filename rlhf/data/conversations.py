"""Which prompts are turns of one conversation or tree: they have each other's answers in them."""

from collections import defaultdict
from collections.abc import Sequence

from rlhf.data.rows import Prompt, prefix_keys, user_turn

MOST_BRANCHES = 10  # next turns after one opening: people's conversations branch less, and a template's questions more


def conversation_keys(prompts: Sequence[Prompt]) -> list[str]:
    """Return for each of some prompts the identity of the conversation that it is of.

    That is the key of its turns up to the user's first; or, where an opening that ends with an answer is followed by more than
    `MOST_BRANCHES` different turns among these prompts, and so is a template that they share, of its turns up to the one behind it.

    >>> from rlhf.data.rows import prompt_key
    >>> first, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    >>> keys = conversation_keys([[first], [first, reply, {"role": "user", "content": "Bye"}]])
    >>> keys[0] == keys[1] == prompt_key([first])
    True
    """
    conversations = [user_turn(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
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
