"""An answer that was cut off is trained, labelled, chosen and judged without an end token, as PPO reads it."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig

from rlhf.data.canonical import demonstration
from rlhf.data.labels import Question, Verdict, question_id, read_questions, tally
from rlhf.data.messages import messages
from rlhf.data.rankings import comparisons, k_wise, message_tree, ranked_list, rated_entries, signed_strength
from rlhf.data.rows import Pair, assistant_turn, has_ended, label_digest, pair_digest, user_turn
from rlhf.data.sources import Source, read_pairs
from rlhf.evaluation.pairs import score_pairs
from rlhf.files import write_jsonl
from rlhf.models.demonstrations import encode_demonstrations
from rlhf.pipeline.known import relabelled
from rlhf.pipeline.looked import blind_questions, count_opinions
from rlhf.pipeline.sampling import _candidates
from rlhf.pipeline.trainers import StageSFTTrainer
from rlhf.ppo.remote import _sendable
from rlhf.reward.attributes import AttributeRewardTrainer
from rlhf.reward.denoise import attach_strength, flip_pair
from rlhf.reward.load import load_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.rankings import RankingRewardTrainer
from rlhf.reward.score_jsonl import score_lines
from rlhf.reward.sides import side_features, side_scores
from rlhf.reward.trainer import PairRewardTrainer
from rlhf.serve.models import Answer as AnswerText
from rlhf.serve.protocol import ClassifyBody

PROMPT = user_turn("name three green things")
PAIRS: list[Pair] = [
    {"prompt": PROMPT, "chosen": assistant_turn("a leaf"), "rejected": assistant_turn("a fr", ended=False)},
    {"prompt": PROMPT, "chosen": assistant_turn("a leaf", ended=False), "rejected": assistant_turn("a frog")},
]


@pytest.fixture(scope="module")
def tiny_reward(reward_folder: Path) -> RewardModel:
    return load_reward_model(reward_folder)


def test_training_reads_the_ids_that_ppo_scores(tiny_reward: RewardModel) -> None:
    """Pairs, rankings, ratings: ids of an answer are those of `encode` with the same flag, end token or none."""
    tokenizer = tiny_reward.tokenizer
    rows = Dataset.from_list([dict(row) for row in PAIRS])  # a table gives every message the key, most of them None
    expected = {
        side: tiny_reward.encode([PROMPT] * 2, [row[side][0]["content"] for row in PAIRS], ended)
        for side, ended in (("chosen", [True, False]), ("rejected", [False, True]))
    }
    batch = rows.to_dict()
    ids = PairRewardTrainer.tokenize(batch, tokenizer)
    assert [ids["chosen_ids"], ids["rejected_ids"]] == [expected["chosen"], expected["rejected"]]
    both = [list(two) for two in zip(expected["chosen"], expected["rejected"], strict=True)]
    assert AttributeRewardTrainer.tokenize(batch, tokenizer)["answer_ids"] == both
    assert RankingRewardTrainer.tokenize(batch, tokenizer)["answer_ids"] == both
    end = tokenizer.eos_token_id
    assert [row[-1] == end for row in (*expected["chosen"], *expected["rejected"])] == [True, False, False, True]


def test_a_demonstration_that_was_cut_off_teaches_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = {"prompt": [PROMPT] * 2, "completion": [assistant_turn("a leaf"), assistant_turn("a leaf", ended=False)]}
    whole, cut = encode_demonstrations(batch, tokenizer)["input_ids"]
    assert whole[: len(cut)] == cut
    assert whole[len(cut)] == tokenizer.eos_token_id


@pytest.mark.parametrize("packing", [False, True])
def test_the_stage_sft_teaches_no_end_behind_a_cut_demonstration(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    """Only rows with a typed special token took the way that heeds the flag: all others were trained to end."""
    answers = [assistant_turn("red dog", ended=ended) for ended in (True, False, True, False)]
    rows = Dataset.from_list([{"prompt": user_turn(f"list {i}"), "completion": a} for i, a in enumerate(answers)])
    args = SFTConfig(report_to="none", use_cpu=True, bf16=False, packing=packing, max_length=64)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    trainer = StageSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trained = [
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        for row in trainer.train_dataset
    ]
    assert sum(ids.count(tokenizer.eos_token_id) for ids in trained) == 2


def test_a_runs_own_samples_are_demonstrations_that_were_cut_where_they_say_so() -> None:
    rows = [{"prompt": "p", "completion": "an answer", "ended": ended} for ended in (True, False, None)]
    assert [has_ended(demonstration(row)["completion"]) for row in rows] == [True, False, True]


def test_one_text_cut_and_ended_is_two_answers() -> None:
    """Votes of 2 and -2 nats were attached as -2 and -2, and an expert's verdict on the one counted for the other."""
    whole, cut = (
        {"prompt": PROMPT, "chosen": assistant_turn("apple", ended=ended), "rejected": assistant_turn("no")}
        for ended in (True, False)
    )
    assert pair_digest(whole) != pair_digest(cut)
    votes = [
        {
            "pair": label_digest(row),
            "strength_mean": mean,
            "strength_std": 0.1,
            "strength_votes": 5,
            "strength_share": 0.9,
        }
        for row, mean in ((whole, 2.0), (cut, -2.0))
    ]
    assert attach_strength([whole, cut], votes).mean.tolist() == [2.0, -2.0]
    (asked,) = blind_questions([whole, cut], [1], 1, seed="s")
    assert (asked.first_ended if asked.first == "apple" else asked.second_ended) is False
    verdict = Verdict(asked.id, "first" if asked.first == "apple" else "second", "expert")
    looked = count_opinions([whole, cut], [asked], [verdict])
    assert (looked.agree.tolist(), looked.is_asked.tolist()) == ([0, 1], [False, True])
    assert len(relabelled([whole, cut], [whole, cut], torch.tensor([0.9, 0.9])).pairs) == 2


