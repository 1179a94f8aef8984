"""What only a fresh process shows: settings that are read once, imports, what is printed."""

from __future__ import annotations

import os
import subprocess
import sys


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these environment variables besides ours."""
    command, environment = [sys.executable, *arguments], os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
