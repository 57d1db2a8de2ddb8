"""One place opens models: every fault is one sentence, no code of a model runs, no tensor is missing without a word."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.load import find_source, load_policy, load_scorer, load_tokenizer, model_settings
from rlhf.models.open import open_config, open_tokenizer
from rlhf.models.save import save_model
from tests.unit_scale import build_reward_model

PLAIN = model_settings({})


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def copied(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


LAYER = "model.layers.0.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is no JSON": (lambda f: (f / "config.json").write_text("{oh"), "JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "can't be opened"),
    "no config": (lambda f: (f / "config.json").unlink(), "no model there"),
    "unknown architecture": (lambda f: change(f / "config.json", model_type="mine", architectures=["M"]), "mine"),
    "weights cut off": (lambda f: truncate(f / "model.safetensors"), "safetensors file is cut off"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "safetensors file is cut off"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "can't be opened"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "in other formats can run code"),
    "a tensor missing": (lambda f: weights(f, lambda t: t.pop(LAYER)), LAYER),
    "another shape": (lambda f: weights(f, lambda t: t.update({LAYER: t[LAYER][:4].clone()})), "have other shapes"),
    "code of its own": (
        lambda f: change(
            f / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
        ),
        "remote code is never run",
    ),
}  # fmt: skip


@pytest.mark.fault("code in a folder", "weights not whole")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["policy", "reward", "scorer"])
def test_every_fault_is_one_sentence(
    copied: Path, fault: str, kind: str, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    (copied / "mine.py").write_text("import pathlib\npathlib.Path('ran').touch()\n", encoding="utf-8")
    if kind == "scorer":
        build_reward_model(copied, pad_token_id=tokenizer.pad_token_id).save_pretrained(copied)
    monkeypatch.chdir(copied)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plant, sentence = FAULTS[fault]
    plant(copied)
    load = {
        "policy": lambda: load_policy(copied, PLAIN),
        "reward": lambda: build_reward_model(copied, PLAIN, pad_token_id=0),
        "scorer": lambda: load_scorer(copied),
    }[kind]
    with pytest.raises(UserError) as error:
        load()
    (problem,) = error.value.problems
    assert sentence in problem
    assert str(copied) in problem
    assert "\n" not in problem
    assert not Path("ran").exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer(copied: Path, file: str) -> None:
    (copied / file).write_text("{oh", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_tokenizer(copied, conversational=True)
    assert "\n" not in str(error.value)


@pytest.mark.fault("code in a folder")
def test_a_tokenizer_with_code_of_its_own(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "mine.py").write_text("import pathlib\npathlib.Path('ran').touch()\n", encoding="utf-8")
    change(copied / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.T", None]})
    monkeypatch.chdir(copied)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(UserError):  # or it is read without that code
        open_tokenizer(copied)
    assert not Path("ran").exists()


def test_nothing_there(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "no/such/model/anywhere", ""):
        with pytest.raises(UserError) as error:
            load_policy(name, PLAIN)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no model there"):
        open_config(tmp_path)


@pytest.mark.fault("weights not whole")
def test_a_folder_of_models_names_them(tmp_path: Path, copied: Path) -> None:
    """`rlhf serve STAGE` takes an ensemble; a person who then named STAGE/model got its first member alone."""
    (tmp_path / "stage").mkdir()
    shutil.copytree(copied, tmp_path / "stage/model")
    with pytest.raises(UserError, match=r"no model there \(.*\); one lies in .*/stage/model\."):
        load_scorer(tmp_path / "stage")
    shutil.copytree(copied, tmp_path / "stage/model-1")
    with pytest.raises(
        UserError, match=r"no model but a folder of 2, model, model-1: name one of them, or give .* `rlhf serve`"
    ):
        load_scorer(tmp_path / "stage")


def test_tensors_without_a_place_are_said(copied: Path) -> None:
    weights(copied, lambda tensors: tensors.update({"model.layers.7.extra.weight": torch.ones(2)}))
    with pytest.warns(UserWarning, match="no place for model.layers.7.extra.weight"):
        load_policy(copied, PLAIN)


def test_a_new_head_is_no_missing_tensor(copied: Path, recwarn: pytest.WarningsRecorder) -> None:
    build_reward_model(copied, PLAIN, pad_token_id=0)
    assert not [w for w in recwarn if "no place for" in str(w.message)]


def test_what_a_scoring_head_has_beside_its_weight_is_said(reward_folder: Path, tmp_path: Path) -> None:
    """A public reward model's head may have a bias, which the class of transformers has not; it was dropped in silence."""
    shutil.copytree(reward_folder, tmp_path / "theirs")
    weights(tmp_path / "theirs", lambda tensors: tensors.update({"score.bias": torch.ones(1)}))
    with pytest.warns(UserWarning, match=r"has no place for score.bias; not used"):
        load_scorer(tmp_path / "theirs")


