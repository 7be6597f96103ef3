"""The `rung` command and everything that starts a run.

In: a command line. Out: the verb's package does the work; this package only finds it and reports errors.

    cli.py         the `rung` command: verbs, each imported lazily
    plan.py        `rung plan`: predict memory, step time, communication and cost on a cluster
    predict.py     ... the model behind it; measure.py: a machine's constants for it
    clusters/      ... descriptions of clusters, and what of them was measured
    quickstart.py  `make quickstart`: pretrain, fine-tune and compare on the built-in data
    check.py       `rung check`, the pre-flight on every rank; its checks are in
                   check_software.py, check_network.py, check_data.py, check_memory.py, how they work in check_site.py
    supervise.py   runs a training command until it has finished, whatever dies on the way
    templates/     one commented job script for each launcher: deepspeed, mpirun, Slurm, torchrun
    env.sh         environment variables that every launcher should set (sourced by the Makefile and the templates)
"""
