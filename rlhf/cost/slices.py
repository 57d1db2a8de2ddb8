"""Cost of a batch on this machine, before any weights are loaded: one and two layers of the model, random, are timed.

A transformer is embeddings, n equal layers and a head, so its weights, its seconds and what it keeps between forward and
backward are straight lines in n. Two points of each line are measured; the rest is arithmetic.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlhf._trl import add_fused_lm_head
from rlhf.cost.live import LiveBytes, storages

Model: TypeAlias = PreTrainedModel | PeftModel
FLOPS_ON_CPU = 1e11  # of one timed pass, a second at most; larger batches are timed in part and scaled
LEAST, MOST, ENOUGH = 5, 25, 2.0  # repetitions of what is timed: as many as there is time for, in seconds
SHORT, LONG = 4, 12  # tokens of two generations of one layer, whose difference is the cost of a step
FUSED = ("log_probs", "entropy", "is_top1")  # what TRL's SFT asks of its head
clock = time.perf_counter


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
        fused_head: whether the loss is TRL's of SFT, which makes of logits what it needs without handing them out.
    """

    models: tuple[Model, Model]
    layers: int
    device: torch.device
    autocast: bool
    fused_head: bool = False

    def _for_all_layers(self, measure: Callable[[Model], float]) -> float:
        """Measure both models and return the value for the whole one."""
        return Line(*(measure(model) for model in self.models)).at(self.layers)

    def weights(self, *, trainable: bool = False) -> float:
        """Return the bytes of all parameters, or of those that are trained."""
        return self._for_all_layers(
            lambda model: _bytes(p for p in model.parameters() if p.requires_grad or not trainable)
        )

    def layer(self, *, trainable: bool = False) -> float:
        """Return the bytes of one layer's weights, or of those of them that are trained."""
        one, two = (_bytes(p for p in model.parameters() if p.requires_grad or not trainable) for model in self.models)
        return float(two - one)

    def peak(self, shape: Shape, *, training: bool) -> float:
        """Return the bytes of the tensors that live at once, at most, in a forward, with its backward where it trains.

        Parameters are left out, and so are their gradients, which are counted beside them.
        """
        part, share = self._part(shape, training=training)
        if training:
            return share * self._for_all_layers(lambda model: self._peak(model, part, training=True))
        return share * max(self._peak(model, part, training=False) for model in self.models)  # nothing of a layer stays

    def seconds(self, shape: Shape, *, training: bool) -> float:
        """Return the seconds of a forward, with its backward where it trains."""
        part, share = self._part(shape, training=training)

        def forward(model: Model, *, head: bool = True) -> None:
            with nullcontext() if training else torch.no_grad():
                loss = self._loss(model, part) if head else self._sum(model, part)
            if training:
                loss.backward()
                model.zero_grad()

        return share * self._timed(forward, partial(forward, head=False))

    def seconds_of_update(self) -> float:
        """Return the seconds of one AdamW step, of the norm of its gradient before that, and of clipping."""
        trained = {id(model): [p for p in model.parameters() if p.requires_grad] for model in self.models}
        optimizers = {name: torch.optim.AdamW(weights, lr=0.0, fused=True) for name, weights in trained.items()}
        for p in (p for weights in trained.values() for p in weights):
            p.grad = torch.zeros_like(p)

        def update(model: Model) -> None:
            weights = trained[id(model)]
            nn.utils.clip_grad_norm_(weights, 1.0)
            nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
            optimizers[id(model)].step()

        seconds = self._timed(update)
        for model in self.models:
            model.zero_grad()
        return seconds

    @torch.no_grad()
    def seconds_of_sampling(self, rows: int, prompt: int, stretches: Sequence[tuple[float, float]]) -> float:
        """Return the seconds of sampling an answer to each of so many prompts at once.

        All is timed without autocast, as `rlhf.models.generate` samples.

        Args:
            rows: prompts.
            prompt: tokens of each, padding included.
            stretches: tokens that are written one after the other, and by how many rows at once.
        """
        for model in self.models:
            model.eval()
        # With fewer rows a token costs less, but not in proportion: a straight line through two numbers of rows.
        part, share = self._part(Shape(rows, prompt, 1), training=False)
        longest = max(1, int(sum(tokens for tokens, _ in stretches)))
        token, slope, few = self._step(rows, prompt, longest), 0.0, max(1, rows // 4)
        if few < rows and any(at_work < rows for _, at_work in stretches):
            slope = max(0.0, token - self._step(few, prompt, longest)) / (rows - few)
        written = sum(tokens * max(0.0, token - slope * (rows - at_work)) for tokens, at_work in stretches)
        reading = self._timed(partial(self._read, prompts=part), partial(self._read, prompts=part, head=False))
        for model in self.models:
            model.train()
        return share * reading + written

    def _read(self, model: Model, prompts: Shape, *, head: bool = True) -> None:
        """Read prompts as before the first token, with logits at the last place; without a head, none."""
        reader, keep = (model, {"logits_to_keep": 1}) if head else (_decoder(model), {})
        ids = self._random_ids(prompts.rows, prompts.length)
        reader(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **keep)

    def _step(self, rows: int, prompt: int, longest: int) -> float:
        """Return the seconds of writing one token after each of so many prompts.

        Args:
            longest: tokens of an answer; the model may have no place for more.
        """
        ids = self._random_ids(rows, 1)
        short, long = (self._median(partial(self._generate, ids, tokens)) for tokens in (SHORT, LONG))
        one = max(0.0, long - short) / (LONG - SHORT)
        of_one, of_two = (self._next_token(model, ids, prompt) for model in self.models)
        return Line(one, one + self._layer(of_one, of_two, min(MOST, longest))).at(self.layers)

    def _generate(self, ids: Tensor, tokens: int) -> None:
        """Sample so many tokens after each prompt with the model of one layer."""
        self.models[0].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
            min_new_tokens=tokens, max_new_tokens=tokens, use_cache=True,  # a trained checkpoint may say otherwise
        )  # fmt: skip

    def _next_token(self, model: Model, ids: Tensor, prompt: int) -> Callable[[], object]:
        """Return what reads one more token of each row without a head, behind a prompt that was read before.

        Args:
            ids: [rows, 1].
            prompt: its tokens.
        """
        decoder = _decoder(model)
        read = decoder(input_ids=ids[:1].expand(1, max(1, prompt - 1)), use_cache=True)
        cache = getattr(read, "past_key_values", None)
        if cache is None:  # a model that keeps its state elsewhere; a step costs it the same after any prompt
            return partial(decoder, input_ids=ids)
        cache.reorder_cache(ids.new_zeros(len(ids)))  # the one row in all places: cheaper than to read them all
        return partial(decoder, input_ids=ids, past_key_values=cache, use_cache=True)

    def _part(self, shape: Shape, *, training: bool) -> tuple[Shape, float]:
        """Return the shape with as many rows as a slow machine can time, and what their cost is to be multiplied with."""
        if self.device.type != "cpu":
            return shape, 1.0
        one, two = (sum(p.numel() for p in model.parameters()) for model in self.models)
        # The first layer's model holds the embeddings too, which are looked up and cost nothing, and the head.
        layer, head = two - one, _size(self.models[0].get_output_embeddings()) if shape.has_logits else 0
        operations = (6 if training else 2) * (2 * layer * shape.length + head * shape.answer)
        rows = min(shape.rows, max(1, int(FLOPS_ON_CPU / max(1, operations))))
        return Shape(rows, shape.length, shape.answer), shape.rows / rows

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def _loss(self, model: Model, shape: Shape) -> Tensor:
        """Return the loss of a forward over random tokens."""
        ids = self._random_ids(shape.rows, shape.length)
        keep = {"logits_to_keep": shape.answer} if shape.has_logits else {}
        with self._precision():
            if self.fused_head:
                return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).loss
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **keep)
            if not shape.has_logits:
                return output.last_hidden_state.float().sum()
            return nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, -shape.answer :].flatten())

    def _sum(self, model: Model, shape: Shape) -> Tensor:
        """Return something to differentiate of a forward over random tokens without a head."""
        ids = self._random_ids(shape.rows, shape.length)
        with self._precision():
            hidden: Tensor = _decoder(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return hidden.float().sum()

    def _random_ids(self, rows: int, length: int) -> Tensor:
        """Return token ids [rows, length]."""
        return torch.randint(0, self.models[0].config.vocab_size, (rows, length), device=self.device)

    def _peak(self, model: Model, shape: Shape, *, training: bool) -> float:
        """Return the bytes that live at once in a forward of one model, with its backward where it trains."""
        handles = [
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for p in model.parameters()
            if p.requires_grad
        ]
        with LiveBytes(storages(model.parameters())) as live, nullcontext() if training else torch.no_grad():
            loss = self._loss(model, shape)
            if training:
                loss.backward()
        for handle in handles:
            handle.remove()
        return float(live.peak)

    def _timed(self, work: Callable[[Model], object], layers: Callable[[Model], object] | None = None) -> float:
        """Return the seconds of a piece of work on the whole model.

        A head takes longer than a layer, and its noise, times the depth, would be all that the difference of two models shows.
        So it is timed with one layer, and what a layer adds without it.

        Args:
            work: on a model.
            layers: the same without what is there once at any depth; None where there is nothing of that kind.
        """
        one = self._median(partial(work, self.models[0]))
        of_one, of_two = (partial(layers or work, model) for model in self.models)
        return Line(one, one + self._layer(of_one, of_two)).at(self.layers)

    def _layer(self, one: Callable[[], object], two: Callable[[], object], most: int = MOST) -> float:
        """Return the seconds that a layer adds, of the same work through one layer and through two.

        They take turns, so that a busy moment of the machine comes into both.
        """

        def difference() -> float:
            before = self._clocked(one)
            return self._clocked(two) - before

        return _median(difference, most)

    def _median(self, work: Callable[[], object]) -> float:
        """Return the median of the seconds of some repetitions."""
        return _median(partial(self._clocked, work))

    def _clocked(self, work: Callable[[], object]) -> float:
        """Return the seconds of a piece of work."""
        self._wait()
        begin = clock()
        work()
        self._wait()
        return clock() - begin

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
    fused_head: bool = False,
) -> Slices:
    """Build the two models of a configuration.

    Args:
        config: of the whole model; nothing is loaded.
        has_logits: a policy; otherwise the decoder or encoder below a scalar head.
        device, dtype: of the weights.
        autocast: forwards in bfloat16 over these weights.
        adapter: LoRA settings, where only an adapter is trained.
        checkpointing: gradient checkpointing.
        fused_head: the loss of TRL's SFT.
    """
    text = config.get_text_config()
    models = []
    for layers in (1, 2):
        shallow = copy.deepcopy(text)
        shallow.num_hidden_layers = layers
        shallow.use_cache = False  # sampling asks for one
        if vars(shallow).get("layer_types"):  # of some models it is a property, which follows from the depth
            shallow.layer_types = shallow.layer_types[:layers]
        auto = AutoModelForCausalLM if has_logits else AutoModel
        model: Model = auto.from_config(shallow, dtype=dtype).to(device)
        if fused_head:
            add_fused_lm_head(model, outputs=FUSED)
        if adapter is not None:
            model = get_peft_model(model, _for_task(adapter, has_logits=has_logits))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        models.append(model)
    gc.collect()
    return Slices((models[0], models[1]), text.num_hidden_layers, device, autocast, fused_head)


def _median(measure: Callable[[], float], most: int = MOST) -> float:
    """Return the median of some measurements, as many as there is time for; the first, which warms up, is not counted."""
    measure()
    values: list[float] = []
    begin = clock()
    while len(values) < most and (len(values) < LEAST or clock() - begin < ENOUGH):
        values.append(measure())
    return statistics.median(values)


def _decoder(model: Model) -> nn.Module:
    """Return a model without its head; adapters are in its layers."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder: nn.Module = whole.get_decoder() if whole.get_output_embeddings() is not None else whole
    return decoder


def _for_task(adapter: LoraConfig, *, has_logits: bool) -> LoraConfig:
    """Return LoRA settings for a whole model, or for the part below a head."""
    settings = copy.deepcopy(adapter)
    settings.task_type = TaskType.CAUSAL_LM if has_logits else None
    return settings


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Add up the bytes of parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def _size(module: nn.Module | None) -> int:
    """Count the parameters of a module; 0 where there is none."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())
