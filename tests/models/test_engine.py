"""Answers by an engine in a process of its own, with a stand-in for vLLM written with plain transformers."""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf.errors import TrainingError, UserError
from rlhf.evaluation.policies import evaluate_policies
from rlhf.models import engine, vllm_process
from rlhf.models.engine import engine_answers
from rlhf.models.generate import encode_prompts, end_token_ids, sample_texts
from rlhf.models.load import load_policy, model_settings
from rlhf.pipeline.checks import check_sources
from rlhf.pipeline.plan import plan
from rlhf.recipe.load import load_recipe
from tests.conftest import PROMPTS

# What vLLM's own documentation says of these two classes, as far as it is asked for here; everything else is refused.
STAND_IN = """
import types
import torch
from transformers import AutoModelForCausalLM

class SamplingParams:
    def __init__(self, *, temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, stop_token_ids, seed, detokenize):
        assert (top_p, top_k, min_p, repetition_penalty, detokenize) == (1.0, 0, 0.0, 1.0, False)
        self.__dict__ |= dict(temperature=temperature, tokens=max_tokens, ends=stop_token_ids, seed=seed)

class LLM:
    def __init__(self, *, model, skip_tokenizer_init, dtype, max_model_len, generation_config, gpu_memory_utilization=None):
        assert skip_tokenizer_init and generation_config == "vllm"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.longest = max_model_len

    @torch.no_grad()
    def generate(self, prompts, settings):
        replies = []
        for prompt, wanted in zip(prompts, settings, strict=True):
            ids, answer = list(prompt["prompt_token_ids"]), []
            assert len(ids) + wanted.tokens <= self.longest
            generator = torch.Generator().manual_seed(wanted.seed)
            while len(answer) < wanted.tokens and (not answer or answer[-1] not in wanted.ends):
                logits = self.model(torch.tensor([ids + answer])).logits[0, -1]
                chances = torch.softmax(logits / wanted.temperature, dim=-1)
                answer.append(int(torch.multinomial(chances, 1, generator=generator)))
            replies.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(answer))]))
        return replies
"""
LENGTH = 6


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the stand-in, which this process can import."""
    folder = tmp_path / "installed"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("vllm", None)
    importlib.invalidate_caches()


@pytest.fixture
def in_this_process(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process without its cold start; the real one is started in tests/engines."""
    monkeypatch.setenv("RANK", "0")  # as under `torchrun`

    def run(command: list[str], environment: dict[str, str]) -> int:
        assert command[:-1] == [sys.executable, "-m", vllm_process.__name__]
        assert "RANK" not in environment
        vllm_process.main(Path(command[-1]))
        return 0

    monkeypatch.setattr(engine, "_run", run)


