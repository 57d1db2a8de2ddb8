"""Models as each stage loads them: full or LoRA, 4-bit or not, from a checkpoint or from an adapter."""

import copy
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf.errors import UserError
from rlhf.models.adapters import INSIDE, adapter_places, of_backbone, refuse_learnt_prompt
from rlhf.models.four_bit import keep_gradients
from rlhf.models.merge import merge_adapter
from rlhf.models.open import (
    ADAPTER_CONFIG,
    adapter_weights,
    expand,
    one_sentence,
    open_config,
    open_network,
    open_tokenizer,
    put_adapter,
)
from rlhf.models.save import check_base
from rlhf.models.scalar_head import restore_exact, saved_head, score_head, start_near_zero
from rlhf.models.templates import check_template
from rlhf.models.text import adopt_encoder_tokens, check_tokenizer, freeze_template, give_plain_template

REWARD_LABEL = "reward"


@dataclass
class Source:
    """Where weights come from.

    Attributes:
        base: a hub id or folder.
        adapter: the folder of a LoRA adapter on it, if any.
        revision: of the base, as the adapter names it.
    """

    base: str
    adapter: str | None = None
    revision: str | None = None

    def check(self) -> None:
        """Refuse an adapter that was trained on another base than the one that is there now; the base must be loaded first.

        Raises:
            UserError: the base's fingerprint is not the one beside the adapter.
        """
        if self.adapter is not None:
            check_base(self.adapter, self.base, self.revision)


def find_source(path: str | Path) -> Source:
    """Tell a full checkpoint from an adapter folder.

    A folder in an adapter's configuration that lies in a run is looked for in the run that holds the adapter first, so that
    a run can be moved and copied; a relative one from the working directory, then from the adapter's folder and those above
    it, so that a run can be used from anywhere.

    Raises:
        UserError: an adapter that does not say what it is for, or whose base is not there.
    """
    path = expand(path)
    config = Path(path) / ADAPTER_CONFIG
    if not config.is_file():
        return Source(base=path)
    with one_sentence(path):
        values = json.loads(config.read_text(encoding="utf-8"))
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{config}: base_model_name_or_path is empty, so nobody can tell which model this adapter is for."
        )
    return Source(base=_base_folder(base, config), adapter=path, revision=values.get("revision"))


def _base_folder(base: str, config: Path) -> str:
    """Return the folder of an adapter's base, or its hub id as it is."""
    above = Path(os.path.abspath(config)).parents
    if in_run := re.search(r"round-\d+/[^/]+/.+$", base):
        for folder in above:
            if (folder / in_run[0] / "config.json").is_file():
                return str(folder / in_run[0])
    expanded = Path(expand(base))
    if expanded.is_dir():
        if (expanded / ADAPTER_CONFIG).is_file() and not (expanded / "config.json").is_file():
            raise UserError(f"{config}: its base model {base} is an adapter itself; merge that into its base first.")
        return str(expanded)
    if not expanded.is_absolute():
        for folder in above:
            if (folder / expanded / "config.json").is_file():
                return str(folder / expanded)
        if base.count("/") < 2 and not base.startswith("."):
            return base  # a hub id
    raise UserError(
        f"{config}: its base model {base} is not there any more; put it back (a link will do). Outside a run its new place may "
        "also be written into base_model_name_or_path."
    )


