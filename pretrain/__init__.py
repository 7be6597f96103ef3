"""Pretraining: one potential from many datasets and fidelities, on any number of ranks.

In: a config (YAML) that names tasks, datasets' fidelities. Out: a folder with metrics, training state and a checkpoint.

    config.py      what a user chooses            plan.py        what follows from it and the manifests
    cli.py         `rung pretrain`                loop.py        rounds; log, evaluate, save, export
    rounds.py      joint and Reptile rounds       step.py        one step's energies, forces and loss as a module
    engine.py      DeepSpeed, and only here       ranks.py       the group of all ranks, with time-outs
    reptile.py     the outer update on tensors    schedule.py    learning rate and drawn tasks, pure functions
    optimizer.py   SOAP and AdamW                 ema.py         averaged weights
    state.py       save and resume, bit-exact     evaluation.py  errors per task on unseen structures
    metrics.py     TensorBoard, CSV, JSONL, bar   interrupt.py   the polite stop
    launcher.py    --ranks N on this machine
    configs/       configs by name
"""
