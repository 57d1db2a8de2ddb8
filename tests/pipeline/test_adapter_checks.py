"""LoRA where it can't be: said before anything is made, and where it can be, nothing is said."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.pipeline.adapter_checks import adapter_problems
from rlhf.pipeline.checks import check_arguments
from rlhf.recipe import load_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
OF_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MORE: dict[str, Any] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**OF_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": {**OF_EXPERTS, "decoder_sparse_step": 1},
}
ALL, ATTENTION = "lora_target_modules: [all-linear]", "lora_target_modules: [q_proj, v_proj]"
NOT_YET = "lora_target_modules: LoRA on experts does not work yet; name some of k_proj, o_proj, q_proj, v_proj."
REFUSED = "use_peft: peft refuses the adapter: "


def config_of(kind: str) -> Any:
    return AutoConfig.for_model(kind, **SIZES, **MORE[kind])


def recipe_of(folder: Path, sections: str, model: str = "/nowhere/base") -> Any:
    file = folder / "r.yaml"
    data = f"name: x\nbackbone: {{model: {model}}}\ndata: {{sft: s.jsonl, preferences: p.jsonl}}\n"
    file.write_text(data + sections, encoding="utf-8")
    return load_recipe(file)


@pytest.mark.fault("refused after hours")
@pytest.mark.parametrize("section", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("qwen3_moe", ALL, NOT_YET),
        ("mixtral", f"{ALL}, lora_dropout: 0.0", NOT_YET),
        ("mixtral", f"{ATTENTION}, lora_target_parameters: [experts.down_proj]", NOT_YET),
        ("qwen3_moe", "lora_r: 4", REFUSED),
        ("qwen2_moe", "lora_r: 4", REFUSED),
        ("llama", "lora_target_modules: ['.*experts.*']", REFUSED),
    ],
)
def test_adapters_that_no_stage_could_use_are_refused(
    tmp_path: Path, section: str, kind: str, settings: str, sentence: str
) -> None:
    """Training ended in a traceback, or SFT was trained and no later stage took it."""
    recipe = recipe_of(tmp_path, f"{section}: {{use_peft: true, {settings}}}\n")
    (problem,) = adapter_problems(recipe, config_of(kind))
    assert problem.startswith(f"{section}.{sentence}")


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("qwen3_moe", f"sft: {{use_peft: true, {ATTENTION}}}\n"),
        ("qwen2_moe", f"reward: {{use_peft: true, {ATTENTION}}}\n"),
        ("mixtral", f"ppo: {{use_peft: true, {ATTENTION}}}\n"),
        ("mixtral", f"sft: {{use_peft: true, {ATTENTION}}}\nreward: {{use_peft: true}}\nppo: {{use_peft: true}}\n"),
        ("qwen3_moe", "sft: {use_peft: false}\n"),
        ("llama", f"reward: {{use_peft: true, {ALL}, use_dora: true}}\nppo: {{use_peft: true}}\n"),
    ],
)
def test_adapters_that_can_be_made_are_not(tmp_path: Path, kind: str, sections: str) -> None:
    """SFT's goes on in the later stages, wherever theirs would be."""
    recipe = recipe_of(tmp_path, sections)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(adapter_problems(recipe, config_of(kind))) == []


@pytest.mark.parametrize("targets", [ALL, "lora_target_modules: [q_proj, up_proj, down_proj]"])
def test_experts_that_an_adapter_passes_over_are_said(tmp_path: Path, targets: str) -> None:
    """Beside a shared expert, whose layers have the names."""
    recipe = recipe_of(tmp_path, f"reward: {{use_peft: true, {targets}}}\n")
    with pytest.warns(UserWarning, match=r"^reward.lora_target_modules: LoRA does not reach the experts, \d\d% of the"):
        assert list(adapter_problems(recipe, config_of("qwen2_moe"))) == []


@pytest.mark.fault("refused after hours")
def test_a_run_is_refused_by_its_check(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config_of("qwen3_moe")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    pair = {"prompt": "red", "chosen": "yes", "rejected": "no"}
    Path("p.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    recipe = recipe_of(tmp_path, f"sft: {{use_peft: true, {ALL}}}\n", str(base))
    with pytest.raises(UserError) as error:
        check_arguments(recipe)
    assert error.value.problems == [f"sft.{NOT_YET}"]


@pytest.mark.fault("refused after hours")
def test_an_adapter_on_the_output_layer_is_refused_for_sft_alone(tmp_path: Path) -> None:
    """TRL refuses it when its trainer is made, once the data are prepared; a policy of PPO may have one."""
    targets = "{use_peft: true, lora_target_modules: [lm_head, q_proj]}"
    (sentence,) = adapter_problems(recipe_of(tmp_path, f"sft: {targets}\n"), config_of("llama"))
    assert sentence.startswith("sft.lora_target_modules: TRL's loss reads the output layer's own weights")
    assert not list(adapter_problems(recipe_of(tmp_path, f"ppo: {targets}\n"), config_of("llama")))
