"""The arithmetic of an estimate: rows, tokens and steps of each kind of stage, memory of the roles, seconds as a sum."""

import math
import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig
from trl import RewardConfig, SFTConfig

from rlhf.cost.batches import longest_of, stretches_of, unpadded_shapes
from rlhf.cost.estimate import ONE_PROCESS, Estimator
from rlhf.cost.memory import MOMENTS, Memory, Processes
from rlhf.cost.sizes import PairTokens, Sizes, _compared
from rlhf.cost.slices import Shape, Slices
from rlhf.cost.work import PairWork, PpoWork, Rollouts, SamplingWork, SftWork, Training
from rlhf.models.load import model_settings
from rlhf.models.packing import LONG_ROW
from rlhf.reward.collator import PairCollator

LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, vocab_size=200)
LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
BELOW_HEAD = 4 * (200 * 64 + 3 * LAYER + 64)
POLICY = BELOW_HEAD + 4 * 200 * 64  # the output embedding is its own
SIZES = Sizes(
    {},
    prompts=[10, 12],
    answers=[5, 7],
    demonstrations=[16, 18],
    pairs=[PairTokens(11, 17, 17), PairTokens(10, 15, 17), PairTokens(12, 17, 19)],
)
ADAPTED = {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
ADAPTER = 4 * 3 * 2 * 4 * (64 + 64)
TRAINED = 1 + 1 + MOMENTS  # weights, gradients, moments
PAIRS = PairWork("round-1/reward", "reward", pairs=200, trained=200, scored=60)


def estimator(
    *, config: PretrainedConfig = LLAMA, reward_models: int = 1, processes: Processes = ONE_PROCESS, **ppo_model: Any
) -> Estimator:
    arguments = {"output_dir": "nowhere", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    arguments |= {"num_train_epochs": 2, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 4}
    whole = model_settings({})
    reward = Training(whole, RewardConfig(**arguments))
    training = {
        "sft": Training(whole, SFTConfig(**arguments, gradient_accumulation_steps=2, max_length=17)),
        "vote": reward,
        "reward": reward,
        "ppo": Training(model_settings(ppo_model), RewardConfig(**arguments | {"per_device_train_batch_size": 8})),
    }
    rollouts = Rollouts(
        size=16,
        max_prompt_length=11,
        max_answer_length=12,
        epochs=2,
        mini_batches=2,
        steps=4,
        reward_models=reward_models,
    )
    costs = Estimator(config, SIZES, training, rollouts, processes)
    costs.process = 0.0
    return costs


def test_rows_tokens_and_steps_of_every_kind_of_stage() -> None:
    costs = estimator()
    sft = costs.estimate(SftWork("round-0/sft", rows=300))
    assert (sft.folder, sft.rows) == ("round-0/sft", 300)
    assert sft.tokens == 300 * 2 * 16.5, "demonstrations are cut at max_length"
    assert sft.steps == 2 * 10, "19 batches an epoch, two to a step, a ragged step at the end"
    reward = costs.estimate(PAIRS)
    assert (reward.rows, reward.tokens, reward.steps) == (200, 200 * 2 * (11 + 2 * 6), 2 * 13)
    ppo = costs.estimate(PpoWork("round-1/ppo", rollouts=3))
    assert (ppo.rows, ppo.tokens, ppo.steps) == (3 * 16, 3 * 16 * 16, 3 * 4)
    sampled = costs.estimate(SamplingWork("round-2/sample", answers=40, is_scored=False))
    assert (sampled.rows, sampled.tokens, sampled.steps) == (40, 40 * 16, 0)
    assert all(stage.bytes > 0 and stage.seconds > 0 for stage in (sft, reward, ppo, sampled))


def test_what_pairs_are_trained_with_multiplies_what_it_should() -> None:
    costs, plain = estimator(), 200 * 2 * 23
    fields = vars(PAIRS)
    three = costs.estimate(PairWork(**fields | {"models": 3}))
    assert (three.rows, three.tokens, three.steps) == (200, 3 * plain, 3 * 26)
    folds = costs.estimate(PairWork(**fields | {"section": "vote", "models": 4, "trained": 150, "scored": 50.0}))
    assert (folds.rows, folds.tokens, folds.steps) == (200, 4 * plain * 0.75, 4 * 2 * 10)
    contrastive = costs.estimate(PairWork(**fields | {"views": 2}))
    assert (contrastive.tokens, contrastive.steps) == (2 * plain, 26)
    encoder = BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2)
    alone = estimator(config=encoder).estimate(PAIRS)
    assert (alone.tokens, alone.steps) == (200 * 2 * 2 * (11 + 6), 26), "an encoder reads the prompt twice"


THREE = [PairTokens(10, 14, 13, "g", (0, 1)), PairTokens(10, 14, 15, "g", (0, 2)), PairTokens(10, 13, 15, "g", (1, 2))]


def test_answers_that_several_pairs_compare_are_read_once() -> None:
    """Three answers of 4, 3 and 5 tokens to a prompt of 10 make three pairs, of 22 tokens together where each by itself has 18."""
    sizes = replace(SIZES, pairs=THREE)

    def tokens(config: PretrainedConfig, **fields: Any) -> int:
        costs = estimator(config=config)
        costs.sizes = sizes
        return costs.estimate(PairWork(**vars(PAIRS) | {"pairs": 300, "trained": 300} | fields)).tokens

    once = 10 + 4 + 3 + 5
    assert tokens(LLAMA) == 2 * 100 * once
    assert tokens(LLAMA, trained=100, answers=3.0) == 2 * 100 * once, "100 rankings"
    of_pairs = 2 * (14 + 13 + 15)
    encoder = BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2)
    assert tokens(encoder) == 2 * 100 * of_pairs, "an encoder reads both texts of each pair"
    assert tokens(encoder, trained=100, answers=3.0) == 2 * 100 * of_pairs / 2, "each answer of a ranking once"
    on_trunk = tokens(LLAMA, section="vote", top_layers=1)
    assert on_trunk == 2 * 100 * (of_pairs - 3 * 10), "a trunk reads each pair, its prompt once"


