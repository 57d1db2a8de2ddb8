"""Rows of every layout that people have: six each, `yes` the better answer, the label's side by turns."""

from typing import Any

from rlhf.data.rows import assistant_turn, user_turn

ROWS = range(6)


def said(i: int, side: int) -> str:
    """Return the answer at one of two places: the better one stands first in even rows."""
    return f"{'yes' if i % 2 == side else 'no'} {i}"


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def talk(i: int, answer_text: str) -> list[dict[str, Any]]:
    return [turn("user", f"say {i}"), turn("assistant", answer_text)]


def canonical(i: int, **columns: Any) -> dict[str, Any]:
    answers = {"chosen": assistant_turn(f"yes {i}"), "rejected": assistant_turn(f"no {i}")}
    return {"prompt": user_turn(f"say {i}"), **answers, **columns}


def with_system(i: int) -> dict[str, Any]:
    return canonical(i) | {"prompt": [turn("system", "be brief"), turn("user", f"say {i}")]}


PARTS = [{"type": "text", "text": "say "}, {"type": "text", "text": "{}"}]
# name → a row, and the canonical row that it must become.
TABLE: dict[str, tuple[Any, Any]] = {
    "UltraFeedback binarized": (
        lambda i: {
            "prompt": f"say {i}",
            "chosen": talk(i, f"yes {i}"),
            "rejected": talk(i, f"no {i}"),
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        lambda i: canonical(i, rating_gap=3.0),
    ),
    "Tulu 3": (
        lambda i: {"id": f"{i}", "prompt": f"say {i}", "chosen": talk(i, f"yes {i}"), "rejected": talk(i, f"no {i}")},
        lambda i: canonical(i, id=f"{i}"),
    ),
    "PKU-SafeRLHF": (
        lambda i: {
            "prompt": f"say {i}",
            "response_0": said(i, 0),
            "response_1": said(i, 1),
            "better_response_id": i % 2,
            "safer_response_id": 1 - i % 2,
        },
        canonical,
    ),
    "summarize-from-feedback": (
        lambda i: {
            "info": {"id": "x", "post": f"long {i}", "title": "t", "subreddit": "cats"},
            "summaries": [{"text": said(i, 0), "policy": "a"}, {"text": said(i, 1), "policy": "b"}],
            "choice": i % 2,
            "worker": "w",
        },
        lambda i: (
            canonical(i, annotator="w")
            | {"prompt": user_turn(f"SUBREDDIT: r/cats\n\nTITLE: t\n\nPOST: long {i}\n\nTL;DR:")}
        ),
    ),
    "WebGPT": (
        lambda i: {
            "question": {"full_text": f"say {i}"},
            "answer_0": said(i, 0),
            "answer_1": said(i, 1),
            "score_0": 0.5 if i % 2 == 0 else -0.5,
            "score_1": -0.25 if i % 2 == 0 else 0.25,
        },
        lambda i: canonical(i, rating_gap=0.75),
    ),
    "arena": (
        lambda i: {
            "winner": "model_a" if i % 2 == 0 else "model_b",
            "conversation_a": talk(i, said(i, 0)),
            "conversation_b": talk(i, said(i, 1)),
            "judge": "ann",
        },
        lambda i: canonical(i, annotator="ann"),
    ),
    "arena, ties": (
        lambda i: {
            "winner": "tie" if i % 2 == 0 else "tie (bothbad)",
            "conversation_a": talk(i, f"yes {i}"),
            "conversation_b": talk(i, f"no {i}"),
        },
        lambda i: canonical(i, confidence=0.5),
    ),
    "SHP": (
        lambda i: {
            "history": f"say {i}",
            "human_ref_A": said(i, 0),
            "human_ref_B": said(i, 1),
            "labels": 1 - i % 2,
            "score_A": 9 if i % 2 == 0 else 3,
            "score_B": 3 if i % 2 == 0 else 9,
            "domain": "askbaking_test",
        },
        lambda i: canonical(i, rating_gap=6.0, subset="askbaking_test"),
    ),
    "Orca DPO pairs": (
        lambda i: {"system": "be brief", "question": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"},
        with_system,
    ),
    "Argilla, Notus": (
        lambda i: {
            "input": f"say {i}",
            "generations": ["a", "b"],
            "chosen": f"yes {i}",
            "rejected": f"no {i}",
            "chosen-rating": 5.0,
            "rejected-rating": 3.5,
        },
        lambda i: canonical(i, rating_gap=1.5),
    ),
    "Argilla, responses": (
        lambda i: {
            "instruction": f"say {i}",
            "chosen_response": f"yes {i}",
            "rejected_response": f"no {i}",
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 2.0,
        },
        lambda i: canonical(i, rating_gap=3.0),
    ),
    "ShareGPT, ranking": (
        lambda i: {
            "conversations": [{"from": "human", "value": f"say {i}"}],
            "chosen": {"from": "gpt", "value": f"yes {i}"},
            "rejected": {"from": "gpt", "value": f"no {i}"},
            "system": "be brief",
        },
        with_system,
    ),
    "LlamaFactory, messages": (
        lambda i: {
            "messages": [turn("user", f"say {i}")],
            "chosen": turn("assistant", f"yes {i}"),
            "rejected": turn("assistant", f"no {i}"),
        },
        canonical,
    ),
    "Alpaca, ranking": (
        lambda i: {"instruction": "say", "input": f"{i}", "chosen": f"yes {i}", "rejected": f"no {i}"},
        lambda i: canonical(i) | {"prompt": user_turn(f"say\n{i}")},
    ),
    "Alpaca, two outputs and a history": (
        lambda i: {"instruction": f"say {i}", "input": "", "output": [f"yes {i}", f"no {i}"], "history": [["Q", "A"]]},
        lambda i: canonical(i) | {"prompt": [turn("user", "Q"), turn("assistant", "A"), turn("user", f"say {i}")]},
    ),
    "content as parts": (
        lambda i: {
            "prompt": [turn("user", [PARTS[0], {"type": "text", "text": f"{i}"}])],
            "chosen": [turn("assistant", [{"type": "text", "text": f"yes {i}"}])],
            "rejected": [turn("assistant", [{"type": "text", "text": f"no {i}", "image_url": None}])],
        },
        canonical,
    ),
    "Label Studio, pairwise": (
        lambda i: {
            "id": i,
            "data": {"prompt": f"say {i}", "answer1": said(i, 0), "answer2": said(i, 1)},
            "annotations": [
                {
                    "completed_by": {"id": 1, "email": "a@x.org"},
                    "result": [
                        {
                            "from_name": "comparison",
                            "to_name": "answer1,answer2",
                            "type": "pairwise",
                            "value": {"selected": "left" if i % 2 == 0 else "right"},
                        }
                    ],
                }
            ],
        },
        lambda i: canonical(i, annotator="a@x.org", id=str(i)),
    ),
    "Label Studio, JSON-MIN": (
        lambda i: {
            "id": i,
            "annotation_id": i,
            "prompt": f"say {i}",
            "first": said(i, 0),
            "second": said(i, 1),
            "preference": [{"selected": "left" if i % 2 == 0 else "right"}],
            "annotator": "a@x.org",
        },
        lambda i: canonical(i, annotator="a@x.org", id=str(i)),
    ),
    "Argilla, records": (
        lambda i: {
            "id": f"{i}",
            "fields": {"prompt": f"say {i}", "first": said(i, 0), "second": said(i, 1)},
            "suggestions": {},
            "responses": {"preference": [{"value": "first" if i % 2 == 0 else "second", "user_id": "u"}]},
        },
        lambda i: canonical(i, id=f"{i}", annotator="u"),
    ),
    "Argilla 1, records": (
        lambda i: {
            "fields": {"prompt": f"say {i}", "first": said(i, 0), "second": said(i, 1)},
            "responses": [
                {
                    "values": {"preference": {"value": "first" if i % 2 == 0 else "second"}},
                    "user_id": "u",
                    "status": "submitted",
                },
                {"values": {"preference": {"value": "first"}}, "user_id": "v", "status": "discarded"},
            ],
        },
        lambda i: canonical(i, annotator="u"),
    ),
    "Argilla, records flat": (
        lambda i: {
            "prompt": f"say {i}",
            "first": said(i, 0),
            "second": said(i, 1),
            "preference.responses": ["second" if i % 2 == 0 else "first", "first" if i % 2 == 0 else "second"],
            "preference.responses.users": ["v", "u"],
            "preference.responses.status": ["discarded", "submitted"],
        },
        lambda i: canonical(i, annotator="u"),
    ),
    "Argilla, a ranking": (
        lambda i: {
            "fields": {"prompt": f"say {i}", "response-1": said(i, 0), "response-2": said(i, 1)},
            "responses": {
                "preference": [
                    {"value": [{"value": "response-1", "rank": 1 + i % 2}, {"value": "response-2", "rank": 2 - i % 2}]}
                ]
            },
        },
        lambda i: canonical(i, annotator="unnamed"),
    ),
}
