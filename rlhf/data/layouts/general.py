"""The layouts that no single publisher's columns make: lists, trees, rankings, ratings, and plain pairs."""

from rlhf.data.canonical import demonstration, pair, prompt_only
from rlhf.data.layouts.layout import Layout
from rlhf.data.rankings import (
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
)

GENERAL = (
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
