"""`python -m llava`, the same as `llava`; what torchrun starts: `torchrun --nproc-per-node 8 -m llava train RECIPE`."""

import sys

from llava.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