def test_scores_and_features_of_pairs_are_those_of_their_flags(tiny_reward: RewardModel) -> None:
    by_hand = tiny_reward.score([PROMPT] * 2, ["a fr", "a frog"], ended=[False, True])
    assert side_scores(tiny_reward, PAIRS, "rejected").tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    assert score_pairs(tiny_reward, PAIRS).scores_rejected.tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    features = tiny_reward.features([PROMPT] * 2, ["a leaf"] * 2, ended=[True, False])
    assert side_features(tiny_reward, PAIRS, "chosen").flatten().tolist() == pytest.approx(
        features.flatten().tolist(), abs=1e-6
    )
    first, second = score_pairs(tiny_reward, PAIRS).scores_chosen
    assert first != second, "one text, ended and cut, is two answers"


def test_the_flag_travels_from_the_sample_to_the_pair(tmp_path: Path) -> None:
    """Sampled, asked about, labelled, flipped, written and read again; nothing is written of answers that ended."""
    samples = [{"prompt": PROMPT, "completion": text, "ended": ended} for text, ended in (("a", True), ("b c", False))]
    write_jsonl(tmp_path / "samples.jsonl", samples)
    ((candidate,), _, _) = _candidates(tmp_path / "samples.jsonl")
    assert (candidate.first_ended, candidate.second_ended) == (True, False)
    assert candidate.swapped().swapped() == candidate
    assert candidate.swapped()[1:] == ("b c", "a", False, True)

    question = Question(question_id(1, PROMPT, ["a", "b c"]), 1, PROMPT, "a", "b c", second_ended=False)
    write_jsonl(tmp_path / "questions.jsonl", [question.as_row()])
    assert read_questions(tmp_path / "questions.jsonl") == [question]
    assert "first_ended" not in question.as_row()
    for label, chosen_ended in (("first", True), ("second", False)):
        (row,) = tally([question], [Verdict(question.id, label, "ann")]).rows
        assert has_ended(row["chosen"]) == chosen_ended
        assert has_ended(row["rejected"]) != chosen_ended
        flipped = flip_pair(row)
        assert has_ended(flipped["chosen"]) != chosen_ended
        write_jsonl(tmp_path / "pairs.jsonl", [row])
        (again,), _ = read_pairs(Source(str(tmp_path / "pairs.jsonl")))
        assert (again["chosen"], again["rejected"]) == (row["chosen"], row["rejected"])


