"""An answer that was cut off is trained, labelled, chosen and judged without an end token, as PPO reads it."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data.labels import Question, Verdict, question_id, read_questions, tally
from rlhf.data.rows import Pair, assistant_turn, has_ended, user_turn
from rlhf.data.sources import Source, read_pairs
from rlhf.evaluation.pairs import score_pairs
from rlhf.files import write_jsonl
from rlhf.models.demonstrations import encode_demonstrations
from rlhf.pipeline.sampling import _candidates
from rlhf.reward.attributes import AttributeRewardTrainer
from rlhf.reward.denoise import flip_pair
from rlhf.reward.load import load_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.rankings import RankingRewardTrainer
from rlhf.reward.sides import side_features, side_scores
from rlhf.reward.trainer import PairRewardTrainer

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


def test_scores_and_features_of_pairs_are_those_of_their_flags(tiny_reward: RewardModel) -> None:
    by_hand = tiny_reward.score([PROMPT] * 2, ["a fr", "a frog"], ended=[False, True])
    assert side_scores(tiny_reward, PAIRS, "rejected").tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    assert score_pairs(tiny_reward, PAIRS).rejected.tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    features = tiny_reward.features([PROMPT] * 2, ["a leaf"] * 2, ended=[True, False])
    assert side_features(tiny_reward, PAIRS, "chosen").flatten().tolist() == pytest.approx(
        features.flatten().tolist(), abs=1e-6
    )
    first, second = score_pairs(tiny_reward, PAIRS).chosen
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
