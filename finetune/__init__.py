"""Carry a pretrained potential to a new level of theory with a small set of energies.

In: a checkpoint and a few dozen to a few thousand structures with energies (forces are optional) at one fidelity.
Out: a checkpoint that knows the new fidelity, and a report (text, JSON, plots) that measures what was gained and lost.

config.py     every setting, with its default
dataset.py    the target structures: reading, splits by molecule, folds
checks.py     duplicates, wrong units and outlying energies, each named
reference.py  the parent fidelity and the shift of the reference energies; the step-0 identity
adapt.py      strategies: which numbers of the potential are trained, and how they start
train.py      the loop: optimizer, schedule, averaging, early stopping
replay.py     structures of the pretraining fidelities that are mixed into the batches
recipe.py     one fit or a cross-validation of it; the scratch baseline is a recipe too
measure.py    forgetting, and the drift of the predictions
report.py     the measured tables, as text and JSON
plots.py      learning curve and parity plots
save.py       the checkpoint, with the digests of what it was made from
pipeline.py   `finetune(config)`: all of the above in order
cli.py        `rung finetune`
"""