def test_batches_are_those_of_the_collator() -> None:
    """Rows and width, of groups of two to five answers beside pairs by themselves, as the trainer's collator lays them out."""
    rng = random.Random(0)
    rows: list[Any] = []
    for group in ("a", "b", "c", None, None):
        prompt = rng.choices(range(100, 200), k=rng.randint(3, 20))
        answers = [
            [i, *rng.choices(range(9, 99), k=rng.randint(0, 30))] for i in range(rng.randint(2, 5) if group else 2)
        ]
        for one, other in combinations(answers, 2):
            rows.append({"chosen_ids": prompt + one, "rejected_ids": prompt + other, "group": group})
    long_row = LONG_ROW * LLAMA.hidden_size
    collated = PairCollator(pad_token_id=0, shared=True, long_row=long_row)(rows)
    chosen, rejected = ([row[f"{side}_ids"] for row in rows] for side in ("chosen", "rejected"))
    (batch,) = estimator()._batches(_compared(rows, chosen, rejected), len(rows), PAIRS)
    assert (batch.shape.rows, batch.shape.length) == tuple(collated["input_ids"].shape)
    assert batch.tokens == (collated["segments"] >= 0).sum()
    assert batch.texts == len(collated["ends"])


def test_pairs_over_max_length_are_left_out() -> None:
    """Of three kinds of pairs one is too long, so a third of the rows is not trained on, and the others are shorter."""
    costs = estimator()
    costs.training["reward"].args.max_length = 17
    reward = costs.estimate(PAIRS)
    assert (reward.rows, reward.steps) == (133, 2 * 9)
    assert reward.tokens == 133 * 2 * (23 + 22) / 2


