"""Sizes: every row is counted, tokens are those that the models read, and what nobody has written yet is said."""

from pathlib import Path
from typing import Any

from rlhf.cost.sizes import PairTokens, count_sizes
from rlhf.files import write_jsonl
from rlhf.models.text import answer_text, encode, prompt_text
from tests.conftest import PROMPTS


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_rows_and_tokens_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    prompt = PROMPTS[0]
    write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": turn("yes please"), "rejected": turn("no")}] * 600
    )
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": prompt, "completion": turn("yes")}] * 3)
    sizes = count_sizes(tmp_path, tokenizer, longest_answer=99)

    def tokens(text: str) -> int:
        return len(encode(tokenizer, [text], conversational=True)[0])

    assert sizes.rows == {"sft": 3, "pairs": 600, "test_pairs": 0, "prompts": 0, "test_prompts": 0, "ratings": 0}
    assert (sizes.rankings, sizes.ranked_answers) == (600, 1200), "without a group each pair is a ranking of two"
    asked = tokens(prompt_text(tokenizer, prompt))
    assert sizes.prompts == [asked] * 512, "as many as are counted"
    assert sizes.answers == [
        tokens(answer_text(tokenizer, prompt, x)) - asked for x in ("yes please", "no") for _ in range(512)
    ]
    whole = [tokens(answer_text(tokenizer, prompt, x)) for x in ("yes please", "no")]
    assert sizes.pairs == [PairTokens(asked, *whole)] * 512, "their first answer tokens differ"
    assert sizes.demonstrations == [tokens(answer_text(tokenizer, prompt, "yes"))] * 3
    assert sizes.notes == []


def test_pairs_of_one_prompt_are_counted_together(tokenizer: Any, tmp_path: Path) -> None:
    """Three answers to a prompt, every two compared: what all begin with alike, and which answers a pair has."""
    answers = ["red red dog", "red blue", "cat"]
    rows = [
        {"prompt": PROMPTS[0], "chosen": turn(answers[i]), "rejected": turn(answers[j]), "group": "g"}
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    alone = {"prompt": PROMPTS[1], "chosen": turn("red red dog"), "rejected": turn("red blue")}
    write_jsonl(tmp_path / "pairs.jsonl", [rows[0], alone, *rows[1:]])
    sizes = count_sizes(tmp_path, tokenizer, longest_answer=9)

    def tokens(text: str) -> int:
        return len(encode(tokenizer, [text], conversational=True)[0])

    asked, begin = tokens(prompt_text(tokenizer, PROMPTS[0])), tokens(prompt_text(tokenizer, PROMPTS[1]) + "red")
    lengths, of_alone = (
        [tokens(answer_text(tokenizer, prompt, text)) for text in answers] for prompt in (PROMPTS[0], PROMPTS[1])
    )
    grouped = [PairTokens(asked, lengths[i], lengths[j], "g", (i, j)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [pair for pair in sizes.pairs if pair.group == "g"] == grouped, "'cat' begins otherwise than the others"
    assert [pair for pair in sizes.pairs if pair.group is None] == [PairTokens(begin, *of_alone[:2])]
    assert (sizes.rankings, sizes.ranked_answers) == (2, 5)


def test_answers_that_nobody_has_written_are_as_long_as_they_may_be(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:5]])
    sizes = count_sizes(tmp_path, tokenizer, longest_answer=12)
    assert sizes.rows["prompts"] == len(sizes.prompts) == 5
    assert (sizes.answers, sizes.demonstrations) == ([12], [])
    assert sizes.notes == ["No pairs yet: answers are taken to be 12 tokens long, so these are upper bounds."]
