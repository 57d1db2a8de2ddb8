"""Planted faults, one of every kind of issue 26: each is caught by an invariant and named by its sentence; without it all hold."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rlhf.errors import UserError
from rlhf.files import file_digest
from rlhf.invariants.checks import Check
from rlhf.invariants.ends import ends_reachable, policy_ends
from rlhf.invariants.files import finished_files_unchanged
from rlhf.invariants.forward import batched_forward
from rlhf.invariants.ratio import check_ratio, largest_ratio_deviation
from rlhf.invariants.reference import START_WITHIN, check_fixed, check_start, mean_difference
from rlhf.invariants.tensors import nothing_lost
from rlhf.models.dropout import switch_off_dropout
from rlhf.models.generate import Completions, generate
from rlhf.models.load import load_policy, model_settings
from rlhf.models.logprobs import response_logprobs
from rlhf.pipeline.policy_checks import sampling_checks
from rlhf.reward.load import check_scores, load_reward_model
from tests.conftest import PROMPTS, WORDS

TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + 'CLOSE' }}{% endfor %}"
TEXTS = [(prompt, " ".join(WORDS[:n])) for prompt, n in zip(PROMPTS, (1, 4, 9), strict=False)]


class Things(NamedTuple):
    """What faults are planted into; every test has copies of its own."""

    model: Any
    tokenizer: Any
    base: Path
    reward: Path
    folder: Path


@pytest.fixture
def things(base_folder: Path, reward_folder: Path, tokenizer: Any, tmp_path: Path) -> Things:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    return Things(model, copy.deepcopy(tokenizer), base_folder, reward_folder, tmp_path)


# ---- The sample is not the policy's ----


def sampled(things: Things, **settings: Any) -> Completions:
    """Answers, with settings that act in the library's sampling although they are not ours."""
    own = things.model.generate

    def narrowed(*arguments: Any, generation_config: Any, **named: Any) -> Any:
        generation_config.update(**settings)
        return own(*arguments, generation_config=generation_config, **named)

    things.model.generate = narrowed
    answers = generate(things.model, things.tokenizer, [PROMPTS[i % 36] for i in range(64)], max_new_tokens=48)
    things.model.generate = own
    return answers


@torch.no_grad()
def sampler(**settings: Any) -> Callable[[Things], Check]:
    return torch.no_grad()(lambda things: sampling_checks(things.model, [sampled(things, **settings)], 1.0)[0])


def suppressed(things: Things) -> Check:
    with torch.no_grad():
        likely = torch.softmax(things.model(torch.arange(5, 37)[:, None]).logits[:, -1], dim=-1).mean(dim=0).topk(120)
        return sampling_checks(things.model, [sampled(things, suppress_tokens=likely.indices.tolist())], 1.0)[0]


@torch.no_grad()
def counts(**settings: Any) -> Callable[[Things], Check]:
    """The tokens of an almost uniform policy, whose surprise tells nothing."""

    def check(things: Things) -> Check:
        things.model.lm_head.weight.mul_(0.1)
        return sampling_checks(things.model, [sampled(things, **settings)], 1.0)[1]

    return torch.no_grad()(check)


def other_weights(things: Things) -> Check:
    with torch.no_grad():
        answers = sampled(things)
        things.model.lm_head.weight.mul_(1.3)
        return sampling_checks(things.model, [answers], 1.0)[0]


# ---- The policy is not the same twice, alone, or at the start ----


def logprobs(model: Any, answers: Completions) -> torch.Tensor:
    ids = torch.cat([answers.prompt_ids, answers.response_ids], dim=1)
    mask = torch.cat([answers.prompt_mask, answers.response_mask], dim=1)
    with torch.no_grad():
        return response_logprobs(model, ids, mask, answers.response_ids.shape[1], 1.0)


def ratio(model: Any, answers: Completions, change: Callable[[Any], object]) -> Check:
    """The ratio between sampling, in evaluation, and training, after a change."""
    old = logprobs(model, answers)
    change(model)
    model.train()
    new = logprobs(model, answers)
    model.eval()
    return check_ratio(largest_ratio_deviation(new, old, answers.response_mask).item(), torch.float32)


