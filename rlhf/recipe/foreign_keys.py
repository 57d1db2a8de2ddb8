"""Keys that people bring from elsewhere: those that a recipe may not set, and those that have another name here."""

# Keys that TRL knows and a recipe may not set, each with the reason.
REFUSED_KEYS = {
    "output_dir": "the run's folder decides it (`--out`)",
    "resume_from_checkpoint": "the same command again resumes by itself",
    "seed": "set `seed` at the top level",
    "data_seed": "set `seed` at the top level",
    "hub_token": "secrets do not belong in a recipe; set HF_TOKEN in the environment",
    "push_to_hub": "upload the finished run yourself",
    "trust_remote_code": "remote code is never run",
    "model_name_or_path": "set `backbone.model`",
    "model_revision": "set `backbone.revision`",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "remove_unused_columns": "the stage decides it",
    "max_steps": "set `num_train_epochs`, or `total_episodes` for PPO",
    "auto_find_batch_size": "it would change the recipe silently",
    "load_best_model_at_end": "the last model is the result; nothing is chosen by looking",
    "lora_task_type": "the stage decides it",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the verb decides what is done"),
    **dict.fromkeys(("dataset_kwargs", "dataset_text_field"), "the stage prepares the rows itself"),
    "save_only_model": "a stage that is interrupted goes on with its optimizer, which is in its checkpoints",
    "enable_jit_checkpoint": "the first SIGTERM already saves a checkpoint and stops, and the same command goes on from it",
    "pad_token": "the tokenizer decides it; a padding token that also ends answers has scores read at another token",
    "ignore_data_skip": "a stage that is interrupted goes on with the rows that it has not seen",
}
REFUSED_SCRATCH_KEYS = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer decides it"),
    **dict.fromkeys(("is_encoder_decoder", "problem_type", "return_dict", "use_cache"), "the stages decide it"),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), "the stages decide it"),
}
# Old or foreign names and what they are called here.
RENAMED_KEYS = {
    "warmup_ratio": "warmup_steps (a value below 1 is a ratio)",
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "overwrite_output_dir": "`--out` with another folder",
    "lr": "learning_rate",
    "beta": "kl_coef",
    "num_iterations": "num_ppo_epochs",
    "epsilon": "cliprange",
    "init_kl_coef": "kl_coef",
    "response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_seq_length": "max_length",
    "vf_coef": "critic_learning_rate (policy and critic have losses and clipping of their own)",
    "num_generations": "per_device_train_batch_size (one answer a prompt)",
    "group_by_length": "per_device_train_batch_size (rows are not grouped)",
    "whiten_rewards": "normalize_reward",
    "model_name_or_path": "backbone.model",
    "dataset_name": "data.preferences, data.sft or data.prompts",
}
