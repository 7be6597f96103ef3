import argparse
import sys

from rung.data import cli

parser = argparse.ArgumentParser(prog="python -m rung.data", description=cli.__doc__)
cli.add_arguments(parser)
try:
    sys.exit(cli.run(parser.parse_args()))
except (ValueError, OSError) as error:
    parser.exit(2, f"{parser.prog}: error: {error}\n")
except KeyboardInterrupt:
    parser.exit(130, f"{parser.prog}: interrupted\n")
