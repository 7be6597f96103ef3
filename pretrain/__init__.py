"""Pretraining: one potential from many datasets and fidelities, on any number of ranks.

In: a config (YAML) that names tasks, datasets' fidelities. Out: a folder with metrics, training state and a checkpoint.

    config.py      what a user chooses            plan.py        what follows from it and the manifests
    cli.py         `rung pretrain`                exit_status.py how a run ends
    loop.py        log, evaluate, save, export    interval.py    what a log interval adds up
    rounds.py      joint and Reptile rounds       schedule.py    learning rate and tasks, pure functions
    step.py        energies, forces and loss      reptile.py     the outer step on tensors
    engine.py      DeepSpeed, and only here       ema.py         averaged weights
    optimizer.py   soap, adamw, muon: soap.py, eigenbasis.py, muon.py
    world.py       task groups x data ranks       ranks.py       process groups: traffic.py, partition.py
    rendezvous.py  who and where a rank is, from the launcher's variables: slurm.py, network.py, roll_call.py
    launcher.py    --ranks N on this machine      interrupt.py   the polite stop
    state.py       what is saved and put back     store.py       written by threads: state_folder.py, state_search.py
    evaluation.py  errors per task, the criterion metrics.py     records: sinks.py, console.py, stopwatch.py
    costs.py       bytes and memory, predicted    bench.py       measured: bench_ranks.py, bench_optimizer.py
    configs/       configs by name
"""
