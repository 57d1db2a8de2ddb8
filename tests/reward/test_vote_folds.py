"""Which fold a pair is in."""

from rlhf.data.rows import Messages
from rlhf.reward.vote import plan_vote


def test_the_turns_of_a_conversation_are_in_one_fold() -> None:
    """A later prompt has the earlier answer in it: a member that read it has seen what it votes on."""
    prompts: list[Messages] = []
    for i in range(40):
        first = {"role": "user", "content": f"question {i}"}
        later = [first, {"role": "assistant", "content": "answer"}, {"role": "user", "content": "and then?"}]
        prompts += [[first], later]
    folds = plan_vote(prompts, members=4, folds=4, in_sample=False, seed=0).folds
    assert folds[::2] == folds[1::2]
    assert len(set(folds)) == 4
