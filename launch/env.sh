# Source this before starting Rung: `. launch/env.sh`. The Makefile does; cluster scripts should too.

# The current directory stays off sys.path: from the repository's root `import data` would load a second copy of rung.data.
export PYTHONSAFEPATH=1

# glibc returns large temporaries to the system and faults them in again at every step, several times slower on the CPU.
export MALLOC_MMAP_THRESHOLD_=4294967296
export MALLOC_TRIM_THRESHOLD_=8589934592
export MALLOC_TOP_PAD_=1073741824