def dropout(things: Things, config: Any, network: Any, change: Callable[[Any], object]) -> Check:
    size = {"vocab_size": len(things.tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = network(config(**size, pad_token_id=0, bos_token_id=None, eos_token_id=1)).eval()
    return ratio(model, sampled(things), change)


def llama_dropout(change: Callable[[Any], object]) -> Callable[[Things], Check]:
    def config(**size: Any) -> LlamaConfig:
        return LlamaConfig(**size, intermediate_size=64, attention_dropout=0.3, initializer_range=0.3)

    return lambda things: dropout(things, config, LlamaForCausalLM, change)


def opt_dropout(change: Callable[[Any], object]) -> Callable[[Things], Check]:
    def config(**size: Any) -> OPTConfig:
        return OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, dropout=0.1, init_std=0.3)

    return lambda things: dropout(things, config, OPTForCausalLM, change)


def weights_that_move(things: Things) -> Check:
    def move(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight[7] += 0.1

    return ratio(things.model, sampled(things), move)


def sound_ratio(things: Things) -> Check:
    return ratio(things.model, sampled(things), lambda _: None)


def reference_that_moves(things: Things, *, is_shared: bool = True) -> Check:
    """A module trained as a whole on the base that the reference reads too."""
    answers = sampled(things)
    reference = things.model if is_shared else copy.deepcopy(things.model)
    before = logprobs(reference, answers)
    with torch.no_grad():
        things.model.lm_head.weight.add_(0.01 * torch.randn_like(things.model.lm_head.weight))
    return check_fixed(mean_difference(logprobs(reference, answers), before), torch.float32, exact=True)


def copy_without_embeddings(things: Things, *, is_whole: bool = False) -> Check:
    """LoRA on the embeddings, and a reference that took over the other factors alone."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    policy = get_peft_model(copy.deepcopy(things.model), adapter).eval()
    answers, reference = sampled(things), copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_embedding" in name and not is_whole:
                parameter.zero_()
    mask = answers.response_mask.bool()
    largest = (logprobs(policy, answers) - logprobs(reference, answers)).abs()[mask].max().item()
    return check_start(largest, START_WITHIN[torch.float32])


def forward_in_batch(things: Things, *, sees_padding: bool = True) -> Check:
    answers = sampled(things)
    ids = torch.cat([answers.prompt_ids, answers.response_ids], dim=1)[:8]
    mask = torch.cat([answers.prompt_mask, answers.response_mask], dim=1)[:8]
    ids[:, :3], mask[:, :3] = things.tokenizer.pad_token_id, 0
    length, keep = answers.response_ids.shape[1], answers.response_mask[:8].bool()
    with torch.no_grad():
        together = response_logprobs(things.model, ids, torch.ones_like(mask) if sees_padding else mask, length, 1.0)[
            keep
        ]
        alone = [
            response_logprobs(things.model, row[seen][None], torch.ones_like(row[seen][None]), int(n), 1.0)[0]
            for row, seen, n in zip(ids, mask.bool(), keep.sum(dim=1), strict=True)
        ]
    return batched_forward(torch.cat(alone), together, dtype=torch.float32)


# ---- Scores ----


def scores(change: Callable[[Any], object], name: str) -> Callable[[Things], Check]:
    """A change of an opened reward model; the check of this name."""

    def checked(things: Things) -> Check:
        reward = load_reward_model(things.reward, device="cpu")
        reward.checks.entries.clear()
        change(reward)
        try:
            check_scores(reward, TEXTS, name="reward")
        except UserError:
            assert not all(entry["held"] for entry in reward.checks.entries.values())
        entry = reward.checks.entries[name]
        return Check(name, entry["statistic"], entry["bound"], entry["unit"], entry["sentence"])

    return checked


def reads_the_padding(reward: Any) -> None:
    """The library's search for the last token that is not padding, by an id that pads nothing."""
    forward, config = reward.model.forward, reward.model.config.get_text_config()

    def wrong(*arguments: Any, **named: Any) -> Any:
        before, config.pad_token_id = config.pad_token_id, len(reward.tokenizer) - 1
        output = forward(*arguments, **named)
        config.pad_token_id = before
        return output

    reward.model.forward = wrong


def reads_a_token_before(reward: Any) -> None:
    encode = reward.encode
    reward.encode = lambda *arguments: [row[:-1] for row in encode(*arguments)]


def begins_twice(reward: Any) -> None:
    encode = reward.encode
    reward.encode = lambda *arguments: [[row[0], *row] for row in encode(*arguments)]


def mixes_rows(reward: Any) -> None:
    forward = reward.model.forward

    def wrong(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits = output.logits - 0.5 * output.logits.mean(dim=0)
        return output

    reward.model.forward = wrong


# ---- Files and tensors ----


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Things], Check]:
    """A change of the saved weights before they are compared with what was loaded."""

    def checked(things: Things) -> Check:
        things.model.save_pretrained(things.folder / "saved")
        model = load_policy(things.folder / "saved", model_settings({}))
        file = things.folder / "saved/model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})
        return nothing_lost(things.folder / "saved", model)

    return checked


def one_changed(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-3


def one_more(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)


def files(change: Callable[[Path], object]) -> Callable[[Things], Check]:
    def checked(things: Things) -> Check:
        file = things.folder / "weights"
        file.write_bytes(b"learnt")
        recorded = {"round-0/sft/model/weights": file_digest(file)}
        change(file)
        current = {path: file_digest(file) if file.exists() else None for path in recorded}
        return finished_files_unchanged(recorded, current)

    return checked


# ---- Ends ----


def ends(close: str) -> Callable[[Things], Check]:
    def checked(things: Things) -> Check:
        things.tokenizer.chat_template = TURNS.replace("CLOSE", close)
        return ends_reachable(things.tokenizer, [things.tokenizer.eos_token_id], is_trained_here=True)

    return checked


def never_ends(things: Things, *, does_end: bool = False) -> Check:
    forward = things.model.lm_head.forward

    def without_end(hidden: torch.Tensor) -> torch.Tensor:
        logits = forward(hidden)
        logits[..., things.tokenizer.eos_token_id] = 100.0 if does_end else -100.0
        return logits

    things.model.lm_head.forward = without_end
    return policy_ends(sampled(things).ended[:16].tolist(), max_new_tokens=48)


def nothing(_: Any) -> None: ...


class Mutant(NamedTuple):
    """A planted fault, the same thing without it, and words of the sentence that must name it."""

    fault: Callable[[Things], Check]
    sound: Callable[[Things], Check]
    check: str
    words: str


SCORE_ALONE, SCORE_RENDERED = "score alone = in a batch", "score as its template renders"
MUTANTS = {
    "temperature at sampling": Mutant(sampler(temperature=0.8), sampler(), "sampler true", "temperature"),
    "top-p at sampling": Mutant(sampler(top_p=0.85), sampler(), "sampler true", "top-p"),
    "top-k at sampling": Mutant(sampler(top_k=20), sampler(), "sampler true", "top-k"),
    "min-p at sampling": Mutant(sampler(min_p=0.1), sampler(), "sampler true", "min-p"),
    "suppressed tokens, almost uniform": Mutant(
        counts(suppress_tokens=list(range(40, 151))), counts(), "token counts true", "suppressed"
    ),
    "suppressed tokens": Mutant(suppressed, sampler(), "sampler true", "suppressed tokens"),
    "other weights in the sampler": Mutant(other_weights, sampler(), "sampler true", "other weights"),
    "functional dropout, Llama": Mutant(
        llama_dropout(nothing), llama_dropout(switch_off_dropout), "ratio one", "dropout"
    ),
    "functional dropout, OPT": Mutant(opt_dropout(nothing), opt_dropout(switch_off_dropout), "ratio one", "dropout"),
    "weights that move before the update": Mutant(weights_that_move, sound_ratio, "ratio one", "weights"),
    "reference that shares a module": Mutant(
        reference_that_moves,
        lambda things: reference_that_moves(things, is_shared=False),
        "reference fixed",
        "modules_to_save",
    ),
    "reference without embeddings": Mutant(
        copy_without_embeddings,
        lambda things: copy_without_embeddings(things, is_whole=True),
        "policy is reference at start",
        "embeddings",
    ),
    "attention that sees padding": Mutant(
        forward_in_batch,
        lambda things: forward_in_batch(things, sees_padding=False),
        "policy alone = in a batch",
        "attention that sees padding",
    ),
    "score read at the padding": Mutant(
        scores(reads_the_padding, SCORE_ALONE), scores(nothing, SCORE_ALONE), SCORE_ALONE, "padding"
    ),
    "rows of a batch that mix": Mutant(
        scores(mixes_rows, SCORE_ALONE), scores(nothing, SCORE_ALONE), SCORE_ALONE, "mixes the rows"
    ),
    "score read a token before": Mutant(
        scores(reads_a_token_before, SCORE_RENDERED), scores(nothing, SCORE_RENDERED), SCORE_RENDERED, "after the end"
    ),
    "begin token twice": Mutant(
        scores(begins_twice, SCORE_RENDERED), scores(nothing, SCORE_RENDERED), SCORE_RENDERED, "begin tokens"
    ),
    "tensor changed on the way": Mutant(tensors(one_changed), tensors(nothing), "nothing lost", "up_proj.weight"),
    "tensor left on the way": Mutant(tensors(one_more), tensors(nothing), "nothing lost", "q_proj.bias"),
    "finished weights replaced": Mutant(
        files(lambda file: file.write_bytes(b"other!")), files(nothing), "finished files unchanged", "has changed"
    ),
    "finished weights gone": Mutant(
        files(lambda file: file.unlink()), files(nothing), "finished files unchanged", "not there any more"
    ),
    "turn ends in another token": Mutant(
        ends("<|system|>"), ends("<|end|>"), "ends reachable", "ends an answer with '<|system|>'"
    ),
    "turn without an end": Mutant(ends(""), ends("<|end|>"), "ends reachable", "with nothing"),
    "policy that never ends": Mutant(
        never_ends, lambda things: never_ends(things, does_end=True), "policy ends", "cut off"
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_caught_and_named(things: Things, name: str) -> None:
    mutant = MUTANTS[name]
    check = mutant.fault(things)
    assert check.name == mutant.check
    assert not check.held, check
    assert mutant.words in check.sentence


@pytest.mark.parametrize("name", MUTANTS)
def test_without_the_fault_the_check_holds(things: Things, name: str) -> None:
    check = MUTANTS[name].sound(things)
    assert check.held, check.message()
