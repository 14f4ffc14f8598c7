"""Steps of a pretraining without a run folder."""

from __future__ import annotations

import runpy

from tests.places import ROOT

Stepper = runpy.run_path(str(ROOT / "benchmarks" / "stepper.py"))["Stepper"]
