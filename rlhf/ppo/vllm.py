"""Rollouts by vLLM, in this process or on a server, through TRL's `VLLMGeneration`: faster, and not quite the same policy."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf._trl import vllm_generation
from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError, UserError
from rlhf.models.generate import Completions, completions_of, encode_prompts, end_token_ids
from rlhf.models.merge import merged_weights, trains_tied_embeddings
from rlhf.ppo.config import PPOConfig


class VllmSampler:
    """Answers from an engine that holds a copy of the policy.

    Its kernels round otherwise than ours, so its log-probabilities come with the answers, and PPO weights every token by how
    far the two are apart (`truncated_importance`).

    Raises:
        UserError: vLLM is not installed, or the base is quantised.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        args: PPOConfig,
    ):
        if getattr(policy, "is_loaded_in_4bit", False):
            raise UserError("ppo.use_vllm: the engine wants whole weights, not 4-bit ones; leave load_in_4bit out.")
        if trains_tied_embeddings(policy):
            raise UserError(
                "ppo.use_vllm: the engine wants the adapter merged, and this one trains embeddings that input and output share, "
                "which then get each other's updates. Take lm_head and embed_tokens out of lora_target_modules"
                " and lora_modules_to_save."
            )
        self.policy, self.tokenizer, self.args = policy, tokenizer, args
        self.end_ids = end_token_ids(policy, tokenizer)
        try:
            self.engine = vllm_generation(merged_weights)(
                model=policy,
                accelerator=accelerator,
                processing_class=tokenizer,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                temperature=args.temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_completion_length=args.max_completion_length,
                logprobs=0,
                # The engine's own are those of the folder that it loaded, the base's where the policy is an adapter.
                generation_kwargs={"stop_token_ids": self.end_ids},
            )
        except ImportError as error:
            raise UserError(f"ppo.use_vllm: {error} (how to install it: recipes/guides/ppo.md)") from error
        self.version: int | None = None

    def __call__(self, prompts: Sequence[Prompt], *, version: int, max_prompt_length: int | None) -> Completions:
        """Sample one answer to each prompt.

        Args:
            version: of the policy's weights; where it is another than at the last call, the engine gets them first.
            max_prompt_length: longer prompts lose their beginning.

        Raises:
            TrainingError: an answer without any token, or without log-probabilities.
        """
        # 1. The engine's copy of the policy.
        if version != self.version:
            self.engine.sync_weights()
            self.version = version

        # 2. Its answers, and the log-probability it gave to every token.
        rows = encode_prompts(self.tokenizer, prompts, max_prompt_length=max_prompt_length)
        _, answers, logprobs, _ = self.engine.generate(rows, None, 1)
        if len(answers) != len(rows) or any(len(answer) == 0 for answer in answers):
            raise TrainingError(
                f"vLLM returned {len(answers)} answers to {len(rows)} prompts, or an empty one; nothing was updated."
            )
        if logprobs is None or [len(row) for row in logprobs] != [len(answer) for answer in answers]:
            raise TrainingError("vLLM returned answers without the log-probability of each token; nothing was updated.")

        # 3. As tensors.
        device, conversational = self.policy.device, not isinstance(prompts[0], str)
        completions = completions_of(
            self.tokenizer, rows, answers, end_ids=self.end_ids, conversational=conversational, device=device
        )
        # An answer that went on behind its end is cut there, and so are its log-probabilities.
        lengths = completions.response_mask.sum(dim=1).tolist()
        sampled = [torch.tensor([x[0] for x in row[:n]]) for row, n in zip(logprobs, lengths, strict=True)]
        completions.logprobs_sampler = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True).float().to(device)
        return completions
