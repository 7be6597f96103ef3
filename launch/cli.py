"""The `rung` command: one thin row per verb; a verb's package is imported only when it is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

# verb -> (module with add_arguments(parser) and run(args) -> exit status, one line for `rung --help`)
VERBS = {
    "data": ("rung.data.cli", "build, inspect, verify and generate datasets"),
    "pretrain": ("rung.pretrain.cli", "train one potential on many fidelities (joint or Reptile)"),
    "check": ("rung.launch.check", "pre-flight: verify every rank and machine of a run before it starts"),
    "finetune": ("rung.finetune.cli", "adapt a checkpoint to a small set of energies at a new fidelity"),
    "evaluate": ("rung.model.cli", "print the error table of a checkpoint on structures or relative energies"),
    "publish": ("rung.model.publish", "make a checkpoint that others load by name; check it, upload it"),
    "relax": ("rung.model.engines.relax", "relax a structure"),
    "md": ("rung.model.engines.md", "molecular dynamics of a structure"),
    "ipi": ("rung.model.engines.ipi", "serve forces to an i-PI server"),
    "lammps": ("rung.model.engines.lammps_script", "run a LAMMPS script with a checkpoint's forces"),
    "export": ("rung.model.export", "write a checkpoint for another program: lammps"),
    "plan": ("rung.launch.plan", "predict memory, step time, communication and cost on a cluster"),
    "quickstart": ("rung.launch.quickstart", "pretrain, fine-tune and compare on the built-in data"),
}
EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_INTERRUPTED = 130  # the shell's convention: 128 + SIGINT


def run_module(module_name: str, prog: str, argv: Sequence[str]) -> int:
    """Parse `argv` with the module's arguments and run it; bad input becomes one line on stderr and exit status 2."""
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(prog=prog, description=module.__doc__)
        module.add_arguments(parser)
        return int(module.run(parse(parser, argv)))
    except BrokenPipeError:  # `rung ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor shall the exit complain
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError) as error:  # an OSError names the file, the host or the process and says what is wrong
        print(f"{prog}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`, options between key=value words included, which argparse allows only without sub-commands."""
    try:
        return parser.parse_intermixed_args(argv)
    except TypeError:
        return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `rung` command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="rung",
        description="Pretrain, fine-tune and use interatomic potentials over many levels of theory.",
        epilog="verbs:\n" + "\n".join(f"  {verb:<12}{text}" for verb, (_, text) in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rung {version('rung')}")
    parser.add_argument(
        "verb", choices=VERBS, metavar="verb", help="one of the verbs below; `rung VERB --help` tells more"
    )
    args = parser.parse_args(arguments[:1])
    module_name, _ = VERBS[args.verb]
    return run_module(module_name, f"rung {args.verb}", arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
