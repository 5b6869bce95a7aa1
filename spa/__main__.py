"""`python -m spa` is the command `spa`."""

from __future__ import annotations

import sys

from spa.cli import main

sys.exit(main())
