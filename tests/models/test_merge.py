"""An adapter on embeddings that input and output share: every way out of it says what the two said together."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import TrainingError, UserError
from rlhf.invariants.tensors import nothing_lost
from rlhf.models import merge
from rlhf.models.load import load_policy, model_settings
from rlhf.models.logprobs import response_logprobs
from rlhf.models.merge import merged_weights, trains_tied_embeddings
from rlhf.models.save import save_model
from rlhf.pipeline.model_commands import export_model
from rlhf.ppo.roles import make_reference
from tests.unit_scale import build_reward_model

IDS = torch.randint(5, 120, (3, 16), generator=torch.Generator().manual_seed(5))
LORA = {"use_peft": True, "lora_r": 4}
TARGETS = {
    "head": ["lm_head", "q_proj"],
    "embedding": ["embed_tokens", "q_proj"],
    "both": ["lm_head", "embed_tokens", "q_proj"],
    "head alone": ["lm_head"],
}
EVERY = [(name, tied) for name in TARGETS for tied in (True, False)]


@torch.no_grad()
def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and what the layers below the head give."""
    found = model.eval()(input_ids=IDS, output_hidden_states=True)
    return found.logits, found.hidden_states[-1]


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    return outputs(model)[1]


@pytest.fixture(scope="module", params=EVERY, ids=[f"{name}, {'tied' if tied else 'untied'}" for name, tied in EVERY])
def sft(
    request: Any, base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Tensor, Tensor]:
    """An SFT adapter with factors that are not 0, as the pipeline saves it; and what plain transformers and PEFT make of it."""
    name, is_tied = request.param
    folder = tmp_path_factory.mktemp("sft")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert base.config.tie_word_embeddings
    if not is_tied:
        weights = base.state_dict()
        base = AutoModelForCausalLM.from_pretrained(base_folder, tie_word_embeddings=False)
        base.load_state_dict(weights)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(r=4, target_modules=TARGETS[name], init_lora_weights=False, task_type="CAUSAL_LM")
    save_model(get_peft_model(base, config), tokenizer, folder / "model")
    again = AutoModelForCausalLM.from_pretrained(folder / "base")
    logits, states = outputs(PeftModel.from_pretrained(again, folder / "model"))
    return name, folder / "model", logits, states


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_exported(sft: tuple[str, Path, Tensor, Tensor], tmp_path: Path) -> None:
    _, folder, logits, states = sft
    export_model(folder, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    close(outputs(exported)[0], logits)
    # Another task reads the layers below the head from the same files.
    config = json.loads((tmp_path / "out/config.json").read_text())
    close(hidden(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)), states)
    reward = build_reward_model(tmp_path / "out", model_settings({}), pad_token_id=config["pad_token_id"])
    close(hidden(reward), states)


def test_into_a_reward_model(sft: tuple[str, Path, Tensor, Tensor], tokenizer: Any, tmp_path: Path) -> None:
    name, folder, _, states = sft
    whole = build_reward_model(folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    close(hidden(whole), states)
    assert nothing_lost(folder, whole).held
    save_model(whole, tokenizer, tmp_path / "reward")
    close(hidden(AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")), states)
    if name == "head alone":
        with pytest.raises(UserError, match="trains the output layer alone, which a reward model has not"):
            build_reward_model(folder, model_settings(LORA), pad_token_id=tokenizer.pad_token_id)
    else:
        close(hidden(build_reward_model(folder, model_settings(LORA), pad_token_id=tokenizer.pad_token_id)), states)


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "LoRA"])
def test_into_ppo(
    sft: tuple[str, Path, Tensor, Tensor], settings: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    _, folder, logits, _ = sft
    policy = load_policy(folder, model_settings(settings))
    assert nothing_lost(folder, policy).held
    close(outputs(policy)[0], logits)
    expected = torch.log_softmax(logits[:, -9:-1], dim=-1).gather(-1, IDS[:, -8:, None]).squeeze(-1)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        reference = make_reference(policy, adapter_was_trained=True)
        close(reference.logprobs(IDS, mask, 8, 1.0), expected)
        # A step that moves all that is trained is saved and comes back.
        torch.manual_seed(1)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
        close(reference.logprobs(IDS, mask, 8, 1.0), expected)
        moved = response_logprobs(policy.eval(), IDS, mask, 8, 1.0)
    save_model(policy, tokenizer, tmp_path / "ppo")
    with torch.no_grad():
        again = load_policy(tmp_path / "ppo", model_settings({}))
        close(response_logprobs(again.eval(), IDS, mask, 8, 1.0), moved)


def test_a_merge_that_changes_what_the_model_says_is_refused(
    sft: tuple[str, Path, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PEFT does by itself with one weight for two modules; and the same with two weights, which is right."""
    _, folder, logits, _ = sft
    is_tied = json.loads((folder.parent / "base/config.json").read_text())["tie_word_embeddings"]
    monkeypatch.setattr(merge, "_untie", lambda model: None)
    if is_tied:
        with pytest.raises(TrainingError, match=r"merging the adapter of .* changes what the model says .*tied"):
            export_model(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        close(outputs(load_policy(folder, model_settings({})))[0], logits)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_merged_weights_are_those_of_a_merge_and_leave_the_base_as_it_was(
    settings: dict[str, Any], base_folder: Path
) -> None:
    """Against PEFT's own merge of a copy; with a second adapter that is not active, as PPO's other roles have."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    model = get_peft_model(base, config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, weight in model.named_parameters():
        if "modules_to_save.default" in name:
            torch.nn.init.normal_(weight)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found = {name: weight.clone() for name, weight in merged_weights(model)}
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    merged = copy.deepcopy(model).merge_and_unload()
    expected = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), atol=1e-6, rtol=1e-5, msg=name)
    for name, weight in found.items():
        base_layer = before.get(f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight")
        if base_layer is not None:
            has_active = "v_proj" not in name
            assert torch.equal(weight, base_layer) != has_active, name


def test_adding_an_adapter_and_taking_it_off_moves_the_base(base_folder: Path) -> None:
    """What PEFT's own way does, and TRL's with it: the reason why `merged_weights` keeps a copy of each layer."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "base_layer" in name}
    for _ in range(5):
        list(merged_weights(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    assert not all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_that_are_trained_whole_and_shared_are_no_engines_business(
    names: list[str], is_tied: bool, base_folder: Path
) -> None:
    """A shared weight has one name, that of the copy's original, so the output embeddings would be left out or tied again."""
    config = AutoModelForCausalLM.from_pretrained(base_folder).config
    config.tie_word_embeddings = is_tied
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        LoraConfig(target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM"),
    )
    assert trains_tied_embeddings(model) == is_tied
    assert not merge.adapts_tied_embeddings(model), "PEFT merges these itself"
