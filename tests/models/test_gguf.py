"""GGUF files as backbones. The files are written here with llama.cpp's own package, as its converter lays out a Llama."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.dequantise import dequantise
from rlhf.models.gguf import gguf_file
from rlhf.models.open import open_config
from tests.command import rlhf

PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    checkpoint: Path, file: Path, *, architecture: str = "llama", template: bool = True, pad: bool = True
) -> dict[str, torch.Tensor]:
    """Write a Llama checkpoint as GGUF, its matrices quantised to 8 bits, and return its weights as they are dequantised."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id if pad else tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quants.quantize(interleaved(name, tensor, config).numpy(), kind)
        writer.add_tensor(ggml_name(name), values, raw_dtype=kind)
        whole = torch.from_numpy(np.array(gguf.quants.dequantize(values, kind))).view(tensor.shape)
        weights[name] = interleaved(name, whole, config, back=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def ggml_name(name: str) -> str:
    """Return llama.cpp's name of a Llama's tensor."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, place = name.removesuffix(".weight").split(".", maxsplit=3)
    return f"blk.{layer}.{PLACES[place]}.weight"


def interleaved(name: str, tensor: torch.Tensor, config: object, *, back: bool = False) -> torch.Tensor:
    """Return queries and keys with the two halves of each head interleaved, as llama.cpp rotates them, or take that back."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}  # type: ignore[attr-defined]
    count = next((heads[part] for part in heads if part in name), None)
    if count is None:
        return tensor
    shape = (count, -1, 2) if back else (count, 2, -1)
    return tensor.view(*shape, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


@pytest.fixture(scope="module")
def quantised(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file of the tests' Llama, and its dequantised weights."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return file, write_gguf(base_folder, file)


def test_dequantised_weights_are_those_that_the_blocks_stand_for(
    quantised: tuple[Path, dict[str, torch.Tensor]], base_folder: Path, tmp_path: Path
) -> None:
    file, weights = quantised
    dequantise(file, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    written = model.state_dict()
    assert weights.keys() == written.keys() - {"lm_head.weight"}
    for name, tensor in weights.items():
        assert torch.equal(written[name], tensor), name
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    plain.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_tokenizer_and_ends_are_those_of_the_checkpoint(
    quantised: tuple[Path, dict[str, torch.Tensor]], base_folder: Path, tmp_path: Path
) -> None:
    dequantise(quantised[0], tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(base_folder)
    turns = [{"role": "user", "content": "list two\n plums"}, {"role": "assistant", "content": "yes"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(turns, tokenize=False)
    texts = [theirs.apply_chat_template(turns, tokenize=False), "apple  pear", "é"]
    assert [ours(text)["input_ids"] for text in texts] == [theirs(text)["input_ids"] for text in texts]
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    generation = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_configuration_is_read_once_while_the_file_stays(
    quantised: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers parses every word of the vocabulary for it, seconds each time; a check asks three times."""
    file, reads, read = tmp_path / "m.gguf", list[Path](), AutoConfig.from_pretrained
    shutil.copy(quantised[0], file)

    def counting(place: Path, **arguments: Any) -> Any:
        reads.append(place)
        return read(place, **arguments)

    monkeypatch.setattr(AutoConfig, "from_pretrained", counting)
    first = open_config(file)
    first.hidden_size = 0  # whoever changes it changes a copy
    assert open_config(file).hidden_size == open_config(tmp_path).hidden_size != 0
    assert len(reads) == 1
    os.utime(file, ns=(1, 1))
    open_config(file)
    assert len(reads) == 2, "another file may lie there by now"


@pytest.mark.parametrize("name", ["state-of-the-art.Q8_0.gguf", "UPPER.GGUF"])
def test_names_of_files_say_nothing_more(
    quantised: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    """Only `-00001-of-00002` at the end of a name is a part of a split model; on other systems endings are large letters."""
    shutil.copy(quantised[0], tmp_path / name)
    assert gguf_file(tmp_path / name) == gguf_file(tmp_path) == tmp_path / name
    assert open_config(tmp_path / name).model_type == "llama"


def test_padding_that_is_the_end_token_is_replaced(base_folder: Path, tmp_path: Path) -> None:
    """llama.cpp's files often name the end token as padding."""
    write_gguf(base_folder, tmp_path / "a.gguf", pad=False)
    dequantise(tmp_path / "a.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def cut_head(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])


def rename_architecture(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"llama", b"lxama"))


def write_text(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut, "cut off or damaged"),
        (cut_head, "cut off or damaged"),
        (rename_architecture, "architecture lxama is not supported"),
        (write_text, "not a GGUF file"),
        (lambda file: (file.parent / "second.gguf").write_bytes(file.read_bytes()), "2 GGUF files (model.gguf, second.gguf)"),
        (lambda file: file.rename(file.parent / "model-00001-of-00002.gguf"), "a part of a split model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["check", "run"])
def test_bad_files_are_one_sentence_and_nothing_is_created(
    quantised: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    spoil: Callable[[Path], object],
    sentence: str,
    verb: str,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(quantised[0].read_bytes())
    spoil(folder / "model.gguf")
    result = rlhf(verb, str(recipe(tmp_path, folder)), *(["--out", "out"] if verb == "run" else []), cwd=tmp_path)
    assert result.returncode == 2, result
    assert sentence in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_file_and_missing_package(
    quantised: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no such file"):
        gguf_file("nowhere/model.gguf")
    monkeypatch.setattr("rlhf.models.gguf.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-pipeline\[gguf\]'"):
        gguf_file(quantised[0])


def test_hub_ids_and_checkpoints_are_no_gguf(base_folder: Path, tmp_path: Path) -> None:
    assert gguf_file("HuggingFaceTB/SmolLM2-135M-Instruct") is None
    assert gguf_file(base_folder) is None
    assert gguf_file(tmp_path) is None


def test_a_run_goes_from_the_file_to_a_policy(quantised: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """The base stage is made once; adapters name it as their base, and a second run of the same command does nothing."""
    file = recipe(tmp_path, quantised[0])
    first = rlhf("run", str(file), "--out", "out", cwd=tmp_path)
    assert first.returncode == 0, first
    assert "dequantised once" in first.stdout + first.stderr
    adapter = json.loads((tmp_path / "out/round-1/ppo/model/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"].endswith("out/round-0/base/model"), adapter
    manifest = (tmp_path / "out/round-0/base/manifest.json").read_text()
    again = rlhf("run", str(file), "--out", "out", cwd=tmp_path)
    assert again.returncode == 0, again
    assert (tmp_path / "out/round-0/base/manifest.json").read_text() == manifest
    doctor = rlhf("doctor", str(file), cwd=tmp_path)
    looked_at = [line for line in doctor.stderr.splitlines() if line.endswith((": holds", ": FAILS"))]
    assert len(looked_at) == 11, doctor
    failed = [line for line in looked_at if line.endswith("FAILS")]
    assert all("policy ends" in line for line in failed), "whether one of 16 answers of random weights ends is chance"
    assert doctor.returncode == (1 if failed else 0), doctor


def recipe(folder: Path, model: Path) -> Path:
    """Write a small recipe on a backbone and pairs, LoRA throughout."""
    words = ["apple", "pear", "plum", "cat"]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"list {a} {b} {c}"}],
            "chosen": [{"role": "assistant", "content": f"yes {a}"}],
            "rejected": [{"role": "assistant", "content": f"no {b} {c}"}],
        }
        for a in words
        for b in words
        for c in words
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "per_device_train_batch_size": 8}
    settings = {
        "name": "gguf",
        "backbone": {"model": str(model)},
        "data": {"preferences": str(folder / "pairs.jsonl")},
        "reward": lora,
        "ppo": lora | {"total_episodes": 16, "max_completion_length": 8, "num_mini_batches": 1},
        "evaluate": {"prompts": 6},
    }
    (folder / "recipe.json").write_text(json.dumps(settings))
    return folder / "recipe.json"
