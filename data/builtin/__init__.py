"""The built-in dataset: shards and `dataset.yaml`, read as `builtin`; README.md beside this file is its data card."""
