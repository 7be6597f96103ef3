"""The `rung` command and everything that starts a run.

In: a command line. Out: the verb's package does the work; this package only finds it and reports errors.

    cli.py         the `rung` command: verbs, each imported lazily
    quickstart.py  `make quickstart`: pretrain, fine-tune and compare on the built-in data
    env.sh         environment variables that every launcher should set (sourced by the Makefile)
"""
