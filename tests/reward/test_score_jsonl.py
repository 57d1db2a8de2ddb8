"""Lines of JSON and their scores: a line in, a line out, whatever a line holds. The scores themselves: `test_parity.py`."""

import json
from collections.abc import Sequence

import torch

from rlhf.data.rows import Prompt
from rlhf.reward.score_jsonl import BATCH, score_lines


class Lengths:
    """Scores an answer by its length."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> torch.Tensor:
        return torch.tensor([float(len(text)) for text in responses])


def test_every_line_has_its_place() -> None:
    lines = [
        json.dumps({"prompt": "a", "response": "xx", "id": 7}),
        "",
        "[1]",
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xxx"}]}),
        json.dumps({"messages": [{"role": "user", "content": "a"}]}),
        json.dumps({"prompt": "a"}),
        json.dumps({"prompt": "a", "response": "x", "score": 9, "error": "an older one"}),
    ]
    rows = list(score_lines(Lengths(), lines))
    assert rows[0] == {"prompt": "a", "response": "xx", "id": 7, "score": 2.0}
    assert rows[1]["error"].startswith("not valid JSON")
    assert rows[2] == {"error": "not a JSON object"}
    assert rows[3]["score"] == 3.0
    assert rows[4] == {"error": "messages must end with an assistant's answer to something"}
    assert rows[5] == {"error": "neither 'prompt' and 'response' nor 'messages'"}
    assert rows[6] == {"prompt": "a", "response": "x", "score": 1.0, "error": "an older one"}


def test_more_lines_than_a_batch() -> None:
    lines = [json.dumps({"prompt": "a", "response": "x" * (i % 5)}) if i % 7 else "?" for i in range(2 * BATCH + 3)]
    rows = list(score_lines(Lengths(), lines))
    assert [row.get("score") for row in rows] == [float(i % 5) if i % 7 else None for i in range(len(lines))]
