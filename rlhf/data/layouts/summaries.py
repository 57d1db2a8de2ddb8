"""OpenAI's summarize-from-feedback, comparisons: a post or an article, two summaries, the index of the better one."""

from collections.abc import Mapping
from typing import Any

from rlhf.data.layouts.layout import Comparison, Layout, better_of
from rlhf.data.read import BadRow


def comparison(row: Mapping[str, Any], label: str) -> Comparison:
    """Return the two summaries; `choice` is the better one's index, `worker` the annotator."""
    summaries = row["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise BadRow("summaries are not two mappings with text")
    beside = {"annotator": row["worker"]} if row.get("worker") is not None else {}
    first, second = (summary.get("text") for summary in summaries)
    better = better_of(row["choice"], "choice")
    return Comparison(_task(row["info"]), first, second, better, ("choice", row["choice"]), beside)


def _task(info: object) -> str:
    """Return the text to be summarised as TRL's `tldr-preference` writes it: subreddit, title and post where they are there."""
    if not isinstance(info, Mapping):
        raise BadRow("info is no mapping with a post or an article")
    post = info.get("post") or info.get("article")
    if not isinstance(post, str):
        raise BadRow("info holds neither a post nor an article")
    lines = [("SUBREDDIT", info.get("subreddit")), ("TITLE", info.get("title"))]
    head = "".join(f"{name}: {'r/' if name == 'SUBREDDIT' else ''}{text}\n\n" for name, text in lines if text)
    return f"{head}{'POST' if info.get('post') else 'ARTICLE'}: {post}\n\nTL;DR:"


SUMMARIES = Layout(
    "summarize-from-feedback",
    "`info` with `post` or `article`, `summaries`, `choice` (the index of the better one)",
    columns=("info", "summaries", "choice"),
    compares=comparison,
)
