"""Analysis of descriptors, linear baselines and energy surfaces; nothing here is needed to train or to predict.

In: datasets and checkpoints. Out: reports. The room is laid out and holds no modules yet: functional independence of
invariants, ACE descriptors, linear baselines, the linear-or-not diagnosis and smoothness scans belong here.
"""