def test_what_autocast_leaves_alone_is_timed_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the seconds under autocast in place of a clock: reward models score without it, as answers are sampled without it."""
    monkeypatch.setattr(
        Slices,
        "seconds",
        lambda self, _, *, training: (3.0 if training else 1.0) * (0.5 if self.autocast else 1.0),
    )
    monkeypatch.setattr(Slices, "seconds_of_update", lambda _: 0.5)
    monkeypatch.setattr(Slices, "seconds_of_sampling", lambda *_: 10.0)
    costs = estimator(reward_models=2)
    costs.training["reward"].args.bf16 = costs.training["ppo"].args.bf16 = True
    assert costs.estimate(PAIRS).seconds == 26 * (1.5 + 0.5) + 2 * 0.5 + 2
    ppo = 3 * (10 + 2 * (3 * 0.5 + 2) + 2 * (2 * 3 + 2 * 2 * 0.5))
    assert costs.estimate(PpoWork("p", rollouts=3)).seconds == ppo
    on_trunk = PairWork(**vars(PAIRS) | {"top_layers": 1})  # of three: its own training reads a third, three times
    # 13 batches for the trunk's two thirds; 26 of training, and 60 pairs of scores, for the layer above.
    assert costs.estimate(on_trunk).seconds == pytest.approx(13 * 2 / 3 + (26 * 3 + 60 / 16) / 3)


def test_seconds_are_those_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 second a forward, 3 with a backward, 0.5 an update and 10 for whatever is sampled at once in place of a clock."""
    monkeypatch.setattr(Slices, "seconds", lambda _, shape, *, training: 3.0 if training else 1.0)
    monkeypatch.setattr(Slices, "seconds_of_update", lambda _: 0.5)
    monkeypatch.setattr(Slices, "seconds_of_sampling", lambda *_: 10.0)
    costs = estimator(reward_models=2)
    assert costs.estimate(SftWork("s", rows=300)).seconds == 2 * 19 * 3 + 20 * 0.5
    # Both forwards are compared on the first batch; 120 texts are scored, 64 at once.
    training, scoring, comparison = 26 * (3 + 0.5), 2, 2
    assert costs.estimate(PAIRS).seconds == training + comparison + scoring
    ascending = PairWork(**vars(PAIRS) | {"ascent": (8, 5), "models": 3})
    assert costs.estimate(ascending).seconds == 3 * (training + comparison + 26 * 3 + scoring)
    # Answers are sampled once for all models, 32 at a time; each scores them, and the texts of its certificate in two
    # precisions, the long one in one.
    calibrated = PairWork(**vars(PAIRS) | {"calibrated": 256, "golden": (30, 30, 300), "models": 2})
    each = training + comparison + scoring + 256 / 64 + 2 * 2 + 1
    assert costs.estimate(calibrated).seconds == 10 * 256 / 32 + 2 * each
    # Sampling; two micro-batches through policy, reference, critic and two reward models; two epochs with two updates of each.
    ppo = 3 * (10 + 2 * 5 + 2 * (2 * 6 + 2 * 2 * 0.5))
    assert costs.estimate(PpoWork("p", rollouts=3)).seconds == ppo
    assert costs.estimate(PpoWork("p", rollouts=3, tried=16)).seconds == ppo + 10
    sampling = 10 * 40 / 32
    assert costs.estimate(SamplingWork("e", answers=40, is_scored=False)).seconds == sampling
    compared = SamplingWork("e", answers=40, is_scored=True, compared=20)
    assert costs.estimate(compared).seconds == sampling + 2 + 2, (
        "a batch of scores by both reward models, one of two policies' forwards"
    )


def test_models_on_a_trunk_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the layers is each model's own: the others are read once over all pairs, and nothing there is trained."""
    monkeypatch.setattr(Slices, "seconds", lambda self, shape, *, training: 3.0)
    shape = {"section": "vote", "models": 4, "trained": 150, "scored": 50.0}
    costs = estimator()
    whole = costs.estimate(PairWork(**vars(PAIRS) | shape))
    above = costs.estimate(PairWork(**vars(PAIRS) | shape | {"top_layers": 1}))
    assert (above.rows, above.tokens, above.steps) == (whole.rows, whole.tokens, whole.steps)
    monkeypatch.setattr(Slices, "peak", lambda *_, **__: 0.0)
    member = estimator().estimate(PairWork(**vars(PAIRS) | shape | {"top_layers": 1})).memory
    assert member.activations == TRAINED * 4 * LAYER, "the layers of the member that is being trained"
    all_batches, batches, epochs = 13, 10, 2
    assert above.seconds == pytest.approx(3.0 * (2 / 3 * all_batches + 4 / 3 * (epochs * batches * 3 + 50 / 16)))


