# Source this before starting Rung: `. launch/env.sh`. The Makefile does; cluster scripts should too.

# The current directory stays off sys.path: from the repository's root `import data` would load a second copy of rung.data.
export PYTHONSAFEPATH=1
