"""Carry a pretrained potential to a new level of theory with a small set of energies.

In: a checkpoint and a few dozen to a few thousand structures with energies (forces are optional) at one fidelity.
Out: a checkpoint that knows the new fidelity, with error bars, and a report (text, JSON, HTML, plots) that measures
what was gained and lost. Labels are rows: total energies of structures, or relative energies of reactions.

config.py       every setting, with its default
dataset.py      the target rows: reading, splits by molecule, folds
checks.py       duplicates, wrong units and outlying energies, each named
elements.py     new elements, from their neighbours in the periodic table
reference.py    the parent fidelity and the shift of the reference energies; the step-0 identity
ridge.py        Bayesian ridge regression of the read-outs, in closed form: strategy `ridge`, and where others start
adapt.py        strategies with gradient steps: which numbers are trained, and how they start
objective.py    batches of rows and their loss
train.py        the loop: optimizer, schedule, averaging, early stopping
replay.py       structures of other fidelities that are mixed into the batches
recipe.py       one fit or a cross-validation of it; the scratch baseline is a recipe too
auto.py         strategy `auto`
calibration.py  predicted standard deviations beside errors
measure.py      errors of rows, forgetting, and the drift of the predictions
breakdown.py    every judged row before and after; errors by element and by size
report.py       JSON and text; writes everything; page.py: the page's sections; html.py: its pieces; plots.py: figures
save.py         the checkpoint, with the digests of what it was made from
pipeline.py     `finetune(config)`: all of the above in order
cli.py          `rung finetune`
"""
