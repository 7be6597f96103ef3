"""Readers of data in other formats: each yields `Structure` records and refuses what it cannot read.

ase_file.py   extxyz and any other file that ASE reads
"""