@pytest.fixture
def adapter(copied: Path, tokenizer: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    save_model(get_peft_model(AutoModelForCausalLM.from_pretrained(copied), lora), tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


ADAPTER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{oh"), "JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "nobody can tell"),
    "no base": (lambda f: change(f / "adapter_config.json", base_model_name_or_path=None), "nobody can tell"),
    "base gone": (lambda f: change(f / "adapter_config.json", base_model_name_or_path="/nowhere"), "not there any more"),
    "relative base gone": (lambda f: change(f / "adapter_config.json", base_model_name_or_path="../x"), "not there any more"),
    "weights cut off": (lambda f: truncate(f / "adapter_model.safetensors"), "cut off"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "other formats can run code"),
    "a tensor missing": (
        lambda f: weights(f, lambda t: t.pop(next(n for n in sorted(t) if "lora_B" in n)), "adapter_model.safetensors"),
        "the adapter has no",
    ),
    "a tensor too many": (
        lambda f: weights(
            f, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2)}), "adapter_model.safetensors"
        ),
        "no place for base_model.model.x.lora_A.weight",
    ),
    "unknown key": (lambda f: change(f / "adapter_config.json", peft_type="MINE"), "can't be opened"),
}  # fmt: skip


@pytest.mark.fault("adapter of another base")
@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_every_fault_of_an_adapter_is_one_sentence(adapter: Path, fault: str) -> None:
    plant, sentence = ADAPTER_FAULTS[fault]
    plant(adapter)
    with pytest.raises(UserError) as error:
        load_policy(adapter, PLAIN)
    assert sentence in str(error.value)
    assert str(adapter) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.fault("relative and home folders")
def test_a_relative_base_is_found_from_anywhere(
    copied: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    save_model(get_peft_model(AutoModelForCausalLM.from_pretrained("model"), lora), tokenizer, Path("run/adapter"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_source("../run/adapter").base == str(tmp_path / "model")
    load_policy("../run/adapter", PLAIN)
    # One that another program saved: looked for above the adapter.
    change(tmp_path / "run/adapter/adapter_config.json", base_model_name_or_path="model")
    assert find_source("../run/adapter").base == str(tmp_path / "model")
    change(tmp_path / "run/adapter/adapter_config.json", base_model_name_or_path="org/on-the-hub")
    assert find_source("../run/adapter").base == "org/on-the-hub"


@pytest.mark.fault("relative and home folders")
def test_a_home_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copied.parent))
    assert find_source("~/model").base == str(copied)
    load_policy("~/model", PLAIN)
    load_tokenizer("~/model", conversational=True)
    assert os.path.expanduser("~/model") == str(copied)


def test_a_mistral_tokenizer_is_read_as_transformers_reads_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """With vLLM comes mistral-common, whose tokenizer has no chat template; what transformers only logs is a warning here."""
    given: dict[str, Any] = {}
    read = AutoTokenizer.from_pretrained

    def patched(*arguments: Any, **settings: Any) -> Any:
        given.update(settings)
        tokenizer = read(*arguments, **settings)
        tokenizer.backend_tokenizer.fix_mistral_regex = False  # where transformers leaves what it found
        return tokenizer

    open_tokenizer(copied)
    assert not recwarn.list
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", patched)
    with pytest.warns(UserWarning, match=r"split words by a pattern that Mistral has corrected since"):
        open_tokenizer(copied)
    assert given["mistral_format"] is False


@pytest.mark.fault("code in a folder")
def test_no_place_of_the_package_opens_a_model_without_saying_that_no_code_runs() -> None:
    import rlhf

    places = []
    for file in Path(rlhf.__file__).parent.rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            opens = "from_pretrained(" in line and ("Auto" in line or "kind." in line)
            if opens and '"FOLDER"' not in line and "trust_remote_code" not in " ".join(lines[number : number + 4]):
                places.append(f"{file.name}:{number + 1}")
    assert places == ["cards.py:27"] or not places


def test_the_command_ends_with_2_and_a_sentence(copied: Path) -> None:
    (copied / "config.json").write_text("{oh", encoding="utf-8")
    outcome = subprocess.run(
        [sys.executable, "-m", "rlhf", "score", str(copied)],
        input="y\n",
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr


@pytest.mark.fault("another user")
def test_a_file_that_this_user_may_not_read_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors calls such a file missing. Root may read all, so what the system says is put in its place."""
    closed, may = copied / "model.safetensors", os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and may(path, mode))

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(f"No such file or directory: {closed}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(
        UserError, match=r"model\.safetensors can't be read by this user \(\d+ owns it\); let its owner"
    ):
        load_policy(copied, PLAIN)


@pytest.mark.fault("another user")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_mode_of_any_new_file(base_folder: Path, tmp_path: Path, umask: int, mode: int) -> None:
    tokenizer = load_tokenizer(base_folder, conversational=True)
    before = os.umask(umask)
    try:
        save_model(load_policy(base_folder, PLAIN), tokenizer, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {mode}, modes
