"""Models made of the weights of several; what they say is read by plain transformers."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.models.load import model_settings
from rlhf.pipeline import combine as combine_module
from rlhf.pipeline.combine import combine_models
from rlhf.reward.load import CARD, load_reward_model, save_reward_model
from tests.command import rlhf
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

SAMPLES = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    write_jsonl(file, [{"prompt": prompt, "completion": text, "ended": True} for prompt, text in SAMPLES])
    return file


@pytest.fixture(scope="module")
def other_head(reward_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward model of the fixtures with another head."""
    folder = tmp_path_factory.mktemp("other_head")
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    save_reward_model(folder, model, tokenizer, samples=SAMPLES)
    return folder


def scores(folder: Path) -> torch.Tensor:
    """Scores by plain transformers of what the template renders."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, text in SAMPLES:
        rendered = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model(input_ids=ids).logits.item())
    return torch.tensor(found)


def test_copies_of_one_model_are_that_model(reward_folder: Path, samples: Path, tmp_path: Path) -> None:
    combine_models([reward_folder] * 3, [1 / 3] * 3, tmp_path / "x", samples=samples)
    one, other = (load_file(folder / "model.safetensors") for folder in (reward_folder, tmp_path / "x"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_reward_model(tmp_path / "x").std == pytest.approx(load_reward_model(reward_folder).std)


def test_the_mean_of_heads_gives_the_mean_of_scores(
    reward_folder: Path, other_head: Path, samples: Path, tmp_path: Path
) -> None:
    """WARM on frozen features is the mean of predictions; the scale is measured anew and is no mean of scales."""
    combine_models([reward_folder, other_head], [0.5, 0.5], tmp_path / "x", samples=samples)
    expected = (scores(reward_folder) + scores(other_head)) / 2
    torch.testing.assert_close(scores(tmp_path / "x"), expected, atol=1e-5, rtol=0)
    card = json.loads((tmp_path / "x" / CARD).read_text())
    assert card["mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert card["std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-5)
    assert [entry["factor"] for entry in card["combined"]] == [0.5, 0.5]


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5])
def test_extrapolation_begins_at_one_model_and_passes_the_other(
    factor: float, reward_folder: Path, other_head: Path, samples: Path, tmp_path: Path
) -> None:
    """ExPO: with linear heads on the same features, scores are weak + a (strong - weak)."""
    command = ["export", str(other_head), str(tmp_path / "x"), "--extrapolate", str(reward_folder)]
    result = rlhf(*command, "--factor", str(factor), "--samples", str(samples), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    weak, strong = scores(reward_folder), scores(other_head)
    torch.testing.assert_close(scores(tmp_path / "x"), weak + factor * (strong - weak), atol=1e-5, rtol=1e-5)


def test_adapters_are_merged_before_they_are_averaged(
    base_folder: Path, tokenizer: Any, samples: Path, tmp_path: Path
) -> None:
    """The mean of merged weights, which the product of mean factors is not."""
    merged = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model: Any = build_reward_model(
            base_folder, model_settings({"use_peft": True, "lora_r": 4}), pad_token_id=tokenizer.pad_token_id
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        save_reward_model(tmp_path / str(seed), model, tokenizer, samples=SAMPLES)
        merged.append({name: value.clone() for name, value in model.merge_and_unload().state_dict().items()})
    combine_models([tmp_path / "1", tmp_path / "2"], [0.5, 0.5], tmp_path / "x", samples=samples)
    saved = load_file(tmp_path / "x/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (merged[0][name] - merged[1][name]).abs().max() > 0.01
    torch.testing.assert_close(saved[name], (merged[0][name] + merged[1][name]) / 2, atol=1e-6, rtol=0)


def test_policies_are_averaged_too(base_folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    shutil.copytree(base_folder, tmp_path / "three")
    model.save_pretrained(tmp_path / "three")
    result = rlhf("export", str(base_folder), "x", "--average", "three", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    mean: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    torch.testing.assert_close(mean.model.norm.weight, model.model.norm.weight / 3 * 2)


def test_models_that_do_not_fit_are_refused(
    base_folder: Path, reward_folder: Path, samples: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from rlhf.models.scratch import build_base

    with pytest.raises(UserError, match="is a reward model and this is a policy"):
        combine_models([reward_folder, base_folder], [0.5, 0.5], tmp_path / "x", samples=samples)
    for models in ([reward_folder, tmp_path / "gone"], [tmp_path / "gone", reward_folder]):
        with pytest.raises(UserError, match="gone: no such folder"):
            combine_models(models, [0.5, 0.5], tmp_path / "x", samples=samples)
    with pytest.raises(UserError, match="org/name") as error:  # a policy may lie on a hub, which can't be reached here
        combine_models([base_folder, Path("org/name")], [0.5, 0.5], tmp_path / "x", samples=None)
    assert "no such folder" not in str(error.value)
    with pytest.raises(UserError, match="scale of their own; give --samples"):
        combine_models([reward_folder] * 2, [0.5, 0.5], tmp_path / "x", samples=None)
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    build_base(tmp_path / "small", ["yes no"] * 50, architecture="llama", settings=settings, seed=0)
    with pytest.raises(UserError, match="only models of one base can be combined"):
        combine_models([base_folder, tmp_path / "small"], [0.5, 0.5], tmp_path / "x", samples=None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("")
    with pytest.raises(UserError, match="not empty; choose a new folder"):
        combine_models([base_folder] * 2, [0.5, 0.5], tmp_path / "full", samples=None)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="row 1 has no `prompt` and `completion`"):
        combine_models([reward_folder] * 2, [0.5, 0.5], tmp_path / "x", samples=tmp_path / "bad.jsonl")
    for name, word in (
        ("rms_norm_eps", "is computed otherwise"),
        ("chat_template", "its chat template is not that of"),
    ):
        other = shutil.copytree(base_folder, tmp_path / name)
        if name == "chat_template":
            file = other / "chat_template.jinja"
            file.write_text(file.read_text() + " ")
        else:
            config = json.loads((other / "config.json").read_text())
            (other / "config.json").write_text(json.dumps({**config, name: 0.5}))
        with pytest.raises(UserError, match=word):
            combine_models([base_folder, other], [0.5, 0.5], tmp_path / "x", samples=None)
    other = shutil.copytree(
        base_folder, tmp_path / "ids"
    )  # what a training writes of the tokenizer, and computes nothing
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "pad_token_id": 7, "bos_token_id": 8}))
    combine_models([base_folder, other], [0.5, 0.5], tmp_path / "mean", samples=None)
    result = rlhf("export", "a", "b", "--average", "c", "--extrapolate", "d", cwd=tmp_path)
    assert result.returncode == 2
    assert "two ways to combine models" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_what_fails_in_the_middle_leaves_nothing(
    kind: str, base_folder: Path, reward_folder: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a folder stayed, and the same command was refused."""

    def fails(_: Any, __: Any, folder: Path, **___: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    def fails_too(folder: Path, *_: Any, **__: Any) -> None:
        fails(None, None, folder)

    monkeypatch.setattr(combine_module, "save_model", fails)
    monkeypatch.setattr(combine_module, "save_reward_model", fails_too)
    one = base_folder if kind == "policy" else reward_folder
    with pytest.raises(OSError, match="No space left"):
        combine_models([one, one], [0.5, 0.5], tmp_path / "out", samples=None if kind == "policy" else samples)
    assert not (tmp_path / "out").exists()