def likeliest(model: Any, row: list[int], length: int, ends: list[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < length and (not answer or answer[-1] not in ends):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([row + answer])).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("layout", ["full", "lora"])
def test_the_engine_has_the_models_weights(
    layout: str, base_folder: Path, tokenizer: Any, in_this_process: None
) -> None:
    """Cold, it says what the model would say, with its adapter; the model is what it was, to the bit."""
    model: Any = load_policy(str(base_folder), model_settings({}), trainable=False).eval()
    rows, ends = encode_prompts(tokenizer, PROMPTS[:6], max_prompt_length=None), end_token_ids(model, tokenizer)
    plain = [likeliest(model, row, LENGTH, ends) for row in rows]
    if layout == "lora":
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    wanted = [likeliest(model, row, LENGTH, ends) for row in rows]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    answers = engine_answers(model, rows, end_ids=ends, max_new_tokens=LENGTH, temperature=1e-4)
    assert answers == wanted
    assert (answers == plain) == (layout == "full")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_answers_follow_the_seed(base_folder: Path, tokenizer: Any, in_this_process: None) -> None:
    model = load_policy(str(base_folder), model_settings({}), trainable=False).eval()

    def sampled(seed: int) -> tuple[list[str], list[bool]]:
        torch.manual_seed(seed)
        return sample_texts(model, tokenizer, [PROMPTS[0]] * 8, batch_size=3, max_new_tokens=LENGTH, engine="vllm")

    texts, ended = sampled(0)
    assert sampled(0) == (texts, ended)
    assert sampled(1)[0] != texts
    assert len(set(texts)) > 4, "each prompt has a seed of its own"
    assert not any(tokenizer.eos_token in text for text in texts)


def test_an_evaluation_by_the_engine(base_folder: Path, tokenizer: Any, in_this_process: None) -> None:
    """A policy that is its own reference has no KL, and what is scored are the engine's answers."""
    model = load_policy(str(base_folder), model_settings({}), trainable=False).eval()
    scored: list[str] = []

    class Length:
        def score(self, prompts: Any, completions: list[str], ended: Any = None) -> torch.Tensor:
            scored.extend(completions)
            return torch.tensor([float(len(text)) for text in completions])

    found = evaluate_policies(
        policy=model,
        sft=model,
        tokenizer=tokenizer,
        reward=Length(),  # type: ignore[arg-type]
        gold=None,
        prompts=PROMPTS[:5],
        batch_size=2,
        max_new_tokens=LENGTH,
        engine="vllm",
    )
    assert found.facts["policy"]["kl"] == 0
    assert scored == [sample["sft"] for sample in found.samples] + [sample["policy"] for sample in found.samples]


def test_nothing_outlives_the_engines_process(tmp_path: Path) -> None:
    """An engine's own processes would hold the accelerator's memory."""
    left = "import subprocess; p = subprocess.Popen(['sleep', '60']); open('pid', 'w').write(str(p.pid))"
    code = engine._run([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {left}; os._exit(7)"], {})
    assert code == 7
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while (state := process_state(pid)) not in ("gone", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state in ("gone", "Z")


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


@pytest.mark.parametrize(("code", "answers"), [(3, "[]"), (0, "[[5]]"), (0, "[[5], []]")])
def test_an_engine_that_fails(
    code: int, answers: str, vllm: Path, base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_policy(str(base_folder), model_settings({}), trainable=False).eval()

    def run(command: list[str], _: dict[str, str]) -> int:
        Path(command[-1], "answers.json").write_text(answers)
        return code

    monkeypatch.setattr(engine, "_run", run)
    with pytest.raises(TrainingError, match="exit code 3" if code else "2 prompts, or an empty one"):
        engine_answers(model, [[5], [6]], end_ids=[1], max_new_tokens=LENGTH)


def test_what_is_refused_before_a_run(recipe_with: Callable[..., Any]) -> None:
    with pytest.raises(UserError) as error:
        check_sources(
            recipe_with("sampling.engine=vllm", "ppo.use_vllm=true", "ppo.use_peft=true", "ppo.load_in_4bit=true")
        )
    said = "\n".join(error.value.problems)
    assert "sampling.engine: vllm: vLLM is not installed" in said
    assert "ppo.use_vllm: vLLM is not installed" in said
    assert "sampling.engine: vllm wants whole weights" in said


def test_only_what_it_samples_is_made_again(recipe_with: Callable[..., Any]) -> None:
    """Another engine gives other answers to evaluations and rounds; SFT, reward models and PPO of round 1 stay."""
    rounds = ("rounds.count=2", "rounds.prompts=8", "rounds.labels=8")
    keys = [
        {stage.folder: stage.key for stage in plan(recipe_with(*rounds, *more))}
        for more in ((), ("sampling.engine=vllm",))
    ]
    changed = {path for path in keys[0] if keys[0][path] != keys[1][path]}
    assert {"round-1/evaluate", "round-2/sample"} <= changed
    assert not changed & {"round-0/sft", "round-0/data", "round-1/reward", "round-1/ppo"}


@pytest.fixture
def recipe_with(tmp_path: Path) -> Callable[..., Any]:
    """A small recipe with overrides."""

    def make(*overrides: str) -> Any:
        file = tmp_path / "r.yaml"
        file.write_text("name: small\nlab: {demonstrations: 100, pairs: 100, test_pairs: 50}\n")
        return load_recipe(file, list(overrides))

    return make