def load_tokenizer(
    path: str | Path, *, conversational: bool, revision: str | None = None, pads: bool = True
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, padding on the right (generation pads on the left by itself), and check it.

    Args:
        conversational: whether the data are conversations, which need a chat template.
        pads: whether it needs a padding token of its own; scoring does not.

    Raises:
        UserError: as `open_tokenizer`, `check_tokenizer` and `freeze_template` say.
    """
    with one_sentence(path):
        tokenizer = open_tokenizer(path, revision)
        check_template(tokenizer, name=str(path))
        adopt_encoder_tokens(tokenizer)
        freeze_template(tokenizer, name=str(path))
    if conversational and tokenizer.eos_token is not None and give_plain_template(tokenizer):
        warnings.warn(f"{path}: no chat template; conversations are written as 'Human: … Assistant: …'.", stacklevel=2)
    check_tokenizer(tokenizer, conversational=conversational, name=str(path), pads=pads)
    return tokenizer


def model_settings(settings: Mapping[str, object]) -> ModelConfig:
    """Build TRL's `ModelConfig` from its flat keys; 4-bit weights compute in `dtype`, so that must be a 16-bit one."""
    config = ModelConfig(**settings)
    if config.load_in_4bit and config.dtype in (None, "auto", "float32"):
        config.dtype = "bfloat16"
    return config


def _loading_arguments(
    config: ModelConfig, quantization: BitsAndBytesConfig | None, source: Source
) -> dict[str, object]:
    """Return what `from_pretrained` takes beside the base."""
    dtype = config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype)
    arguments: dict[str, object] = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    revision = config.model_revision if source.adapter is None else source.revision  # an adapter knows its base's
    if revision not in (None, "main"):
        arguments["revision"] = revision
    if quantization is not None:
        # Without a place, transformers spreads 4-bit models over all devices, which data-parallel training can't use.
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        arguments |= {"quantization_config": quantization, "device_map": {"": device}}
    return arguments


def load_policy(path: str | Path, config: ModelConfig, *, trainable: bool = True) -> PreTrainedModel | PeftModel:
    """Load a causal model with the adapters that its folder and the settings ask for.

    | path        | use_peft | result                                                               |
    |-------------|----------|----------------------------------------------------------------------|
    | checkpoint  | no       | the model                                                            |
    | checkpoint  | yes      | the model with a fresh adapter                                       |
    | adapter     | yes      | its base with that adapter, trainable (rank and targets are its own) |
    | adapter     | no       | its base with the adapter merged in                                  |
    """
    source = find_source(path)
    quantization = get_quantization_config(config)
    model, _ = open_network(AutoModelForCausalLM, source.base, _loading_arguments(config, quantization, source))
    source.check()
    if quantization is not None:
        model = _prepare_for_4_bit(model)
    if source.adapter is not None:
        if trainable and not config.use_peft:
            refuse_learnt_prompt(str(source.adapter))
        model = put_adapter(model, source.adapter, trainable=trainable and config.use_peft)
        if trainable and not config.use_peft:
            return merge_adapter(model, trainable=True)
        return model
    if config.use_peft and trainable:
        return get_peft_model(model, adapter_settings(config))
    return model


