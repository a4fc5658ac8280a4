"""``python -m robust_peft.cli``, for ``accelerate launch -m`` and ``torchrun -m``."""

import sys

from robust_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