def state(memory: Memory) -> float:
    """Bytes of weights, gradients and moments of a process."""
    return sum(share.weights + share.gradients + share.moments for share in memory.shares)


def test_memory_is_weights_gradients_and_moments_of_four_roles() -> None:
    whole = estimator()
    shape = Shape(8, whole.prompt + whole.answer, whole.answer)
    expected = TRAINED * (POLICY + BELOW_HEAD) + POLICY + BELOW_HEAD
    memory = whole.memory("ppo", shape)
    assert state(memory) == expected
    assert [share.name for share in memory.shares] == ["policy", "critic", "reference", "reward"]
    assert state(estimator(reward_models=3).memory("ppo", shape)) == expected + 2 * BELOW_HEAD
    # One base; policy and critic with gradients and moments, reference and reward without.
    adapted = estimator(use_peft=True, **ADAPTED).memory("ppo", shape)
    assert state(adapted) == POLICY + 2 * TRAINED * ADAPTER + 2 * ADAPTER
    assert adapted.bytes > state(adapted) - (1 + 1) * ADAPTER


def test_memory_of_one_model() -> None:
    """Gradients come while activations go: the larger of both is there at once, or their sum where gradients stay."""
    costs = estimator()
    small, large = Shape(1, 2, 0), Shape(64, 40, 0)
    assert costs.memory("reward", small).bytes == TRAINED * BELOW_HEAD
    peak = costs._peak("reward", large, training=True)
    assert costs.memory("reward", large).bytes == (1 + MOMENTS) * BELOW_HEAD + peak > TRAINED * BELOW_HEAD
    both = Shape(16, 20, 20)  # of SFT, which accumulates
    assert costs.memory("sft", both).bytes == TRAINED * POLICY + costs._peak("sft", both, training=True)


@pytest.mark.parametrize("model", [{}, {"use_peft": True, **ADAPTED}])
def test_a_process_of_several_holds_its_part_under_fsdp2_and_everything_under_ddp(model: dict[str, Any]) -> None:
    shape = Shape(8, 18, 7)
    one = estimator(**model).memory("ppo", shape)
    assert one.exchanged == 0
    assert estimator(processes=Processes(1, "fsdp2"), **model).memory("ppo", shape) == one
    trained = POLICY + BELOW_HEAD if not model else 2 * ADAPTER
    for count in (2, 8):
        sharded = estimator(processes=Processes(count, "fsdp2"), **model).memory("ppo", shape)
        assert state(sharded) == pytest.approx(state(one) / count, rel=1e-12)
        assert sharded.activations == one.activations
        copied = estimator(processes=Processes(count, "ddp"), **model).memory("ppo", shape)
        assert (copied.shares, copied.activations) == (one.shares, one.activations)
        assert (copied.exchanged, copied.bytes) == (trained, one.bytes + trained)