def build_reward_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    pad_token_id: int,
    labels: Sequence[str] = (REWARD_LABEL,),
) -> PreTrainedModel | PeftModel:
    """Build a model with a scalar head on the weights of an SFT checkpoint or adapter.

    The head is new: N(0, 1/(d+1)), so that first scores have about unit scale, or near 0 with LoRA (`start_near_zero`); an
    encoder's that its checkpoint holds stays. With LoRA the task type is SEQ_CLS and the head is trained and saved with the
    adapter (any other task type leaves it random, silently). An SFT adapter becomes the start of the reward adapter; without
    LoRA it is merged in. `problem_type="regression"` keeps other libraries from putting a sigmoid on the score.

    Args:
        path: a checkpoint, or an adapter's folder.
        config: dtype, LoRA and quantisation; None is a full model in float32.
        pad_token_id: that of its tokenizer; the score is read at the last token that is not padding.
        labels: what the head gives a number for; several are made into one score before the model is saved
            (`rlhf.models.heads`).
    """
    config = model_settings({}) if config is None else config
    source = find_source(path)
    quantization = get_quantization_config(config)
    arguments = {**_loading_arguments(config, quantization, source), "num_labels": len(labels)}
    model, missing = open_network(AutoModelForSequenceClassification, source.base, arguments, new_head=True)
    source.check()
    is_new = score_head(model) is not None or "classifier" in _new_modules(missing)
    _start_head(model, pad_token_id, labels, near_zero=config.use_peft and is_new)
    if quantization is not None:
        model = _prepare_for_4_bit(model)
    if source.adapter is not None:
        refuse_learnt_prompt(str(source.adapter))
        if not any(name.startswith(f"{INSIDE}{model.base_model_prefix}.") for name in adapter_weights(source.adapter)):
            if config.use_peft:
                raise UserError(
                    f"{path}: this adapter trains the output layer alone, which a reward model has not, so there is nothing for "
                    "its adapter to start from. Name layers below it in sft.lora_target_modules, or set reward.use_peft: false."
                )
            return model
        adapter = LoraConfig.from_pretrained(source.adapter)
        names = [name for name, _ in model.named_modules()]
        whole = [module for module in adapter.modules_to_save or [] if any(name.endswith(module) for name in names)]
        adapter.modules_to_save = sorted({"score", *whole})  # without an output layer, which a reward model has not
        adapter.task_type, adapter.inference_mode = TaskType.SEQ_CLS, False
        model = get_peft_model(model, adapter)
        copy_adapter(source.adapter, model)
        return model if config.use_peft else merge_adapter(model, trainable=True)
    if config.use_peft:
        adapter = adapter_settings(config)
        adapter.task_type = TaskType.SEQ_CLS
        adapter.modules_to_save = sorted({*_new_modules(missing), *(adapter.modules_to_save or [])})
        return get_peft_model(model, adapter)
    return model


def _start_head(
    model: PreTrainedModel, pad_token_id: int, labels: Sequence[str] = (REWARD_LABEL,), *, near_zero: bool = False
) -> None:
    """Draw a new head, and write into the configuration what a reward model's says."""
    if near_zero:
        start_near_zero(model)
    elif (head := score_head(model)) is not None:
        torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    model.config.problem_type = "regression"
    model.config.get_text_config().pad_token_id = pad_token_id
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}


def reward_model_on(policy: PreTrainedModel | PeftModel, *, pad_token_id: int) -> PreTrainedModel | None:
    """Return a model with a new scalar head on a causal model's own layers, which are neither copied nor read again.

    Returns:
        what `build_reward_model` gives for the same checkpoint without LoRA; None for an adapter, 4-bit weights, and
        architectures whose scoring class has other layers or no linear head.
    """
    if isinstance(policy, PeftModel) or getattr(policy, "is_quantized", False):
        return None
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    prefix, head = policy.base_model_prefix, score_head(model)
    layers = getattr(policy, prefix, None)
    if head is None or type(getattr(model, prefix, None)) is not type(layers):
        return None
    setattr(model, prefix, layers)
    place = {"dtype": policy.dtype, "device": policy.device}
    model.score = torch.nn.Linear(head.in_features, 1, bias=False, **place)
    _start_head(model, pad_token_id)
    return model.eval()


def adapter_settings(config: ModelConfig) -> LoraConfig:
    """Return TRL's LoRA settings, with the revision of the base that they are for; `use_peft` must be on."""
    adapter: LoraConfig = get_peft_config(config)
    if isinstance(adapter.target_modules, str) and adapter.target_modules.isidentifier():
        adapter.target_modules = {adapter.target_modules}  # TRL made a text of a list of one, which names whole paths
    adapter.revision = None if config.model_revision in (None, "main") else config.model_revision
    return adapter


def _prepare_for_4_bit(model: PreTrainedModel) -> PreTrainedModel:
    """Put norms and heads in float32, also where nothing is trained: the same numbers everywhere."""
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    keep_gradients(model)
    return model


def computed_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the type that a model multiplies its matrices in: that of its weights, or what its 4-bit weights are read as.

    Around 4-bit weights, norms and heads are float32, which says nothing about how exact the scores are.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            return module.compute_dtype or torch.bfloat16
    assert isinstance(model.dtype, torch.dtype), "models of transformers and PEFT have one"
    return model.dtype


