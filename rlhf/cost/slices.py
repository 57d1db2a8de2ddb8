"""Cost of a batch on this machine, before any weights are loaded: one and two layers of the model, random, are timed.

A transformer is embeddings, n equal layers and a head, so its weights, its seconds and what it keeps between forward and
backward are straight lines in n. Two points of each line are measured; the rest is arithmetic.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

Model: TypeAlias = PreTrainedModel | PeftModel
FLOPS_ON_CPU = 2e10  # of one timed pass of training; larger batches are timed in part and scaled
REPETITIONS = 3
SHORT, LONG = 4, 12  # tokens of two generations, whose difference is the cost of a step


@dataclass(frozen=True)
class Line:
    """A quantity measured on models with one and two layers, and so known for any depth.

    It never falls with depth, whatever a noisy clock says.

    >>> Line(10.0, 12.0).at(5), Line(10.0, 9.9).at(5)
    (18.0, 10.0)
    """

    one: float
    two: float

    def at(self, layers: int) -> float:
        """Return the value for a model of so many layers."""
        return self.one + (layers - 1) * max(0.0, self.two - self.one)


@dataclass(frozen=True)
class Shape:
    """Shape of the batch of one forward.

    Attributes:
        rows: texts that are read together.
        length: tokens of each, padding included.
        answer: how many tokens at the end of each row have logits; 0 for a scalar head.
    """

    rows: int
    length: int
    answer: int

    @property
    def has_logits(self) -> bool:
        """Tell whether a policy reads it, whose head gives logits."""
        return self.answer > 0


@dataclass(frozen=True)
class Slices:
    """A model of one layer and one of two, with random weights of the shape that a stage trains.

    Attributes:
        models: the two.
        layers: of the whole model.
        device: of both.
        autocast: whether forwards run in bfloat16 over float32 weights.
    """

    models: tuple[Model, Model]
    layers: int
    device: torch.device
    autocast: bool

    def _for_all_layers(self, measure: Callable[[Model], float]) -> float:
        """Measure both models and return the value for the whole one."""
        return Line(*(measure(model) for model in self.models)).at(self.layers)

    def weights(self, *, trainable: bool = False) -> float:
        """Return the bytes of all parameters, or of those that are trained."""
        return self._for_all_layers(
            lambda model: _bytes(p for p in model.parameters() if p.requires_grad or not trainable)
        )

    def layer_weights(self) -> float:
        """Return the bytes of all layers' frozen weights, which 4-bit quantisation makes smaller."""
        one, two = (_bytes(p for p in model.parameters() if not p.requires_grad) for model in self.models)
        return float(self.layers * (two - one))

    def saved(self, shape: Shape) -> float:
        """Return the bytes that a forward keeps for its backward, and those of its logits' gradient."""
        part, share = self._part(shape)
        saved = self._for_all_layers(lambda model: self._saved(model, part))
        if self.models[0].is_activation_checkpointing:  # one layer's are there again while it is recomputed
            plain = [copy.deepcopy(model) for model in self.models]
            for model in plain:
                model.gradient_checkpointing_disable()
            one, two = (self._saved(model, part) for model in plain)
            saved += two - one
        return saved * share

    def seconds(self, shape: Shape, *, training: bool) -> float:
        """Return the seconds of a forward, with its backward where it trains."""
        part, share = self._part(shape)

        def forward(model: Model) -> None:
            with nullcontext() if training else torch.no_grad():
                loss = self._loss(model, part)
            if training:
                loss.backward()
                model.zero_grad()

        return share * self._for_all_layers(lambda model: self._timed(lambda: forward(model)))

    def seconds_of_update(self) -> float:
        """Return the seconds of one AdamW step."""

        def measure(model: Model) -> float:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
            for p in trained:
                p.grad = torch.zeros_like(p)
            seconds = self._timed(optimizer.step)
            model.zero_grad()
            return seconds

        return self._for_all_layers(measure)

    def seconds_of_sampling(self, rows: int, prompt: int, answer: int) -> float:
        """Return the seconds of sampling an answer of full length to each of so many prompts at once."""
        part, share = self._part(Shape(rows, prompt + answer, 1), flops=3 * FLOPS_ON_CPU)  # no backward

        def measure(model: Model) -> float:
            ids = torch.randint(0, model.config.vocab_size, (part.rows, prompt), device=self.device)

            def sample(tokens: int) -> None:
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                    min_new_tokens=tokens, max_new_tokens=tokens, use_cache=True,  # a trained checkpoint may say otherwise
                )  # fmt: skip

            model.eval()
            with torch.no_grad(), self._precision():
                short, long = (self._timed(partial(sample, tokens)) for tokens in (SHORT, LONG))
            model.train()
            return short + (answer - SHORT) * max(0.0, long - short) / (LONG - SHORT)

        return share * self._for_all_layers(measure)

    def _part(self, shape: Shape, *, flops: float = FLOPS_ON_CPU) -> tuple[Shape, float]:
        """Return the shape with as many rows as a slow machine can time, and what their cost is to be multiplied with."""
        if self.device.type != "cpu":
            return shape, 1.0
        weights = sum(p.numel() for p in self.models[1].parameters())
        rows = min(shape.rows, max(1, int(flops / (6 * weights * shape.length))))
        return Shape(rows, shape.length, shape.answer), shape.rows / rows

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def _loss(self, model: Model, shape: Shape) -> Tensor:
        """Return the loss of a forward over random tokens."""
        ids = torch.randint(0, model.config.vocab_size, (shape.rows, shape.length), device=self.device)
        keep = {"logits_to_keep": shape.answer} if shape.has_logits else {}
        with self._precision():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **keep)
            if not shape.has_logits:
                return output.last_hidden_state.float().sum()
            return nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, -shape.answer :].flatten())

    def _saved(self, model: Model, shape: Shape) -> float:
        """Return the bytes of the distinct tensors that the graph keeps, parameters left out, and of the logits' gradient."""
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._loss(model, shape)
        del loss
        return sum(kept.values()) + (4.0 * shape.rows * shape.answer * model.config.vocab_size)

    def _timed(self, work: Callable[[], object]) -> float:
        """Return the median seconds of a piece of work, after a first time that is not counted."""
        work()
        seconds = []
        for _ in range(REPETITIONS):
            self._wait()
            begin = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def _wait(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def slices(
    config: PretrainedConfig,
    *,
    has_logits: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    adapter: LoraConfig | None = None,
    checkpointing: bool = False,
) -> Slices:
    """Build the two models of a configuration.

    Args:
        config: of the whole model; nothing is loaded.
        has_logits: a policy; otherwise the decoder or encoder below a scalar head.
        device, dtype: of the weights.
        autocast: forwards in bfloat16 over these weights.
        adapter: LoRA settings, where only an adapter is trained.
        checkpointing: gradient checkpointing.
    """
    text = config.get_text_config()
    models = []
    for layers in (1, 2):
        shallow = copy.deepcopy(text)
        shallow.num_hidden_layers = layers
        if getattr(shallow, "layer_types", None):
            shallow.layer_types = shallow.layer_types[:layers]
        auto = AutoModelForCausalLM if has_logits else AutoModel
        model: Model = auto.from_config(shallow, dtype=dtype).to(device)
        if adapter is not None:
            model = get_peft_model(model, _for_task(adapter, has_logits=has_logits))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        models.append(model)
    gc.collect()
    return Slices((models[0], models[1]), text.num_hidden_layers, device, autocast)


def _for_task(adapter: LoraConfig, *, has_logits: bool) -> LoraConfig:
    """Return LoRA settings for a whole model, or for the part below a head."""
    settings = copy.deepcopy(adapter)
    settings.task_type = TaskType.CAUSAL_LM if has_logits else None
    return settings


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Add up the bytes of parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)
