"""Models on this machine that are looked at before anything is made of them: names, shapes and values, none of it kept."""

import json
from pathlib import Path

from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models.gguf import gguf_file
from rlhf.models.load import encoder_type, find_source
from rlhf.models.open import ADAPTER_CONFIG, check_finite, one_sentence, open_network, put_adapter


def check_model(name: str | Path, *, scores: bool = False) -> None:
    """Refuse a local checkpoint or adapter that could not be loaded, or whose weights are no numbers, by reading its files once.

    Names and shapes are compared with a network without data. What lies on a hub, is a GGUF file or is quantised already is
    looked at when it is loaded.

    Args:
        scores: whether a checkpoint is loaded as a reward model, as encoders are always; an adapter says itself what it is.

    Raises:
        UserError: as `open_network`, `put_adapter` and `Source.check` say.
    """
    source = find_source(name)
    folder = Path(source.base)
    if not folder.is_dir() or gguf_file(source.base) is not None:
        return
    if "quantization_config" in _values(folder / "config.json"):
        return
    if source.adapter is not None:
        scores = _values(Path(source.adapter) / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    scores = scores or encoder_type(source.base) is not None
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    arguments: dict[str, object] = {"device_map": "meta", **({"num_labels": 1} if scores else {})}
    model, _ = open_network(kind, source.base, arguments, new_head=scores)
    _check_values(folder)
    source.check()
    if source.adapter is not None:
        put_adapter(model, source.adapter)


def _values(file: Path) -> dict[str, object]:
    """Return what a file of JSON holds; nothing where there is none, or no mapping, which whoever loads the model says."""
    with one_sentence(file.parent):
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values if isinstance(values, dict) else {}


def _check_values(folder: Path) -> None:
    """Refuse weights that are no numbers; one tensor is held at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with one_sentence(folder), safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                check_finite(folder, {name: tensors.get_tensor(name)})
