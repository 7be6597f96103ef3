"""`python -m rung.finetune` is `rung finetune`."""

import argparse
import sys

from rung.finetune import cli

parser = argparse.ArgumentParser(prog="python -m rung.finetune", description=cli.__doc__)
cli.add_arguments(parser)
try:
    sys.exit(cli.run(parser.parse_intermixed_args()))
except (ValueError, OSError) as error:
    parser.exit(2, f"{parser.prog}: error: {error}\n")
