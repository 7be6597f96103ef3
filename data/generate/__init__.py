"""The label engine: molecules -> off-equilibrium structures -> labels at six levels of theory -> a dataset.

In: SMILES and a plan (labels per level). Out: a resumable label store and, from it, shards with a manifest.
Needs the extra `rung[generate]` (rdkit, tblite, pyscf); nothing else in Rung imports this package but the command line.

molecules.py  which molecules            store.py   the SQLite store of results
sampling.py   structures of a molecule   workers.py processes that may crash or hang
levels.py     the levels of theory       engine.py  the plan and the run
cli.py        rung data generate         export.py  store -> shards, manifest, data card
"""
