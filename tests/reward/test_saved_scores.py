"""A saved reward model gives its scores again: alone, in another order, in a fresh process, as a source of PPO, in lower
precision. Other programs and other chat templates are in `test_parity.py`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import load_reward_model, save_reward_model
from rlhf.errors import UserError
from rlhf.models.generate import Completions
from rlhf.models.load import computed_dtype, load_scorer, model_settings
from rlhf.models.save import save_model
from rlhf.models.scalar_head import make_exact, score_head
from rlhf.models.score import score_rows
from rlhf.models.text import encode_answers
from rlhf.pipeline.model_commands import export_model
from rlhf.ppo.rewards import RewardSource
from rlhf.reward.load import CARD
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

ANSWERS = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(len(PROMPTS))]
SYSTEM = [{"role": "system", "content": "be brief"}, *PROMPTS[0], {"role": "assistant", "content": "no"}, *PROMPTS[1]]


@pytest.fixture(scope="module", params=["full", "lora"])
def saved(request: Any, base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with every weight moved away from its start."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    settings = model_settings({"use_peft": True, "lora_r": 4} if request.param == "lora" else {})
    model = build_reward_model(base_folder, settings, pad_token_id=tokenizer.pad_token_id)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_reward_model(folder, model, tokenizer, samples=list(zip(PROMPTS, ANSWERS, strict=True)))
    return folder


@pytest.mark.fault("one score everywhere")
def test_a_saved_model_gives_its_scores_again(saved: Path, tmp_path: Path) -> None:
    """float32: within 1e-5 of `load_reward_model(folder).score`, for single turns, system turns and histories."""
    prompts, answers = [*PROMPTS[:10], SYSTEM], [*ANSWERS[:10], "yes please"]
    reward = load_reward_model(saved)
    expected = reward.score(prompts, answers)
    scores_by_path = {}

    scores_by_path["one at a time"] = torch.cat([reward.score([p], [a]) for p, a in zip(prompts, answers, strict=True)])
    scores_by_path["in reverse order"] = reward.score(prompts[::-1], answers[::-1]).flip(0)
    code = f"import rlhf; print(rlhf.load_reward_model({str(saved)!r}).score({prompts!r}, {answers!r}).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    scores_by_path["a fresh process"] = torch.tensor(json.loads(printed.splitlines()[-1]))
    ones = torch.ones(len(prompts), 1, dtype=torch.long)
    completions = Completions(ones, ones, ones, ones, torch.ones(len(prompts), dtype=torch.bool), answers)
    scores_by_path["PPO's reward source"], _ = RewardSource(str(saved))(prompts, completions, {})

    export_model(saved, tmp_path / "merged")
    scores_by_path["exported"] = load_reward_model(tmp_path / "merged").score(prompts, answers)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged", padding_side="left")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    whole = [[*p, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True)]
    batch = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True, padding=True)
    with torch.no_grad():
        scores_by_path["transformers, padded on the left"] = merged(**batch).logits.squeeze(-1)
    worst = {name: (scores - expected).abs().max().item() for name, scores in scores_by_path.items()}
    for name, difference in worst.items():
        print(f"parity {saved.name[:4]:5s} {name:34s} {difference:.1e}")
    assert max(worst.values()) <= 1e-5, worst
    assert expected.std() > 0.1, "the scores differ among themselves by far more"


def test_bfloat16_is_stated(saved: Path, tmp_path: Path) -> None:
    """bf16 carries 8 bits of each weight and activation. On these random models (weights of deviation 0.2) scores move by
    up to 0.05 (full) and 0.09 (LoRA) of their own deviation; the bound leaves room for another CPU's kernels."""
    reward = load_reward_model(saved)
    expected = reward.score(PROMPTS, ANSWERS)
    export_model(saved, tmp_path / "merged")
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    rows, _ = encode_answers(reward.tokenizer, PROMPTS, ANSWERS)
    scores = score_rows(half, rows, pad_token_id=reward.tokenizer.pad_token_id)
    difference = ((scores - expected).abs().max() / expected.std()).item()
    print(f"parity {saved.name[:4]:5s} bf16 against fp32: {difference:.1e} deviations")
    assert difference < 0.25


