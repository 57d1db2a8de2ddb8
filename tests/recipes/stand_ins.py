"""Tiny random stand-ins of the models and data sets that the recipes name: same architecture, tokenizer, template, layout.

A recipe that names another model or data set needs an entry here; `test_stand_ins.py` says so.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf.pipeline.plan import plan
from rlhf.recipe import Recipe, load_recipe
from tests.recipes import shipped_recipes, templates

# ---- Data sets: rows in the layout in which they lie on the hub ----


def question(i: int) -> str:
    return f"Can you say number {i} ?"


def answers(i: int) -> tuple[str, str]:
    """Return the better answer and the worse one."""
    return f"Yes , here is number {i} .", f"No , never {i % 3} ."


def transcripts(i: int) -> list[dict[str, Any]]:
    """Anthropic/hh-rlhf: two transcripts, some with an earlier turn."""
    before = "\n\nHuman: Hello\n\nAssistant: Hello !" if i % 3 == 0 else ""
    good, bad = (f"{before}\n\nHuman: {question(i)}\n\nAssistant: {answer}" for answer in answers(i))
    return [{"chosen": good, "rejected": bad}]


def turns(i: int, side: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": question(i)}, {"role": "assistant", "content": answers(i)[side]}]


def binarized(i: int) -> list[dict[str, Any]]:
    """HuggingFaceH4/ultrafeedback_binarized: both conversations whole, `messages` the better one."""
    sides = {"chosen": turns(i, 0), "rejected": turns(i, 1), "messages": turns(i, 0)}
    return [{"prompt": question(i), "prompt_id": f"{i:064x}", **sides, "score_chosen": 8.5, "score_rejected": 4.0}]


def rated(i: int) -> list[dict[str, Any]]:
    """nvidia/HelpSteer2: two rows a prompt, an answer and its five attributes each."""
    scores = [{"helpfulness": 4, "correctness": 4}, {"helpfulness": 1, "correctness": 2}]
    others = {"coherence": 4, "complexity": 1, "verbosity": 1}
    rows = [
        {"prompt": question(i), "response": answer, **values, **others}
        for answer, values in zip(answers(i), scores, strict=True)
    ]
    return rows if i % 2 else rows[::-1]


def signed(i: int) -> list[dict[str, Any]]:
    """nvidia/HelpSteer3: a context of turns, two answers, and a preference from -3 (the first) to 3 (the second)."""
    good, bad = answers(i)
    first = i % 2 == 0
    strength = -2 if first else 3
    return [
        {
            "domain": "general",
            "language": "english",
            "context": [{"role": "user", "content": question(i)}],
            "response1": good if first else bad,
            "response2": bad if first else good,
            "overall_preference": strength,
            "individual_preference": [{"score": strength, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
        }
    ]


def ranked(i: int) -> list[dict[str, Any]]:
    """berkeley-nest/Nectar: a transcript and its answers, each with its rank; here three, two of them tied now and then."""
    texts = [*answers(i), f"{answers(i)[1]} Not {i}"]
    rows = [
        {"answer": text, "model": f"m{place}", "rank": rank}
        for place, (text, rank) in enumerate(zip(texts, (1.0, 2.0, 2.0 + i % 2), strict=True))
    ]
    prompt = f"\n\nHuman: {question(i)}\n\nAssistant: "
    return [
        {"prompt": prompt, "answers": rows[::-1], "turns": 1, "num_responses": 3, "source": ["x"], "good_natured": True}
    ]


DATA_SETS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "Anthropic/hh-rlhf": transcripts,
    "HuggingFaceH4/ultrafeedback_binarized": binarized,
    "nvidia/HelpSteer2": rated,
    "nvidia/HelpSteer3": signed,
    "berkeley-nest/Nectar": ranked,
}
PROMPTS = 24


def write_data(name: str, folder: Path) -> Path:
    """Write a data set's stand-in, and return its file."""
    file = folder / f"{name.rpartition('/')[2]}.jsonl"
    rows = [row for i in range(PROMPTS) for row in DATA_SETS[name](i)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts() -> list[str]:
    """Return what the tokenizers are trained on."""
    frames = ["Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024", "system user assistant model"]
    frames += ["You are a helpful assistant", "You are Qwen, created by Alibaba Cloud.", "Human: Assistant: Hello !"]
    return [*frames, *(text for i in range(PROMPTS) for text in (question(i), *answers(i)))] * 4


# ---- Models ----

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


class StandIn(NamedTuple):
    """A model's tiny random twin.

    Attributes:
        architecture: as a table names it.
        config: the class of its configuration.
        sizes: its arguments, vocabulary aside; small, otherwise as the model's own.
        tokenizer: trains its tokenizer, with its special tokens and chat template.
        template: as a table names it.
        ends: the end tokens of its generation configuration.
    """

    architecture: str
    config: type[PreTrainedConfig]
    sizes: dict[str, Any]
    tokenizer: Callable[[Sequence[str]], Any]
    template: str
    ends: tuple[str, ...] = ()


def _qwen_3(*, tied: bool) -> StandIn:
    sizes = TINY | {"tie_word_embeddings": tied}
    return StandIn("Qwen3", Qwen3Config, sizes, templates.qwen_3, "ChatML, thoughts", ("<|im_end|>", "<|endoftext|>"))


GEMMA_3 = TINY | {
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,  # shorter than the prompts
    "query_pre_attn_scalar": 8,
}
MODELS: dict[str, StandIn] = {
    "Qwen/Qwen3-0.6B": _qwen_3(tied=True),
    "Qwen/Qwen3-8B": _qwen_3(tied=False),
    "meta-llama/Llama-3.1-8B-Instruct": StandIn(
        "Llama",
        LlamaConfig,
        TINY | {"rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": False},
        templates.llama_3_1,
        "Llama 3.1",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "google/gemma-3-1b-it": StandIn(
        "Gemma 3", Gemma3TextConfig, GEMMA_3, templates.gemma_3, "Gemma 3", ("<eos>", "<end_of_turn>")
    ),
    "meta-llama/Llama-2-7b-hf": StandIn(
        "Llama", LlamaConfig, TINY | {"num_key_value_heads": 4}, templates.llama_2, "none: transcripts", ("</s>",)
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": StandIn(
        "Qwen2",
        Qwen2Config,
        {key: value for key, value in TINY.items() if key != "head_dim"} | {"tie_word_embeddings": True},
        templates.qwen_2_5,
        "ChatML, system turn",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": StandIn(
        "Llama",
        LlamaConfig,
        TINY | {"num_hidden_layers": 2, "tie_word_embeddings": True},
        templates.smol_lm_2,
        "ChatML, system turn",
        ("<|im_end|>",),
    ),
    "sentence-transformers/all-MiniLM-L6-v2": StandIn(
        "BERT",
        BertConfig,
        {key: TINY[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        templates.bert,
        "none: transcripts",
    ),
}


def build_model(name: str, folder: Path) -> Path:
    """Write a model's stand-in as it would lie on a disk, and return its folder."""
    stand_in = MODELS[name]
    folder = folder / name.rpartition("/")[2]
    tokenizer = stand_in.tokenizer(texts())
    config = stand_in.config(
        **stand_in.sizes,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(zlib.crc32(name.encode()))
    model = (AutoModelForCausalLM if stand_in.ends else AutoModel).from_config(config)
    if stand_in.ends:  # as the models on the hub declare it, samplers' settings included
        ends = tokenizer.convert_tokens_to_ids(list(stand_in.ends))
        model.generation_config = GenerationConfig(
            eos_token_id=ends, do_sample=True, temperature=0.6, top_k=20, top_p=0.95
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- Recipes ----

ROOT = Path(__file__).parents[2] / "recipes"
# The recipe of each architecture that the suite runs to its end; `tests/benchmarks/stand_ins.py` runs every one.
RUN_TO_THE_END = (
    "models/qwen3-8b-qlora.yaml",
    "models/gemma-3-1b-lora.yaml",
    "secrets-of-rlhf.yaml",
    "nectar_encoder.yaml",
    "helpsteer2_encoder.yaml",
)


def _recipes() -> dict[str, bool]:
    """Return every recipe that names a model, and whether the suite runs it to its end."""
    recipes = {str(file.relative_to(ROOT)): load_recipe(file) for file in shipped_recipes()}
    return {name: name in RUN_TO_THE_END for name, recipe in recipes.items() if recipe.backbone.model is not None}


RECIPES = _recipes()


def named(name: str) -> Recipe:
    """Return a recipe as it is shipped."""
    return load_recipe(ROOT / name)


class StandIns:
    """The stand-ins in a folder, each built when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def model(self, name: str) -> Path:
        """Return the folder of a model's stand-in."""
        folder = self.folder / name.rpartition("/")[2]
        return folder if folder.exists() else build_model(name, self.folder)

    def data(self, name: str) -> Path:
        """Return the file of a data set's stand-in."""
        file = self.folder / f"{name.rpartition('/')[2]}.jsonl"
        return file if file.exists() else write_data(name, self.folder)

    def overrides(self, name: str) -> list[str]:
        """Return what redirects a recipe's hub ids to their stand-ins, and nothing else."""
        recipe = named(name)
        words = [f"backbone.model={self.model(str(recipe.backbone.model))}"]
        if recipe.rounds.labels_from == "verdicts":
            words.append(f"rounds.judge_model={self.model(str(recipe.rounds.judge_model))}")
        for key in ("preferences", "sft", "prompts"):
            words += [f"data.{key}={self.data(entry.source)}" for entry in recipe.data.sources(key)]
        return words + (["data.test=null"] if recipe.data.test is not None else [])  # its rows are held out of the file


def small(name: str) -> list[str]:
    """Return what makes a recipe small: steps, batches and lengths; a machine without bf16 and 4-bit kernels."""
    recipe = named(name)
    words = ["evaluate.prompts=2", "rounds.count=1"]
    if recipe.rounds.labels_from == "verdicts":
        words += ["rounds.labels_from=lab", "rounds.judge_model=null"]  # one round asks nobody
    if recipe.lab is not None:
        words += ["lab.pairs=100", "lab.test_pairs=50"]
    for stage in ("sft", "reward", "ppo"):
        if stage == "sft" and recipe.data.sft is None:
            continue
        keys = getattr(recipe, stage).trl_settings()
        words += [f"{stage}.bf16=false", f"{stage}.per_device_train_batch_size=8", f"{stage}.save_strategy='no'"]
        words += [f"{stage}.{key}={value}" for key, value in SMALL.items() if key in keys]
    words += ["ppo.total_episodes=16", "ppo.max_completion_length=8", "ppo.num_mini_batches=1", "ppo.num_ppo_epochs=1"]
    if recipe.reward.needs_vote:
        words += ["vote.members=2", "vote.folds=2", *(["vote.trunk=1"] if recipe.vote.trunk else [])]
    if recipe.reward.meta:
        words += ["reward.meta_pool=4", "reward.meta_prompts=2", "reward.meta_responses=2"]
    return words


SMALL = {
    "dtype": "float32",
    "load_in_4bit": "false",
    "gradient_accumulation_steps": 1,
    "critic_warmup": 1,
    "logging_steps": 1,
    "max_length": 256,
}


# ---- What is covered ----

STAGES = ("check", "dry-run", "sft", "vote", "reward", "ppo", "evaluate")


def coverage_table() -> str:
    """Return the table architecture × template × stage → test, from the entries above and the plans of the recipes."""
    lines = [f"| architecture | chat template | recipe | {' | '.join(STAGES)} |", f"|{'---|' * (len(STAGES) + 3)}"]
    rows = [(MODELS[str(named(name).backbone.model)], name) for name in RECIPES]
    for stand_in, name in sorted(rows, key=lambda row: (row[0].architecture, row[0].template, row[1])):
        recipe = named(name)
        planned = {stage.name for stage in plan(recipe)} if stand_in.ends else {"reward"}
        cells = ["c", "c" if stand_in.ends else ""]
        cells += [("r" if RECIPES[name] else "b") if stage in planned else "" for stage in STAGES[2:]]
        lines.append(f"| {stand_in.architecture} | {stand_in.template} | {Path(name).stem} | {' | '.join(cells)} |")
    return "\n".join(lines)
