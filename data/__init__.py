"""Labelled structures: from quantum chemistry or files, through shards, to the batches that training reads.

In: structures with energies, forces, stress and dipoles at any number of fidelities (levels of theory).
Out: datasets (shards of packs and a manifest `dataset.yaml`), resumable streams, batches with their neighbour graph.
Units are eV and angstrom throughout. Nothing here imports another package of ours.

    structure.py         Structure and Labels: the record that everything reads and writes; `validate`
    fidelity.py          Fidelity: one level of theory and its name
    pack.py              Pack: many structures as flat arrays in safetensors bytes
    shard.py             tar files of packs, deterministic and written beside
    manifest.py          Manifest: `dataset.yaml`; `resolve_dataset` (a folder, or `builtin`)
    split.py             groups (molecules) to train, val, test by hash
    reference_energy.py  E0 fits on composition; energies that do not fit
    build.py             structures -> split -> shards and manifest
    verify.py            a dataset held to its digests and counts
    report.py            what `rung data inspect` prints
    read.py              structures of a dataset or of a file
    sources/             readers of other formats: one file per format
    generate/            label engine: molecules, sampling, quantum chemistry (needs `rung[generate]`)
    builtin/             the built-in dataset
    graph.py             neighbour graph of one structure (CSR, reverse edges)
    batch.py             Batch: structures concatenated for one step, with their graph; `collate`, budgets
    stream.py            endless, resumable stream of the structures of one task on one rank
    mixing.py            tasks and their weights; one stream out of many
    loader.py            endless batches out of streams, in worker processes
    cli.py               `rung data build | inspect | verify | generate`
"""