def test_a_whole_checkpoint_keeps_the_float32_of_its_head(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Its other weights have 16 bits; the head was rounded with them, and one of 70 held-out pairs became a tie."""
    model = build_reward_model(base_folder, model_settings({"dtype": "bfloat16"}), pad_token_id=tokenizer.pad_token_id)
    head = score_head(model)
    assert head is not None
    make_exact(head)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, tokenizer, tmp_path / "whole")
    loaded = score_head(load_scorer(tmp_path / "whole"))
    assert loaded is not None
    assert (loaded.weight.dtype, loaded.in_features) == (torch.float32, head.in_features)
    assert torch.equal(loaded.weight, head.weight)
    assert load_scorer(tmp_path / "whole").dtype == torch.bfloat16


def test_4_bit_is_stated(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """An adapter on a 4-bit base: equal to itself when loaded again, and this far from the same adapter on the whole base.

    NF4 rounds weights to 16 levels; on a random two-layer model that moves scores by more than their deviation (1.4,
    correlation 0.85), which is why a 4-bit model's card, probe and critic all use the 4-bit base, and why it can't be
    exported by merging.
    """
    torch.manual_seed(0)
    settings = model_settings({"use_peft": True, "lora_r": 4, "load_in_4bit": True})
    model = build_reward_model(base_folder, settings, pad_token_id=tokenizer.pad_token_id)
    samples = list(zip(PROMPTS, ANSWERS, strict=True))
    saved = save_reward_model(tmp_path, model, tokenizer, samples=samples, facts={"load_in_4bit": True})
    expected = saved.score(PROMPTS, ANSWERS)
    again = load_reward_model(tmp_path).score(PROMPTS, ANSWERS)
    assert (again - expected).abs().max().item() <= 1e-5
    assert (model.dtype, computed_dtype(model)) == (torch.float32, torch.bfloat16), "norms are kept in float32"
    card = json.loads((tmp_path / CARD).read_text(encoding="utf-8"))
    for row in card["probe"]:
        row["score"] += 0.02  # what the rounding of 16 bits may do on another machine
    (tmp_path / CARD).write_text(json.dumps(card), encoding="utf-8")
    load_reward_model(tmp_path)
    alone = torch.cat([saved.score([p], [a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    print(
        f"parity 4-bit, alone against batched: {((alone - expected).abs().max() / expected.std()).item():.1e} deviations"
    )
    assert (alone - expected).abs().max() < 0.1 * expected.std()
    rows, _ = encode_answers(tokenizer, PROMPTS, ANSWERS)
    whole = score_rows(load_scorer(tmp_path), rows, pad_token_id=tokenizer.pad_token_id)
    difference = ((whole - expected).abs().max() / expected.std()).item()
    print(f"parity 4-bit base against its own full base: {difference:.1e} deviations")
    assert torch.corrcoef(torch.stack([whole, expected]))[0, 1] > 0.5


@pytest.mark.fault("one score everywhere", "damage that no probe reads")
@pytest.mark.parametrize("damage", ["weights", "tokenizer", "gone"])
def test_damage_that_the_probe_does_not_read_is_refused(reward_folder: Path, tmp_path: Path, damage: str) -> None:
    """The card's texts keep their scores, another text does not: only the digests of the files can tell."""
    folder = Path(shutil.copytree(reward_folder, tmp_path / "model"))
    whole, card = load_reward_model(folder), json.loads((folder / CARD).read_text(encoding="utf-8"))
    probe = encode_answers(
        whole.tokenizer, [row["prompt"] for row in card["probe"]], [row["response"] for row in card["probe"]]
    )
    read = {token for row in probe[0] for token in row}
    unread = next(word for word in WORDS if not read & {*whole.tokenizer.encode(word, add_special_tokens=False)})
    file = {"weights": "model.safetensors", "tokenizer": "tokenizer.json", "gone": "special_tokens_map.json"}[damage]
    match damage:
        case "weights":
            tensors = load_file(folder / file)
            tensors["model.embed_tokens.weight"][whole.tokenizer.convert_tokens_to_ids(unread)] = 0
            save_file(tensors, folder / file, metadata={"format": "pt"})
        case "tokenizer":
            tokenizer = json.loads((folder / file).read_text(encoding="utf-8"))
            words = tokenizer["model"]["vocab"]
            other = next(w for w, token in words.items() if w != unread and token not in read)
            words[unread], words[other] = words[other], words[unread]
            (folder / file).write_text(json.dumps(tokenizer), encoding="utf-8")
        case "gone":
            card["files"][file] = "0" * 64
            (folder / CARD).write_text(json.dumps(card), encoding="utf-8")

    with pytest.raises(UserError, match=rf"{file} changed since the reward model was saved"):
        load_reward_model(folder)

    del card["files"]  # as in folders of earlier versions, where nothing but the probe is compared
    (folder / CARD).write_text(json.dumps(card), encoding="utf-8")
    damaged = load_reward_model(folder)
    difference = (damaged.score(PROMPTS[:1], [unread]) - whole.score(PROMPTS[:1], [unread])).abs().item()
    assert (difference > 1e-3) == (damage != "gone")