def test_what_is_whole_for_now_under_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers and what is no layer, with their gradients; in a rollout every role."""
    processes = Processes(4, "fsdp2")
    layer, embedding, norm = 4 * LAYER, 4 * 200 * 64, 4 * 64
    sft = estimator(processes=processes).memory("sft", Shape(4, 17, 17))
    assert sft.exchanged == 2 * (2 * layer + 2 * embedding + norm)
    update = estimator(processes=processes).memory("ppo", Shape(8, 18, 7))
    assert update.exchanged == 2 * (2 * layer + (2 * embedding + norm) + (embedding + norm))
    # With an adapter there is one base, of whose gradients only the adapter's are exchanged.
    adapted = estimator(processes=processes, use_peft=True, **ADAPTED)
    assert adapted.memory("ppo", Shape(8, 18, 7)).exchanged == 2 * (layer + 2 * ADAPTER / 3) + 2 * embedding + norm
    monkeypatch.setattr(Slices, "peak", lambda *_, **__: 0.0)  # so that weights decide which moment is the peak
    rollout = estimator(processes=processes).estimate(PpoWork("p", rollouts=3)).memory
    assert rollout.exchanged == 2 * (POLICY + BELOW_HEAD)


def test_weights_in_4_bits_stay_whole_under_fsdp2() -> None:
    """Of a 4-bit base only adapters, embeddings, norm and head are divided; what is not in 4 bits is in bfloat16."""
    quantised = {"use_peft": True, "load_in_4bit": True, **ADAPTED}
    one, four = (
        estimator(processes=Processes(count, "fsdp2"), **quantised).memory("ppo", Shape(8, 18, 7)).shares[0].weights
        for count in (1, 4)
    )
    base = 2 * 3 * LAYER * 4.5 / 16
    assert one == base + POLICY / 2 - 2 * 3 * LAYER + ADAPTER
    assert four == base + (one - base) / 4


def test_tokens_and_steps_of_one_process_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows, so half of the steps where a batch is twice as large; the rows are still those of the stage."""
    monkeypatch.setattr(Slices, "seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(Slices, "seconds_of_update", lambda _: 0.5)
    monkeypatch.setattr(Slices, "seconds_of_sampling", lambda *_: 10.0)
    one, two = estimator(), estimator(processes=Processes(2, "ddp"))
    works = [SftWork("s", rows=300), PAIRS, PpoWork("p", rollouts=3)]
    for work, steps in zip(works, (2 * 5, 2 * 7, 3 * 4), strict=True):
        alone, shared = one.estimate(work), two.estimate(work)
        assert shared.steps == steps
        if isinstance(work, PpoWork):  # rollouts are told for each process
            assert (shared.rows, shared.tokens, shared.seconds) == (2 * alone.rows, alone.tokens, alone.seconds)
        else:
            assert (shared.rows, shared.tokens) == (alone.rows, alone.tokens / 2)
            assert shared.seconds < alone.seconds
    # What one process does while the others wait is not divided.
    sampled = SamplingWork("e", answers=40, is_scored=True, compared=20)
    assert two.estimate(sampled) == one.estimate(sampled)


def test_policies_and_reward_model_of_an_evaluation_have_a_base_each() -> None:
    sampled = estimator().estimate(SamplingWork("s", answers=4, is_scored=False)).bytes
    evaluated = estimator().estimate(SamplingWork("e", answers=4, is_scored=True)).bytes
    assert evaluated - sampled >= POLICY + BELOW_HEAD


def test_the_longest_of_a_batch() -> None:
    assert longest_of([7], 3) == 7
    assert longest_of([1, 9], 100) == 9
    assert longest_of([1, 9], 1) in (4, 5, 6)


def test_packed_demonstrations_are_full_rows() -> None:
    """300 of 16.5 tokens fill 155 rows of 32: ten steps of 16 in place of 19, of the widest shape there is."""
    costs = estimator()
    args: Any = costs.training["sft"].args
    args.max_length = 32
    plain = costs.estimate(SftWork("round-0/sft", rows=300))
    args.packing = True
    packed = costs.estimate(SftWork("round-0/sft", rows=300))
    rows = math.ceil(300 * 17 / 32)
    assert packed.tokens == plain.tokens == 300 * 17 * 2
    assert packed.steps == 2 * math.ceil(math.ceil(rows / 16) / 2) < plain.steps
    assert packed.bytes > plain.bytes, "a batch of 16 full rows"


def test_memory_of_ppo_is_that_of_a_policy_that_does_not_end() -> None:
    """Answers in the file have 5 and 7 tokens; those that are sampled may have all that the recipe allows."""
    short, long = estimator(), estimator()
    long.rollouts = replace(long.rollouts, max_answer_length=200)
    long = Estimator(long.config, long.sizes, long.training, long.rollouts, long.processes)
    long.process = 0.0
    (usual, largest), (_, largest_of_long) = short._unpadded(8), long._unpadded(8)
    assert usual == long._unpadded(8)[0], "time stays that of such answers"
    assert largest.rows * largest.answer == 8 * 12
    assert largest_of_long.rows * largest_of_long.answer == 8 * 200
    work = PpoWork("round-1/ppo", rollouts=1)
    assert long.estimate(work).bytes > 2 * short.estimate(work).bytes


def test_answers_that_are_not_sampled_together_are_not_in_memory_together() -> None:
    """Keys and values of 3 answers in place of 16 in PPO, and of 32 elsewhere; what has to be sampled stays."""
    whole, parts = estimator(), estimator()
    parts.rollouts = replace(whole.rollouts, batch=3)
    assert (whole.rollouts.together, whole.rollouts.together_elsewhere) == (16, 32)
    assert (parts.rollouts.together, parts.rollouts.together_elsewhere) == (3, 3)
    sampling = SamplingWork("round-2/sample", answers=40, is_scored=False)
    before, after = (costs.estimate(sampling) for costs in (whole, parts))
    assert after.bytes < before.bytes
    assert (after.rows, after.tokens) == (before.rows, before.tokens)
    assert after.seconds > 0
    memories = [costs._memory_of_sampling().activations for costs in (whole, parts)]
    peaks = [
        costs._peak("ppo", Shape(n, costs.longest_prompt, 1), training=False) for costs, n in ((whole, 32), (parts, 3))
    ]
    assert (memories[1] - peaks[1]) / (memories[0] - peaks[0]) == pytest.approx(3 / 32)


def test_rows_leave_the_batch_where_answers_end() -> None:
    """Half of the answers have 10 tokens and half 40: one stretch for all, and two that half of them write."""
    first, second, third = stretches_of([10, 40], 100)
    assert first == (16.0, 100.0)
    assert (second[0], third[0]) == (16.0, 8.0)
    assert second[1] == third[1] == pytest.approx(50, abs=2)
    # Of a single answer every second one needs them, and then it is alone.
    (_, one), (tokens, alone), _ = stretches_of([10, 40], 1)
    assert (one, alone) == (1.0, 1.0)
    assert tokens == pytest.approx(8, abs=1.5)


def test_without_padding_a_batch_is_as_large_as_its_tokens() -> None:
    """Prompts of 10 to 500 tokens and answers of 1 to 200: a padded batch of 16 would be more than twice as large."""
    prompts, answers = list(range(10, 500, 10)), list(range(1, 200, 5))
    mean, largest = unpadded_shapes(prompts, answers, 16, long_row=1500, limit=200)
    tokens = 16 * (sum(prompts) / len(prompts) + sum(answers) / len(answers))
    assert tokens <= mean.rows * mean.length < 1.2 * tokens
    assert mean.rows * mean.answer == pytest.approx(16 * sum(answers) / len(answers), abs=mean.rows)
    assert mean.rows * mean.length < 0.6 * 16 * (longest_of(prompts, 16) + longest_of(answers, 16))
    assert largest.rows * largest.length > mean.rows * mean.length


def test_ppo_is_estimated_without_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of a forward or backward costs a second in place of a clock; sampling and updates cost nothing."""
    monkeypatch.setattr(Slices, "seconds", lambda _, shape, *, training: float(shape.rows * shape.length))
    monkeypatch.setattr(Slices, "seconds_of_update", lambda _: 0.0)
    monkeypatch.setattr(Slices, "seconds_of_sampling", lambda *_: 0.0)
    costs = estimator()
    costs.prompts, costs.answers = list(range(2, 90)), list(range(1, 60))
    places = costs.estimate(PpoWork("p", rollouts=1)).seconds / (4 + 2 * 2)  # forwards; two roles in two epochs
    assert places == pytest.approx(16 * (45.5 + 30), rel=0.2), "of 16 * 148 where every text is padded to the longest"
