"""Entry point of `python -m rung.pretrain`."""

import sys

from rung.pretrain.cli import main

sys.exit(main())
