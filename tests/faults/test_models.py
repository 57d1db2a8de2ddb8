"""Model folders that are broken or hostile, whatever verb opens them: one sentence, exit 2, nothing created, nothing run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.load import model_settings
from rlhf.models.save import save_model
from rlhf.models.scratch import build_base
from rlhf.reward.load import save_reward_model
from tests.conftest import PROMPTS, WORDS
from tests.faults.here import Outcome, require_refusal, rlhf
from tests.unit_scale import build_reward_model

RECIPE = """
name: hostile
backbone: {model: model}
data: {sft: sft.jsonl, preferences: pairs.jsonl}
ppo: {max_completion_length: 16}
"""
VERBS: dict[str, list[str]] = {
    "run": ["run", "r.yaml", "--out", "out"],
    "score": ["score", "model"],
    "evaluate": ["evaluate", "model", "pairs.jsonl", "--out", "out.json"],
    "export": ["export", "model", "out"],
    "certify": ["certify", "model", "--out", "out.json"],
    "serve": ["serve", "model", "--port", "0"],
    "plan": ["plan", "r.yaml"],
    "check": ["check", "r.yaml"],
    "audit": ["audit", "pairs.jsonl", "--model", "model", "--out", "out", "--members", "2"],
}
POLICIES = ("run", "export", "plan", "check", "audit")  # the verbs that are given a policy's folder
LAYER = "model.layers.0.mlp.up_proj.weight"
MINE = "import pathlib\npathlib.Path('ran').touch()\n"
Plant = Callable[[Path], object]


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 0x40
    file.write_bytes(bytes(content))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    classes = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoModelForSequenceClassification": "mine.M"}
    change(folder / "config.json", model_type="mine", auto_map=classes)


def own_tokenizer(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.T", None]})


def index(folder: Path, shard: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def other_words(folder: Path) -> None:
    """The tokenizer of a model with a larger vocabulary."""
    names = " ".join(f"word{i}x{i * i}" for i in range(400))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    build_base(
        folder.parent / "larger", [names] * 3, architecture="llama", settings={**sizes, "vocab_size": 900}, seed=0
    )
    for file in (folder.parent / "larger").glob("tokenizer*"):
        shutil.copy(file, folder)
    shutil.rmtree(folder.parent / "larger")


def template(text: str) -> Plant:
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
# Fault → how it is planted in a folder, and a part of the sentence.
FAULTS: dict[str, tuple[Plant, str]] = {
    "pickled weights": (as_pickle, "in other formats can run code"),
    "code in config.json": (own_code, "remote code is never run"),
    "code in the tokenizer": (own_tokenizer, "model"),
    "weights cut off": (lambda f: cut(f / "model.safetensors"), "safetensors file is cut off or damaged"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "safetensors file is cut off or damaged"),
    "a bit of the header flipped": (lambda f: flip(f / "model.safetensors", 12), "model"),
    "a header of 2^62 bytes": (lambda f: flip(f / "model.safetensors", 7), "safetensors file is cut off or damaged"),
    "a tensor missing": (lambda f: weights(f, lambda t: t.pop(LAYER)), LAYER),
    "a tensor of another shape": (lambda f: weights(f, lambda t: t.update({LAYER: t[LAYER][:4].clone()})), "have other shapes"),
    "NaN weights": (lambda f: weights(f, lambda t: t[LAYER].fill_(float("nan"))), f"not finite numbers, the first is {LAYER}"),
    "one infinite weight": (lambda f: weights(f, lambda t: t[LAYER][0].fill_(float("inf"))), "not finite numbers"),
    "an index that names a missing shard": (lambda f: index(f, "model-00001-of-00001.safetensors"), "model"),
    "an index that leads outside": (lambda f: index(f, "../../../../etc/passwd"), "model"),
    "a tokenizer of another model": (other_words, "no embedding for"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "model"),
    "text for a number of tokens": (lambda f: change(f / "tokenizer_config.json", model_max_length="x"), "no number of tokens"),
    "half a character": (lambda f: change(f / "tokenizer_config.json", clean_up_tokenization_spaces="\ud83d"), "surrogates not allowed"),
    "less than no tokens": (lambda f: change(f / "tokenizer_config.json", model_max_length=-1), "no number of tokens"),
    "tokenizer cut off": (lambda f: cut(f / "tokenizer.json"), "model"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{oh"), "JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "model"),
    "config of another architecture": (lambda f: change(f / "config.json", model_type="gpt2", architectures=["X"]), "model"),
    "config with another width": (lambda f: change(f / "config.json", hidden_size=32), "have other shapes"),
    "config with a vocabulary of 10^9": (lambda f: change(f / "config.json", vocab_size=10**9), "model"),
    "config with 200,000 layers": (lambda f: change(f / "config.json", num_hidden_layers=200_000), "no model has so many"),
    "config with text for a number": (lambda f: change(f / "config.json", num_attention_heads="two"), "model"),
    "a template without end": (template(ENDLESS), "was not done after"),
    "a template of 10^9 columns": (template("{{ '%1000000000s' | format('x') }}"), "hundreds of megabytes"),
    "a template that counts to 10^(10^9)": (template("{{ 10 ** (messages|length * 10 ** 9) }}"), "chat template"),
    "a template that leaves its sandbox": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "outside its sandbox"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data and a recipe."""
    pairs = [{"prompt": f"list {i}", "chosen": f"yes {WORDS[i % 9]}", "rejected": "no"} for i in range(40)]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    for name, rows in (("pairs", pairs), ("sft", demonstrations)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr("rlhf.models.templates.SECONDS_TO_RENDER", 0.5)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path


def call(verb: str, place: Path, capsys: pytest.CaptureFixture[str]) -> Outcome:
    line = json.dumps({"prompt": "list 1", "response": "yes"})
    return rlhf(*VERBS[verb], cwd=place, capsys=capsys, stdin=f"{line}\ny\n")


@pytest.fixture(scope="session")
def classifier_folder(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-label classifier of somebody else, without a card."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.fault(
    "any folder, any verb", "code in a folder", "weights not whole", "weights no numbers", "template without end", "sandbox and pickles"
)  # fmt: skip
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_hostile_folder_is_refused_by_every_verb(
    base_folder: Path, classifier_folder: Path, place: Path, capsys: pytest.CaptureFixture[str], verb: str, fault: str
) -> None:
    shutil.copytree(base_folder if verb in POLICIES else classifier_folder, place / "model")
    plant, sentence = FAULTS[fault]
    plant(place / "model")
    outcome = call(verb, place, capsys)
    require_refusal(outcome, says=sentence)
    assert not list(place.rglob("ran")), "its code ran"


@pytest.mark.fault("any folder, any verb")
@pytest.mark.parametrize("verb", VERBS)
def test_a_healthy_folder_is_not(
    base_folder: Path, classifier_folder: Path, place: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Or else the refusals above would say nothing; a server that would serve fails the test in its own words."""
    shutil.copytree(base_folder if verb in POLICIES else classifier_folder, place / "model")
    if verb == "serve":
        with pytest.raises(pytest.fail.Exception, match="it serves"):
            call(verb, place, capsys)
        return
    arguments = [*VERBS[verb], "--dry-run"] if verb == "run" else VERBS[verb]
    line = json.dumps({"prompt": "list 1", "response": "yes"})
    outcome = rlhf(*arguments, cwd=place, capsys=capsys, stdin=f"{line}\n")
    assert outcome.code == 0, outcome.stderr


@pytest.mark.fault("any folder, any verb")
def test_an_export_that_nobody_could_read_is_not_left_behind(
    base_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two parts of merged words have one id: such a tokenizer is read, but not once it was written again, without one of them."""
    model = shutil.copytree(base_folder, place / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    words, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    words[merges[0][0]] = words[merges[0][1]]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    require_refusal(call("export", place, capsys), says="out of vocabulary")


@pytest.mark.fault("any folder, any verb")
def test_an_export_that_fails_at_its_end_leaves_nothing(
    reward_folder: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("no golden scores")

    shutil.copytree(reward_folder, place / "model")
    monkeypatch.setattr("rlhf.pipeline.model_commands.certify", fail)
    require_refusal(call("export", place, capsys), says="no golden scores")


# ---- Adapters ----

ADAPTER_FAULTS: dict[str, tuple[Plant, str]] = {
    "another base of the same shape": (
        lambda f: weights(f.parent / "base", lambda t: t["model.embed_tokens.weight"].mul_(1.5)),
        "trained on another base",
    ),
    "its base is gone": (lambda f: shutil.rmtree(f.parent / "base"), "not there any more"),
    "its base is itself": (lambda f: change(f / "adapter_config.json", base_model_name_or_path=str(f)), "is an adapter itself"),
    "its base is a list": (lambda f: change(f / "adapter_config.json", base_model_name_or_path=["a"]), "nobody can tell"),
    "without a type": (lambda f: change(f / "adapter_config.json", peft_type=None), "model"),
    "of an unknown type": (lambda f: change(f / "adapter_config.json", peft_type="MINE"), "model"),
    "a rank of 0": (lambda f: change(f / "adapter_config.json", r=0), "model"),
    "weights cut off": (lambda f: cut(f / "adapter_model.safetensors"), "cut off or damaged"),
    "no keys": (lambda f: save_file({}, f / "adapter_model.safetensors"), "model"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "weights in other formats can run code",
    ),
    "NaN weights": (
        lambda f: weights(f, lambda t: t[min(t)].fill_(float("nan")), "adapter_model.safetensors"),
        "not finite numbers",
    ),
    "a fingerprint that is no JSON": (lambda f: (f / "adapter_base.json").write_text("{oh"), "model"),
}  # fmt: skip


@pytest.fixture(scope="session")
def adapters(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a policy's and a reward model's adapter on it."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(base_folder, root / "base")
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    save_model(get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), lora), tokenizer, root / "policy")
    settings = model_settings({"use_peft": True, "lora_r": 2})
    reward = build_reward_model(root / "base", settings, pad_token_id=tokenizer.pad_token_id)
    samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
    save_reward_model(root / "reward", reward, tokenizer, samples=samples)
    return root


@pytest.mark.fault("any folder, any verb", "adapter of another base")
@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_hostile_adapter_is_refused_by_every_verb(
    adapters: Path, place: Path, capsys: pytest.CaptureFixture[str], verb: str, fault: str
) -> None:
    shutil.copytree(adapters / "base", place / "base")
    model = shutil.copytree(adapters / ("policy" if verb in POLICIES else "reward"), place / "model")
    change(model / "adapter_config.json", base_model_name_or_path=str(place / "base"))
    plant, sentence = ADAPTER_FAULTS[fault]
    plant(model)
    require_refusal(call(verb, place, capsys), says=sentence)


# ---- Cards of reward models, experts ----

CARD_FAULTS: dict[str, Plant] = {
    "no JSON": lambda f: (f / "reward_model.json").write_text("{oh"),
    "a list": lambda f: (f / "reward_model.json").write_text("[]"),
    "null": lambda f: (f / "reward_model.json").write_text("null"),
    "a probe that is text": lambda f: change(f / "reward_model.json", probe="x"),
    "a probe without turns": lambda f: change(f / "reward_model.json", probe=[{"prompt": [[]], "response": "b", "score": 1.0}]),
    "a probe of nothing": lambda f: change(f / "reward_model.json", probe=[]),
    "a probe of lists": lambda f: change(f / "reward_model.json", probe=[["a", "b"]]),
    "a probe whose score is text": lambda f: change(f / "reward_model.json", probe=[{"prompt": "a", "response": "b", "score": "c"}]),
    "a probe whose score is 10^30": lambda f: change(f / "reward_model.json", probe=[{"prompt": "a", "response": "b", "score": 10**30}]),
    "digests that are text": lambda f: change(f / "reward_model.json", files="x"),
    "digests that are numbers": lambda f: change(f / "reward_model.json", files={"model.safetensors": 3}),
    "a file of weights that is gone": lambda f: change(f / "reward_model.json", files={"model-00002.safetensors": "0" * 64}),
    "a mean of 10^400": lambda f: change(f / "reward_model.json", mean=10**400),
    "a deviation below 0": lambda f: change(f / "reward_model.json", std=-1.0),
    "a mean that is text": lambda f: change(f / "reward_model.json", mean="x"),
    "a deviation that is NaN": lambda f: change(f / "reward_model.json", std=float("nan")),
    "another template": lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"),
    "a bit of a weight flipped": lambda f: flip(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 1),
    "experts that are text": lambda f: (f / "experts.json").write_text('"x"'),
    "experts without keys": lambda f: (f / "experts.json").write_text("{}"),
    "experts of wrong types": lambda f: (f / "experts.json").write_text('{"experts": 3, "weights": "x", "names": null}'),
}  # fmt: skip


@pytest.mark.fault("any folder, any verb")
@pytest.mark.parametrize("fault", CARD_FAULTS)
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in POLICIES or verb == "export"])
def test_a_hostile_card_is_refused_by_every_verb(
    reward_folder: Path, place: Path, capsys: pytest.CaptureFixture[str], verb: str, fault: str
) -> None:
    CARD_FAULTS[fault](Path(shutil.copytree(reward_folder, place / "model")))
    require_refusal(call(verb, place, capsys), says="model")
