"""`rlhf doctor`: everything that a run checks about itself and that needs no training, on a few rows of the recipe's own data.

The data are read, and a model from nothing is built, by the run's own stages in a folder that is thrown away.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.addresses import hide_secrets
from rlhf.data.rows import Pair, Prompt, Rated, answer, asked, completion
from rlhf.errors import TrainingError, UserError
from rlhf.files import read_jsonl
from rlhf.invariants.checks import Check
from rlhf.invariants.ends import SAMPLED, ends_reachable, policy_ends, prompts_too_long
from rlhf.lab.answers import stand_in_answers
from rlhf.models.generate import Completions, encode_prompts, end_token_ids, generate
from rlhf.models.gguf import gguf_file
from rlhf.models.load import build_reward_model, encoder_type, load_policy, load_tokenizer, reward_model_on
from rlhf.models.prompt_length import longest_prompt
from rlhf.models.templates import end_at_end_token, template_problems
from rlhf.models.text import plain
from rlhf.pipeline.affordable import ANSWERS, FEW, ROWS, TOKENS, affordable_prompts
from rlhf.pipeline.checks import check_arguments, check_sources
from rlhf.pipeline.context import StageContext, backbone_model
from rlhf.pipeline.policy_checks import forward_checks, sampling_checks
from rlhf.pipeline.stages import run_base, run_data, run_lab
from rlhf.pipeline.training import quiet_libraries, split_settings, training_arguments
from rlhf.pipeline.true_reward import load_true_reward
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.rewards import RewardSource, other_columns
from rlhf.ppo.verdict_reward import OPPONENT
from rlhf.recipe.schema import Recipe
from rlhf.reward.load import check_scores
from rlhf.reward.model import RewardModel

FEW_CUT = 0.1  # more prompts without their beginning than this are no exception
LOADED_ALIKE = ("dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")


@dataclass(frozen=True)
class Finding:
    """What was measured of one thing.

    Attributes:
        subject: what was looked at: "policy", "data.sft", a reward source's name.
        check: what must hold, what was measured and how much is allowed.
    """

    subject: str
    check: Check


@dataclass
class Examination:
    """What is known so far.

    Attributes:
        recipe: the recipe.
        context: of the PPO stage, with the data as a parent.
        base: the folder or hub id of the model that everything starts from.
        say: tell the person at the terminal.
        findings: in the order in which they were made.
        policy: the policy and the settings it was loaded with, until the reward model was examined that starts from it too.
        asked, completions: rows of the prompts, and the policy's answers to them, once there are some.
    """

    recipe: Recipe
    context: StageContext
    base: str | Path
    say: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    policy: tuple[PreTrainedModel | PeftModel, ModelConfig] | None = None
    asked: list[Any] = field(default_factory=list)
    completions: Completions | None = None

    def enter(self, subject: str, *checks: Check) -> None:
        """Enter checks of one thing, and say a line of each."""
        for check in checks:
            self.findings.append(Finding(subject, check))
            self.say(f"{subject}: {check.name}: {'holds' if check.held else 'FAILS'}")

    def refuse(self, subject: str, sentence: str) -> None:
        """Enter that something can't be used at all, and why."""
        self.enter(subject, Check("can be used", 1.0, 0.0, "faults", sentence))

    @contextmanager
    def looking_at(self, subject: str) -> Iterator[None]:
        """Turn what goes wrong with one thing into a finding, and go on with the next."""
        try:
            yield
        except (UserError, TrainingError) as error:
            self.refuse(subject, str(error))

    def rows(self, name: str) -> list[Any]:
        """Return the rows of a file of the data stage, none where there is no such file."""
        file = self.context.data / f"{name}.jsonl"
        return read_jsonl(file) if file.is_file() else []


def examine(recipe: Recipe, *, say: Callable[[str], None]) -> list[Finding]:
    """Run every check that needs no training; write nothing but into a folder that is thrown away.

    Args:
        say: tell the person at the terminal what the readers of the data say.

    Returns:
        the findings; a check that does not hold has a sentence.

    Raises:
        UserError: the recipe or its data can't be read at all.
    """
    check_sources(recipe)
    quiet_libraries()
    model = recipe.backbone.model
    is_encoder = model is not None and encoder_type(model, recipe.backbone.revision) is not None
    check_arguments(recipe, until="reward" if is_encoder else None)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        examination = _read(recipe, Path(folder), say)
        if not is_encoder:
            with examination.looking_at("policy"):
                _examine_policy(examination)
        with examination.looking_at("reward model, untrained"):
            _examine_new_reward_model(examination)
        for name in recipe.ppo.extra_rewards:
            with examination.looking_at(hide_secrets(name)):
                _examine_source(examination, name)
        with examination.looking_at("true reward"):
            _examine_true_reward(examination)
    return examination.findings


