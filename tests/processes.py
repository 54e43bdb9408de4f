"""Processes that tests start."""

import subprocess


def printed_by(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the process has printed until its end. One that does not end in time is killed, and the test fails."""
    try:
        return process.communicate(timeout=300)
    finally:
        process.kill()
