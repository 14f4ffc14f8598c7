"""Words that the settings of several verbs take."""

from __future__ import annotations

from typing import Literal

OptimizerName = Literal["adamw", "lamb"]


Sharding = Literal["none", "student", "teacher", "both"]


BatchNorm = Literal["global", "local"]


Precision = Literal["auto", "float32", "bfloat16"]


Compile = Literal["auto", "on", "off"]


LoggerName = Literal["tensorboard", "wandb", "mlflow"]