def _new_modules(parameters: Iterable[str]) -> set[str]:
    """Return the modules that hold these parameters, which were not in the checkpoint and start random.

    With LoRA they must be trained and saved as a whole.
    """
    paths = {name.rpartition(".")[0] for name in parameters}
    return {first if (first := path.split(".")[0]) in ("score", "classifier") else path for path in paths}


def encoder_type(model: str | Path, revision: str | None = None) -> str | None:
    """Return the type of an encoder, which reads in both directions and can score answers but not write them; else None.

    Args:
        model: a checkpoint's or adapter's folder, or a hub id.
    """
    kind: str = open_config(find_source(model).base, revision).model_type
    return kind if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES else None


def copy_adapter(folder: str, model: PeftModel) -> None:
    """Copy what a causal adapter trained into the same places of another model's adapter: LoRA factors, DoRA's magnitudes, and
    whole modules, such as embeddings. What it trained of the output layer has no place there and is left out.

    Raises:
        UserError: the two do not have the same places and ranks; the adapter trained the base's biases.
    """
    trained = {name: tensor for name, tensor in adapter_weights(folder).items() if of_backbone(name, model)}
    biases = sorted(name for name in trained if name.endswith(".base_layer.bias"))
    if biases:
        raise UserError(
            f"{folder}: this adapter trained biases of its base ({len(biases)}, such as {biases[0]}), which a reward model can't "
            "start from; merge it into its base first (`rlhf export`), or train SFT without `bias`."
        )
    weights = {name: tensor for name, tensor in trained.items() if ".base_layer." not in name}
    places = {name: place for name, place in adapter_places(model).items() if of_backbone(name, model)}
    misfits = sorted(
        name
        for name in {*weights, *places}
        if name not in weights or name not in places or weights[name].shape != places[name].shape
    )
    if misfits:
        raise UserError(f"{folder}: this adapter does not fit the reward model, first at {misfits[0]}.")
    for name, place in places.items():
        place.data.copy_(weights[name])


def load_scorer(path: str | Path, *, load_in_4bit: bool = False, labels: int = 1) -> PreTrainedModel | PeftModel:
    """Load a trained reward model of so many labels as it was saved, in evaluation mode and without gradients.

    Raises:
        UserError: another number of labels, an adapter without a trained head, a checkpoint without one.
    """
    source = find_source(path)
    config = model_settings({"use_peft": True, "load_in_4bit": True} if load_in_4bit else {"dtype": "auto"})
    arguments = _loading_arguments(config, get_quantization_config(config), source)
    if source.adapter is not None:
        arguments["num_labels"] = labels
        base, missing = open_network(AutoModelForSequenceClassification, source.base, arguments, new_head=True)
        source.check()
        saved = adapter_weights(source.adapter)
        untrained = sorted(name for name in missing if f"base_model.model.{name}" not in saved)
        if untrained:
            raise UserError(
                f"{path}: the adapter holds no trained {', '.join(untrained)}, so its rewards would be random; train it with "
                "task_type SEQ_CLS."
            )
        if load_in_4bit:
            base = _prepare_for_4_bit(base)
        base.config.problem_type = "regression"
        model = put_adapter(base, source.adapter)
        restore_exact(model, saved)
        model.config.get_text_config().pad_token_id = open_tokenizer(path).pad_token_id
    else:
        wanted = "one label" if labels == 1 else f"{labels} labels here"
        if (there_are := open_config(source.base).num_labels) != labels:
            raise UserError(f"{path}: a reward model has {wanted}, this one has {there_are}.")
        model, missing = open_network(AutoModelForSequenceClassification, source.base, arguments, new_head=True)
        if missing:
            raise UserError(f"{path}: no trained weights for {sorted(missing)}; this is not a trained reward model.")
        restore_exact(model, saved_head(Path(source.base)))
    return model.eval().requires_grad_(False)
