"""A model that can't be used to the end is refused in one sentence before anything is made, by `rlhf check` and by `rlhf run`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.load import load_tokenizer
from rlhf.pipeline.checks import check_arguments
from rlhf.recipe import load_recipe
from tests.command import rlhf
from tests.conftest import WORDS

PAIR = {"prompt": "please list red apple", "chosen": "yes", "rejected": "no"}
RECIPE = "name: x\nbackbone: {model: ./model}\ndata: {preferences: p.jsonl}\nppo: {total_episodes: 8}\n"


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def without_template(folder: Path) -> None:
    configure(folder, max_position_embeddings=1024)
    (folder / "chat_template.jinja").unlink()


def words_alone(folder: Path, *, unknown: str | None = "<unk>") -> None:
    """A vocabulary of words without bytes: its unknown token is needed, and there is no other but the end token."""
    names = ["<eos>", *([unknown] if unknown else [])]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, *WORDS])}, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = AutoTokenizer.from_pretrained(folder).chat_template
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token=unknown)
    tokenizer.chat_template = template
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(folder)


class Fault(NamedTuple):
    """What is done to a model, what the recipe says beside it, and the sentence that tells of it."""

    plant: Callable[[Path], object]
    sentence: str
    overrides: tuple[str, ...] = ()


REFUSED = {
    "no padding token": Fault(words_alone, "no padding token other than its end token '<eos>'"),
    "an unknown architecture": Fault(
        lambda folder: configure(folder, model_type="mine", architectures=["Mine"]),
        "does not know the architecture 'mine'; install one that does (pip install -U transformers), or take another model.",
    ),
    "no language model": Fault(
        lambda folder: configure(folder, model_type="vit", architectures=["ViTModel"]),
        "transformers has no language model of the architecture 'vit'",
    ),
    "no sequence classifier": Fault(
        lambda folder: configure(folder, model_type="mamba", architectures=["MambaForCausalLM"]),
        "transformers has no sequence classifier of the architecture 'mamba'",
    ),
    "answers fill the context": Fault(
        lambda folder: configure(folder, max_position_embeddings=64),
        "reads 64 tokens, which ppo.max_completion_length=64 leaves no prompt of; lower it,",
        ("ppo.max_completion_length=64",),
    ),
    "a context shorter than every prompt": Fault(
        lambda folder: configure(folder, max_position_embeddings=64),
        "leaves 3 for a prompt, and every one of the 40 prompts that were looked at is longer (the shortest has ",
        ("ppo.max_completion_length=61",),
    ),
    "no model": Fault(shutil.rmtree, "./model: no model there"),
}
SAID = {
    "no chat template": Fault(without_template, "no chat template; conversations are written as 'Human: … Assistant: …'."),
    "a context shorter than some prompts": Fault(
        lambda folder: configure(folder, max_position_embeddings=64),
        "reads 64 tokens, of which ppo.max_completion_length=20 leaves 44 for a prompt (ppo.max_prompt_length is 512); longer "
        "prompts lose their beginning.",
        ("ppo.max_completion_length=20",),
    ),
}  # fmt: skip


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A recipe, its data and its model."""
    shutil.copytree(base_folder, tmp_path / "model")
    rows = [PAIR | {"prompt": f"{PAIR['prompt']} {word} {i}"} for word in WORDS[:4] for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(folder: Path, fault: str) -> None:
    plant, sentence, overrides = REFUSED[fault]
    plant(folder / "model")
    before = files(folder)
    for words in (("check", "r.yaml"), ("run", "r.yaml"), ("run", "r.yaml", "--dry-run")):
        result = rlhf(*words, *overrides, cwd=folder)
        assert result.returncode == 2, result.stdout + result.stderr
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("Note: ")]
        assert line.startswith("backbone.model: ./model")
        assert sentence in line
        assert files(folder) == before


@pytest.mark.parametrize("fault", SAID)
def test_a_model_that_works_otherwise_than_it_reads_is_said(folder: Path, fault: str) -> None:
    plant, sentence, overrides = SAID[fault]
    plant(folder / "model")
    for words in (("check", "r.yaml"), ("run", "r.yaml", "--dry-run")):
        result = rlhf(*words, *overrides, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr
        (note,) = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
        assert sentence in note


def test_a_model_as_it_should_be_is_not_talked_about(folder: Path) -> None:
    configure(folder / "model", max_position_embeddings=1024)
    result = rlhf("check", "r.yaml", cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "r.yaml: fine\n", "")


def test_check_reads_overrides_as_run_does(folder: Path) -> None:
    result = rlhf("check", "r.yaml", "ppo.kl_coeff=1", cwd=folder)
    assert result.returncode == 2
    assert "did you mean 'kl_coef'?" in result.stderr
    assert rlhf("check", "ppo.kl_coef=1", cwd=folder).returncode == 2


def test_an_encoder_is_fine_for_a_reward_model_and_refused_for_a_policy(
    folder: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(folder / "model")
    shutil.copytree(encoder_folder, folder / "model")
    assert rlhf("check", "r.yaml", cwd=folder).returncode == 0
    monkeypatch.chdir(folder)
    check_arguments(load_recipe("r.yaml"), until="reward")
    with pytest.raises(UserError, match=r"backbone.model: ./model is an encoder \(bert\), which cannot generate"):
        check_arguments(load_recipe("r.yaml"))


def test_answers_that_fill_the_context_are_refused_where_only_a_scale_is_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT's samples and the reward's scale have PPO's lengths; a run that ends before PPO need not name them."""
    configure(folder / "model", max_position_embeddings=64)
    monkeypatch.chdir(folder)
    for until in ("sft", "reward"):
        check_arguments(load_recipe("r.yaml"), until=until)
        with pytest.raises(UserError, match=r"reads 64 tokens, which ppo.max_completion_length=64 leaves no prompt of"):
            check_arguments(load_recipe("r.yaml", ["ppo.max_completion_length=64"]), until=until)


def test_an_unknown_token_pads_only_where_no_text_needs_it(folder: Path) -> None:
    """Words without bytes need it; nor is there one to take in a vocabulary that has none."""
    for unknown in ("<unk>", None):
        words_alone(folder / "model", unknown=unknown)
        with pytest.raises(UserError, match="no padding token other than its end token"):
            load_tokenizer(folder / "model", conversational=True)
