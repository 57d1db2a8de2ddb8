"""`python -m rlhf`, `torchrun -m rlhf` and `accelerate launch -m rlhf`."""

from rlhf.cli import main

main()