def test_every_form_of_data_brings_the_flag() -> None:
    """Rankings, ranked lists, two responses, trees, rated answers; of a prompt's own turns nobody needs it."""
    cut = {"role": "assistant", "content": "a fr", "ended": False}
    whole = {"role": "assistant", "content": "a leaf"}
    k_wise_row = {
        "prompt": "q",
        "responses": [{"content": "a leaf", "score": 2}, {"content": "a fr", "score": 1, "ended": False}],
    }
    tree = {"prompt": {"role": "prompter", "text": "q", "replies": [
        {"role": "assistant", "text": "a leaf", "rank": 0}, {"role": "assistant", "text": "a fr", "rank": 1, "ended": False}]}}  # fmt: skip
    for rankings in (
        k_wise(k_wise_row),
        ranked_list([*PROMPT, whole, cut]),
        signed_strength({"prompt": "q", "response_1": cut, "response_2": whole, "preference_strength": 2}),
        message_tree(tree),
    ):
        (row,) = comparisons(rankings[0])
        assert (has_ended(row["chosen"]), has_ended(row["rejected"])) == (True, False)
    (entry,) = rated_entries({"messages": [*PROMPT, cut], "attributes": [{"helpfulness": 3}]})
    assert not entry.ended
    assert not rated_entries({"prompt": "q", "response": "a fr", "ended": False, "helpfulness": 3})[0].ended
    prompt = messages([*PROMPT, cut, *user_turn("and?")], "prompt")
    assert all("ended" not in turn for turn in prompt)


def test_lines_and_requests_that_say_it_are_read_so(tiny_reward: RewardModel) -> None:
    """`rlhf score`, by the object or by its last message; the server's bodies, by message or by `ended`."""
    (by_hand,) = tiny_reward.score([PROMPT], ["a fr"], ended=[False]).tolist()
    cut = {"role": "assistant", "content": "a fr", "ended": False}
    lines = [
        {"prompt": PROMPT, "response": "a fr", "ended": False},
        {"messages": [*PROMPT, cut]},
        {"prompt": PROMPT, "response": "a fr"},
    ]
    scores = [row["score"] for row in score_lines(tiny_reward, map(json.dumps, lines))]
    assert scores[:2] == pytest.approx([by_hand] * 2, abs=1e-6)
    assert scores[2] != pytest.approx(by_hand, abs=1e-3)
    for body in (
        ClassifyBody(messages=[*PROMPT, cut]),
        ClassifyBody(messages=[*PROMPT, {**cut, "ended": None}], ended=[False]),
    ):  # type: ignore[list-item]
        (text,) = body.texts()
        assert isinstance(text, AnswerText)
        assert not text.ended


def test_prompts_of_a_table_are_sent_without_its_empty_fields() -> None:
    rows = Dataset.from_list([{"prompt": PROMPT}, {"prompt": [{**PROMPT[0], "ended": False}]}]).to_list()
    assert rows[0]["prompt"][0]["ended"] is None
    assert _sendable(rows[0]["prompt"]) == PROMPT
    assert _sendable("as it is") == "as it is"


def test_ended_is_true_or_false_in_words_too(tmp_path: Path) -> None:
    """0 and "false", as a table gives it, were read as true."""
    table = tmp_path / "rated.csv"
    table.write_text("prompt,response,helpfulness,ended\nq,a leaf,4,true\nq,a fr,1,false\n")
    (pair,), _ = read_pairs(Source(str(table)))
    assert (has_ended(pair["chosen"]), has_ended(pair["rejected"])) == (True, False)
    lists = tmp_path / "lists.jsonl"
    rows = [
        {
            "prompt": prompt,
            "responses": [{"content": "a leaf", "score": 2}, {"content": "a fr", "score": 1, "ended": ended}],
        }
        for prompt, ended in (("q", "False"), ("r", 0))
    ]
    write_jsonl(lists, rows)
    (pair,), report = read_pairs(Source(str(lists)))
    assert not has_ended(pair["rejected"])
    assert any("'ended' is 0, and must be true or false" in sentence for sentence in report.sentences())


def test_a_cut_answer_that_just_fits_is_not_called_too_long(reward_folder: Path) -> None:
    """Where another line of its batch was too long, it was looked at again with an end token that it does not have."""
    reward = load_reward_model(reward_folder)
    line = {"prompt": PROMPT, "response": "red blue", "ended": False}
    reward.max_length = len(reward.encode([PROMPT], ["red blue"], [False])[0])
    longer = {"prompt": PROMPT, "response": "red blue green red blue"}
    just, over = score_lines(reward, [json.dumps(line), json.dumps(longer)])
    assert (just.get("cut"), over.get("cut"), reward.cut) == (None, True, 1)
