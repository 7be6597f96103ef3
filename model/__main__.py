"""`python -m rung.model` is `rung evaluate`."""

import argparse
import sys

from rung.model import cli

parser = argparse.ArgumentParser(prog="python -m rung.model", description=cli.__doc__)
cli.add_arguments(parser)
sys.exit(cli.run(parser.parse_args()))
