# SPDX-License-Identifier: Apache-2.0
"""``python -m optpoline.cli`` is ``optpoline``."""

import sys

from optpoline.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
