import sys

from em_kernels.cli.main import main

sys.exit(main())
