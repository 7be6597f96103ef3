import sys

from rung.launch.cli import main

sys.exit(main())
