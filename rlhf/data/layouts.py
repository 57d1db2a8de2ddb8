"""The layouts in which preference data are published: a registry. A new one is one entry, a function and a test.

A row has the layout that is the first in `LAYOUTS` to match it. What a layout does not say follows: pairs from its
rankings, demonstrations from the best answers, prompts from the demonstrations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.data.canonical import demonstration, pair, prompt_only
from rlhf.data.rankings import (
    Ranking,
    RatedAnswer,
    best_demonstration,
    comparisons,
    is_k_wise,
    is_rated,
    is_right_and_wrong,
    k_wise,
    message_tree,
    ranked_list,
    rated_answers,
    right_and_wrong,
    second_response,
    signed_strength,
    tree_demonstrations,
    tree_root,
    usable,
)
from rlhf.data.rows import Demonstration, Pair, PromptRow, asked


@dataclass(frozen=True)
class Layout:
    """One layout of a row: by which columns it is recognised, and what it holds.

    Every function is given the row as it was read, and raises BadRow with the reason why a row can't be used. One of
    `pairs`, `rankings` and `ratings` is there.

    Attributes:
        name: what people call it.
        summary: the columns by which it is recognised, and how its answers are scored.
        matches: whether a row has this layout, asked if no layout before it matched; the rows are mappings, but for the
            first layout's, which may be lists.
        pairs: the row's pairs.
        rankings: the row's rankings, which are checked and turned into pairs by the methods below.
        ratings: the row's answers with a rating of their own; they are compared with those of other rows with their prompt.
        demonstrations: the row's demonstrations, if they are not the chosen or best answers.
        prompts: the row's prompts, if they are not those of its demonstrations.
        direction: which answer is the better one, as a sentence for a person; None where the columns' names say it.
    """

    name: str
    summary: str
    matches: Callable[[Any], bool]
    pairs: Callable[[Any], list[Pair]] | None = None
    rankings: Callable[[Any], list[Ranking]] | None = None
    ratings: Callable[[Any], list[RatedAnswer]] | None = None
    demonstrations: Callable[[Any], list[Demonstration]] | None = None
    prompts: Callable[[Any], list[PromptRow]] | None = None
    direction: str | None = None

    def read_pairs(self, row: object) -> list[Pair]:
        """Return a row's pairs; none where answers are compared across rows (`ratings`)."""
        if self.pairs is not None:
            return self.pairs(row)
        return [canonical for ranking in self.read_rankings(row) for canonical in comparisons(ranking)]

    def read_rankings(self, row: object) -> list[Ranking]:
        """Return a row's rankings in which two answers differ in score; none where a layout has no rankings.

        Raises:
            BadRow: a ranking has nothing to say, or a prompt or an answer is none.
        """
        return [] if self.rankings is None else usable(self.rankings(row))

    def read_demonstrations(self, row: object) -> list[Demonstration]:
        """Return a row's demonstrations."""
        if self.demonstrations is not None:
            return self.demonstrations(row)
        if self.rankings is not None:
            return [best_demonstration(ranking) for ranking in self.read_rankings(row)]
        return [{"prompt": asked(pair, "chosen"), "completion": pair["chosen"][-1:]} for pair in self.read_pairs(row)]

    def read_prompts(self, row: object) -> list[PromptRow]:
        """Return a row's prompts."""
        if self.prompts is not None:
            return self.prompts(row)
        return [{"prompt": row["prompt"]} for row in self.read_demonstrations(row)]


LAYOUTS = (
    Layout(
        "flat ranked list",
        "the row is a list of messages (`text` or `content`) that ends in answers, best first; score: minus the place",
        matches=lambda row: isinstance(row, list),
        rankings=ranked_list,
        direction="answers in a list: the first is the best",
    ),
    Layout(
        "OASST tree",
        "`prompt` (or the row) with `replies`, nested; score: minus `rank` among siblings",
        matches=lambda row: tree_root(row) is not None,
        rankings=message_tree,
        demonstrations=tree_demonstrations,
        direction="`rank` in a tree: the lowest is the best",
    ),
    Layout(
        "signed strength",
        "`response_1`, `response_2` and a preference, a scale above 0 where the second is better (scores: 0 and the "
        "preference), or a code or word for one of them (`rlhf.data.direction`)",
        matches=lambda row: second_response(row) is not None,
        rankings=signed_strength,
    ),
    Layout(
        "several right answers",
        "`chosen` and `rejected`, lists of texts (RewardBench 2); scores: 1 and 0",
        matches=is_right_and_wrong,
        rankings=right_and_wrong,
    ),
    Layout(
        "K-wise row",
        "`responses` (or `answers`, `completions`), each with `score`, `overall_score` or `rank`; score, or minus the rank",
        matches=is_k_wise,
        rankings=k_wise,
        direction="answers with `score` or `rank`: the highest score, or the lowest rank, is the best",
    ),
    Layout(
        "rated answers",
        "`response` with `helpfulness`, or `messages` with `attributes`; rows of one prompt are compared by helpfulness",
        matches=is_rated,
        ratings=rated_answers,
        direction="`helpfulness`: the highest is the best",
        demonstrations=lambda row: [demonstration(row)],
        prompts=lambda row: [prompt_only(row)],
    ),
    Layout(
        "pair or conversation",
        "`chosen` and `rejected`, texts, messages or HH transcripts, with or without `prompt`; or `messages`; or `prompt` "
        "with or without `completion`",
        matches=lambda row: True,
        pairs=lambda row: [pair(row)],
        demonstrations=lambda row: [demonstration(row)],
        prompts=lambda row: [prompt_only(row)],
    ),
)


def find_layout(row: object) -> Layout:
    """Return the layout of a row as it was read: a mapping, or a list of messages.

    >>> find_layout({"prompt": "Hi", "responses": [{"content": "a", "score": 1}]}).name
    'K-wise row'
    """
    return next(layout for layout in LAYOUTS if layout.matches(row))
