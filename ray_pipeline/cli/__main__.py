"""`python -m ray_pipeline.cli`, the same as the installed `ray-pipeline`."""

import sys

from ray_pipeline.cli import main

sys.exit(main())
