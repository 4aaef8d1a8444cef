"""What is for a GPU runs on the CPU too, on the bundled model: its tests and its benchmark do not rot."""

from __future__ import annotations

import os
import subprocess
import sys

from p2p.tests.conftest import ROOT

LAWS = "law_2 or law_5 or faded or tolerance"
"""A part that goes through the tests' every helper."""


def output_of(*command: str) -> str:
    env = {**os.environ, "P2P_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_of_a_gpu_pass_on_the_cpu():
    assert " passed" in output_of("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-k", LAWS)


def test_the_benchmark_of_a_gpu_has_its_tables_on_the_cpu():
    small = ["--model", "bundled", "--dtype", "float32", "--size", "32", "--rounds", "1", "--steps", "1"]
    page = output_of("benchmarks/gpu.py", "--device", "cpu", *small)
    for row in ("| plain batch |", "| swap, mutual |", "| swap, maps |", "| further edit |"):
        assert row in page
