"""A checkpoint of PPO between two rollouts: what it holds beside the Trainer's own files."""

from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.models.save import load_weights
from rlhf.models.sharding import is_sharded, weights_of
from rlhf.ppo.backbone import restore_role, save_role
from rlhf.ppo.reporting import take_cuts_back
from rlhf.ppo.roles import POLICY_ADAPTER, AdapterHead
from rlhf.ppo.rollout import Sample
from rlhf.ppo.state import PPOState

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

# The weights of a reference that moves, and the latest answers, for a run that ends right after a resume.
REFERENCE, SAMPLES, CRITIC = "reference.safetensors", "latest_samples.jsonl", "critic"


def write_checkpoint(trainer: "PPOTrainer", folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the policy at the root as an ordinary model, the critic under `critic/`, counters in `ppo_state.json`.

    Args:
        weights: of policy and critic by their names in the trainer's model, where that holds only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    container = trainer.accelerator.unwrap_model(trainer.model)
    selected = {"selected_adapters": [POLICY_ADAPTER]} if isinstance(container.policy, PeftModel) else {}

    def of(role: str) -> dict[str, dict[str, Tensor]]:
        return {} if weights is None else {"state_dict": weights_of(container, weights, role)}

    container.policy.save_pretrained(folder, **selected, **of("policy"))
    if isinstance(container.critic, AdapterHead):
        save_role(container.critic, folder / CRITIC, weights)
    else:
        container.critic.save_pretrained(folder / CRITIC, **of("critic"))
    if trainer.args.reference_mixup > 0:
        save_file({n: w.detach().cpu().clone() for n, w in trainer.reference.weights().items()}, folder / REFERENCE)
    write_jsonl(folder / SAMPLES, [sample.as_row() for sample in trainer.latest_samples])
    trainer.processing_class.save_pretrained(folder)
    trainer.progress.save(folder)


def read_checkpoint(trainer: "PPOTrainer", folder: Path, model: nn.Module) -> None:
    """Put everything back that `write_checkpoint` wrote; of sharded roles all but the weights, which the Trainer reads.

    Raises:
        UserError: a rollout had another number of optimizer steps, so that the checkpoint would lie in the middle of one.
    """
    progress, steps = PPOState.load(folder), trainer.args.steps_per_rollout
    if progress.steps_per_rollout not in (0, steps):
        raise UserError(
            f"ppo: {folder} is of a run with {progress.steps_per_rollout} optimizer steps a rollout, where num_ppo_epochs and "
            f"num_mini_batches now make {steps}; set them as they were, or begin anew."
        )
    container = trainer.accelerator.unwrap_model(model)
    if not is_sharded(container):
        load_weights(container.policy, folder)
        if isinstance(container.critic, AdapterHead):
            restore_role(container.critic, folder / CRITIC)
        else:
            load_weights(container.critic, folder / CRITIC)
    if trainer.args.reference_mixup > 0:
        saved = load_file(folder / REFERENCE)
        for name, weight in trainer.reference.weights().items():
            weight.data.copy_(saved[name])
    trainer.latest_samples = [Sample(**row) for row in read_jsonl(folder / SAMPLES)]
    trainer.progress = progress
    take_cuts_back(trainer)
    if trainer.args.kl_target is None:  # nothing but the setting moves it
        trainer.progress.kl_coef = trainer.args.kl_coef
    if trainer.progress.stop_rules != trainer.args.stop_rules:
        trainer.progress.stopped = None
