"""Five questions of a round, and an annotation of one."""

from typing import Any

from rlhf.data.labels import Question, question_id


def question(number: int, round_number: int = 2) -> Question:
    prompt = [{"role": "user", "content": f"list {number}"}]
    first, second = f"yes {number}", f"no {number}"
    return Question(question_id(round_number, prompt, [first, second]), round_number, prompt, first, second)


FIVE = [question(i) for i in range(5)]


def control(name: str | None, *choices: str, selected: str | None = None) -> dict[str, Any]:
    value = {"selected": selected} if selected else {"choices": list(choices)}
    return {"type": "choices", "value": value} | ({} if name is None else {"from_name": name})