def require_all(findings: Sequence[Finding]) -> None:
    """Raise where a check does not hold.

    Raises:
        TrainingError: with the sentence of each that does not.
    """
    failed = [finding for finding in findings if not finding.check.held]
    if failed:
        sentences = [f"{finding.subject}: {finding.check.sentence}" for finding in failed]
        raise TrainingError("\n".join([*sentences, f"{len(failed)} of {len(findings)} checks do not hold."]))


def _read(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Examination:
    """Read the data and build what a run builds without training: the lab, a model from nothing."""
    parents: dict[str, Path] = {}
    model = recipe.backbone.model
    if recipe.lab is not None:
        parents["lab"] = folder / "round-0/lab"
        run_lab(StageContext(recipe, parents["lab"], {}, say), stand_in_answers(TOKENS))
    data = folder / "round-0/data"
    run_data(StageContext(recipe, data, parents, say))
    base: str | Path
    if recipe.backbone.from_scratch is not None or (model is not None and gguf_file(model) is not None):
        base = folder / "round-0/base/model"
        run_base(StageContext(recipe, base.parent, {"data": data}, say))
    elif recipe.lab is not None and recipe.backbone.model is None:
        base = parents["lab"] / "model"
    else:
        base = backbone_model(recipe)
    context = StageContext(recipe, folder / "round-1/ppo", {"data": data}, say)
    return Examination(recipe, context, base, say)


# ---- The policy ----


def _examine_policy(examination: Examination) -> None:
    """Check the model that the policy starts from: what its template writes and accepts, how it samples and computes."""
    # 1. The tokenizer, the template and the prompts.
    recipe, context = examination.recipe, examination.context
    model_config, settings = split_settings(context.trl_settings("ppo"))
    args = training_arguments(PPOConfig, settings, context.folder, recipe.seed)
    tokenizer = load_tokenizer(examination.base, conversational=True, revision=recipe.backbone.revision)
    is_readable = _examine_turns(examination, tokenizer)
    examination.say(f"policy: opening {examination.base} …")
    model = load_policy(examination.base, model_config, trainable=False).to(context.device).eval()
    examination.policy = model, model_config
    has_sft = recipe.has_sft
    end = recipe.sft.trl_settings().get("eos_token") if has_sft else None
    if end is not None:
        tokenizer.eos_token = end  # as SFT's trainer does
    end_ids = end_token_ids(model, tokenizer)
    limit = longest_prompt(
        model.config, max_new_tokens=args.max_completion_length, max_prompt_length=args.max_prompt_length
    )
    rows = examination.rows("prompts")[:ANSWERS]
    lengths: list[int] = []
    if is_readable:
        encoded = encode_prompts(tokenizer, [row["prompt"] for row in rows], max_prompt_length=None)
        lengths = [len(ids) for ids in encoded]
        examination.enter("data.prompts", _prompt_lengths(lengths, limit))
    examination.enter("policy", ends_reachable(tokenizer, end_ids, is_trained_here=has_sft))
    if not is_readable:
        return

    # 2. What it samples, with the log-probabilities that PPO would use.
    read = [length if limit is None else min(length, limit) for length in lengths]
    asked = [rows[i] for i in affordable_prompts(read, model.num_parameters(), device=model.device.type)]
    examination.say(f"policy: sampling {len(asked)} answers of at most {TOKENS} tokens …")
    torch.manual_seed(recipe.seed)
    completions = []
    sampling: dict[str, Any] = {"temperature": args.temperature, "max_prompt_length": limit}
    for start in range(0, len(asked), ROWS):
        prompts: list[Prompt] = [row["prompt"] for row in asked[start : start + ROWS]]
        completions.append(generate(model, tokenizer, prompts, max_new_tokens=TOKENS, **sampling))
    examination.asked, examination.completions = asked[:ROWS], completions[0]
    examination.enter("policy", *sampling_checks(model, completions, args.temperature))
    if not has_sft:
        longest = args.max_completion_length
        examination.say(f"policy: sampling {SAMPLED} answers of at most {longest} tokens …")
        prompts = [row["prompt"] for row in asked[:SAMPLED]]
        answers = generate(model, tokenizer, prompts, max_new_tokens=longest, **sampling)
        examination.enter("policy", policy_ends(answers.ended.tolist(), max_new_tokens=longest))

    # 3. The same text alone, in a batch, and a second time as it is trained.
    examination.enter("policy", *forward_checks(model, completions[0], args))


def _examine_turns(examination: Examination, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check that the chat template accepts the turns of every file's prompts; return whether it accepts those of PPO."""
    is_readable = True
    for name in ("sft", "pairs", "prompts"):
        prompts: list[Prompt] = [row["prompt"] for row in examination.rows(name)]
        problems = template_problems(tokenizer, prompts)
        sentence = " ".join(problems)
        if prompts:
            check = Check("template accepts the turns", float(len(problems)), 0.0, "orders of roles refused", sentence)
            examination.enter(f"data.{name}", check)
        is_readable = not problems
    return is_readable


def _prompt_lengths(lengths: Sequence[int], limit: int | None) -> Check:
    """Return the check that some prompts, given their tokens, are read as a whole, but for a few."""
    cut = 0 if limit is None else sum(length > limit for length in lengths)
    sentence = prompts_too_long(lengths, limit) or ""
    return Check("prompts fit", cut / max(1, len(lengths)), FEW_CUT, "share of prompts that are cut", sentence)


# ---- Rewards ----


def _texts(examination: Examination) -> list[tuple[Prompt, str]]:
    """Return a few prompts with answers: those of the pairs, or rated ones, or, where there are none, the policy's."""
    pairs: list[Pair] = examination.rows("pairs")[:FEW]
    if pairs:
        return [(asked(row, "chosen"), answer(row, "chosen")) for row in pairs]
    rated: list[Rated] = examination.rows("ratings")[:FEW]
    if rated:
        return [(row["prompt"], completion(row)) for row in rated]
    if examination.completions is None:
        raise UserError("there are neither pairs nor answers of the policy to score.")
    prompts = [row["prompt"] for row in examination.asked[:FEW]]
    return list(zip(prompts, examination.completions.texts, strict=False))


def _examine_new_reward_model(examination: Examination) -> None:
    """Check that scores of the base, with the head that reward training starts from, depend on a text alone."""
    recipe = examination.recipe
    model_config, _ = split_settings(examination.context.trl_settings("reward"))
    model_config.use_peft = False  # a fresh adapter changes no score
    tokenizer = load_tokenizer(examination.base, conversational=True, revision=recipe.backbone.revision)
    assert isinstance(tokenizer.pad_token_id, int), "check_tokenizer gives every tokenizer a padding token"
    end_at_end_token(tokenizer)
    model = _on_policy(examination, model_config, tokenizer.pad_token_id)
    if model is None:
        examination.say(f"reward model, untrained: opening {examination.base} …")
        model = build_reward_model(examination.base, model_config, pad_token_id=tokenizer.pad_token_id)
    reward = RewardModel(model.to(examination.context.device).eval(), tokenizer, conversational=True)
    _examine_scores(examination, "reward model, untrained", reward)


def _on_policy(examination: Examination, config: ModelConfig, pad_token_id: int) -> PreTrainedModel | None:
    """Return a new reward model on the layers of the policy that is open already; None where the two are loaded otherwise."""
    if examination.policy is None:
        return None
    (policy, policy_config), examination.policy = examination.policy, None
    if any(getattr(policy_config, key) != getattr(config, key) for key in LOADED_ALIKE):
        return None
    return reward_model_on(policy, pad_token_id=pad_token_id)


def _examine_scores(examination: Examination, subject: str, reward: RewardModel) -> None:
    """Check the scores of a few texts of the recipe's own."""
    texts = _texts(examination)
    problems = template_problems(reward.tokenizer, [prompt for prompt, _ in texts])
    if problems:
        raise UserError(problems)
    with examination.looking_at(subject):
        check_scores(reward, texts, name=subject)
    for name, entry in reward.checks.entries.items():
        check = Check(name, entry["statistic"], entry["bound"], entry["unit"], entry["sentence"], entry["low"])
        examination.enter(subject, check)


def _examine_source(examination: Examination, name: str) -> None:
    """Open a reward source, check its scores where it is a model, and else ask it once."""
    subject = hide_secrets(name)
    with _foreign(subject):
        source = RewardSource(name)
    if isinstance(source.function, RewardModel):
        source.function.model.to(examination.context.device)
        _examine_scores(examination, subject, source.function)
        return
    completions = examination.completions
    if completions is None:
        raise UserError("there are no answers of the policy to score.")
    rows = examination.asked
    columns = other_columns(rows)
    if source.compares:
        columns[OPPONENT] = [*completions.texts[1:], completions.texts[0]]
    with _foreign(subject):
        scores, _ = source([row["prompt"] for row in rows], completions, columns)
    examination.enter(subject, _scores_given(scores.tolist()))


def _examine_true_reward(examination: Examination) -> None:
    """Ask the true reward of a few texts, where one is known."""
    with _foreign("evaluate.gold"):
        gold = load_true_reward(examination.recipe)
    if gold is None:
        return
    texts = _texts(examination)
    with _foreign("evaluate.gold"):
        values = gold([plain(prompt) for prompt, _ in texts], [response for _, response in texts])
    examination.enter("true reward", _scores_given(values))


def _scores_given(scores: Sequence[float]) -> Check:
    """Return the check that every answer has a finite score."""
    missing = sum(not math.isfinite(score) for score in scores)
    return Check(
        "gives every answer a score", float(missing), 0.0, f"of {len(scores)} without one", "Return finite numbers."
    )


@contextmanager
def _foreign(subject: str) -> Iterator[None]:
    """Turn what a function of a person's own raises into a sentence.

    Raises:
        UserError: naming the exception.
    """
    try:
        yield
    except (UserError, TrainingError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{subject} raised {type(error).__name__}: {error}") from error
