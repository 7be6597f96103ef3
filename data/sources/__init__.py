"""Readers of public datasets and of formats: files to tables of structures, in eV and angstrom.

A reader is one file with one class that extends Source. It refuses what it cannot read, by name.

    source.py       what a reader is: Source, SourceInfo, Part; how files are cut into parts
    registry.py     readers by name, those of other packages too; options given as text
    common.py       tables of a good size, of labelled structures alone; keys and formulas
    hdf5.py         HDF5 files: groups and datasets, checked and named in errors
    npz.py          npz and npy files by rows, without unpickling
    archive.py      many small files from a folder, a zip or a tar
    json_stream.py  JSON files larger than memory, value by value
    records.py      records of JSON, ASE and pymatgen as arrays
    memory.py       structures in memory as a source

Formats:

    ase_file.py     extxyz and any other file that ASE reads
    aselmdb.py      ASE databases in LMDB, and of them OMol25, OMat24 and OC20
    deepmd.py       DeePMD-kit npy systems
    qcschema.py     QCSchema results (QCEngine, QCArchive)

Datasets:

    aimnet2.py      AIMNet2
    ani1x.py        ANI-1x and ANI-1ccx
    ani2x.py        ANI-2x
    geom.py         GEOM
    matpes.py       MatPES
    md17.py         MD17, revised MD17 and MD22
    mptrj.py        MPtrj
    multixcqm9.py   MultiXC-QM9
    pyanitools.py   ANI-1 and COMP6
    qm7x.py         QM7-X
    qm9.py          QM9
    qmugs.py        QMugs
    spice.py        SPICE
    transition1x.py Transition1x
"""
