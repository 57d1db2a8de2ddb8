"""`rlhf`, `python -m rlhf`, `torchrun -m rlhf` and `accelerate launch -m rlhf`."""

import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported, half a second, ends it as quietly as later."""
    try:
        from rlhf.cli import main as run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
