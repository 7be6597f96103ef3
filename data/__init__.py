"""Labelled structures: from quantum chemistry or files, through shards, to the batches that training reads.

In: structures with energies, forces, stress and dipoles at any number of fidelities (levels of theory).
Out: datasets (shards of packs and a manifest `dataset.yaml`), resumable streams, batches with their neighbour graph.
Units are eV and angstrom throughout. Nothing here imports another package of ours.

What travels
    structure.py         Structure and Labels: one structure; `validate`
    table.py             StructureTable: many structures as flat arrays, the form of everything below
    fidelity.py          Fidelity: one level of theory and its name
    reaction.py          Reaction: an energy of a linear combination of structures
    units.py             factors to eV and angstrom

From files to a dataset
    sources/             readers of public datasets and formats: one file each; the registry that names them
    build.py             a source's parts -> validate -> split -> shards and manifest; parallel, resumable
    parallel.py          the same map on one process, on several, or on the ranks of mpirun
    spill.py             what the first pass of a build leaves for the second
    unfinished.py        what a build leaves while it is unfinished: records, digests, whose work it is
    statistics.py        samples and sums behind what a manifest states of labels
    tally.py             what is counted of a shard while it is written
    describe.py          the manifest of a build from its records
    reference_energy.py  E0 fits on composition; energies that do not fit
    split.py             groups (molecules) to train, val, test by hash
    generate/            label engine: molecules, sampling, quantum chemistry (needs `rung[generate]`)
    builtin/             the built-in dataset

On disk
    pack.py              a table in safetensors bytes
    tar.py               a strict reader of tars: what a stranger's shard may be
    shard.py             tar files of packs, deterministic and written beside
    manifest.py          Manifest: `dataset.yaml`; `resolve_dataset` (a folder, or `builtin`)
    fetch.py             shards over http(s) or from a command
    cache.py             where fetched shards are kept on this machine, within a bound
    read.py              all structures of a dataset or of a file
    reaction_file.py     tables of relative energies, YAML and CSV; reaction_row: one row, checked;
                         reaction_geometry: the geometries that they name; gmtkn55: folders in that set's layout
    verify.py            a dataset held to its digests and counts
    report/              what `rung data inspect` finds: labels, outliers, leakage, signs and units

Into training
    dealing.py           which positions of an epoch each consumer reads: arithmetic, also when the world changes
    stream.py            endless, resumable stream of the structures of one task on one consumer
    mixing.py            tasks and their weights; one stream out of many
    graph.py             neighbour graphs (CSR, reverse edges)
    batch.py             Batch: structures concatenated for one step, with their graph; `collate`, budgets
    loader.py            endless batches out of streams, in worker processes

    bench.py             `python -m rung.data.bench`: throughput as JSON lines
    cli.py               `rung data build | sources | inspect | verify | generate`
"""
