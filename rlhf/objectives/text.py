"""Text regularisation of a reward model (GRM, arXiv:2406.10216): its states must go on being those of a language model."""

from torch import Tensor
from torch.nn.functional import softplus


def text_loss(logprobs_chosen: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return how unlikely the chosen answer is to the language model's own output layer, read from the reward model's states.

        l = - log σ(β log π(y_c | x))

    (arXiv:2406.10216 section 3.2, its SFT form; β = 0.1 is the paper's.) An answer that is certain: log 2. An unlikely one:
    -β log π. The gradient with respect to log π is -β σ(-β log π), so it lies between -β and -β/2.

    Args:
        logprobs_chosen: [b] log π of whole answers, nats, ≤ 0.
        beta: > 0.

    Returns:
        [b] nats, ≥ log 2, unreduced.

    >>> import torch
    >>> text_loss(torch.tensor([0.0, -100.0]))
    tensor([ 0.6931, 10.0000])
    """
    return softplus(-beta * logprobs_chosen)


def mixed(losses: Tensor, text_losses: Tensor, *, share: float) -> Tensor:
    """Return GRM's loss of each pair: (1 - α) l_pair + α l_text, [b] and [b] → [b] nats; α = 0 is the pair loss.

    >>> import torch
    >>> mixed(torch.tensor([1.0]), torch.tensor([3.0]), share=0.25)
    tensor([1.5000])
    """
    return (1 - share) * losses + share * text_losses
