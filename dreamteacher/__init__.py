"""DreamTeacher: pretraining image backbones with deep generative models (ICCV 2023), an independent implementation.

    import dreamteacher as dt

    run = dt.pretrain(images="photos", out="runs/x", teacher="chest-xray-64", student="resnet18")
    run.backbone()
    run.evaluate(train="train", test="test").table()
    run.export("backbone")

Everything is found here and imported when it is asked for: `import dreamteacher` alone imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dreamteacher.distill.config import MakeFeaturesConfig as MakeFeaturesConfig
    from dreamteacher.distill.config import MakeLabelsConfig as MakeLabelsConfig
    from dreamteacher.distill.config import PretrainConfig as PretrainConfig
    from dreamteacher.distill.config import TrainInterpreterConfig as TrainInterpreterConfig
    from dreamteacher.downstream.config import EvaluateConfig as EvaluateConfig
    from dreamteacher.exports.config import ExportConfig as ExportConfig
    from dreamteacher.face.parts import list_teachers as list_teachers
    from dreamteacher.face.parts import load_images as load_images
    from dreamteacher.face.parts import load_teacher as load_teacher
    from dreamteacher.face.parts import show_features as show_features
    from dreamteacher.face.verbs import Evaluation as Evaluation
    from dreamteacher.face.verbs import Export as Export
    from dreamteacher.face.verbs import Features as Features
    from dreamteacher.face.verbs import Inspection as Inspection
    from dreamteacher.face.verbs import InterpreterFolder as InterpreterFolder
    from dreamteacher.face.verbs import Labels as Labels
    from dreamteacher.face.verbs import Run as Run
    from dreamteacher.face.verbs import TeacherFolder as TeacherFolder
    from dreamteacher.face.verbs import evaluate as evaluate
    from dreamteacher.face.verbs import export as export
    from dreamteacher.face.verbs import get_teacher as get_teacher
    from dreamteacher.face.verbs import inspect as inspect
    from dreamteacher.face.verbs import make_features as make_features
    from dreamteacher.face.verbs import make_labels as make_labels
    from dreamteacher.face.verbs import pretrain as pretrain
    from dreamteacher.face.verbs import report as report
    from dreamteacher.face.verbs import train_interpreter as train_interpreter
    from dreamteacher.face.verbs import train_teacher as train_teacher
    from dreamteacher.losses import feature_loss as feature_loss
    from dreamteacher.losses import interpreter_loss as interpreter_loss
    from dreamteacher.losses import label_distillation as label_distillation
    from dreamteacher.models.interpreter import Interpreter as Interpreter
    from dreamteacher.models.regressor import FeatureRegressor as FeatureRegressor
    from dreamteacher.models.student import Student as Student
    from dreamteacher.models.student import create_student as create_student
    from dreamteacher.reports.config import InspectConfig as InspectConfig
    from dreamteacher.reports.config import ReportConfig as ReportConfig
    from dreamteacher.runtime.errors import UserError as UserError
    from dreamteacher.spec import FeatureSpec as FeatureSpec
    from dreamteacher.teachers.base import Teacher as Teacher
    from dreamteacher.teachers.module import ModuleTeacher as ModuleTeacher
    from dreamteacher.teachers.published.config import GetTeacherConfig as GetTeacherConfig
    from dreamteacher.teachers.training.config import TrainTeacherConfig as TrainTeacherConfig

# Module -> what of it is offered here; the imports above say the same to those who only read.
_OFFERED = {
    "face.verbs": (
        "pretrain", "train_teacher", "train_interpreter", "get_teacher", "make_features", "make_labels", "evaluate",
        "export", "report", "inspect", "Run", "TeacherFolder", "InterpreterFolder", "Features", "Labels",
        "Evaluation", "Export", "Inspection",
    ),
    "face.parts": ("load_teacher", "list_teachers", "load_images", "show_features"),
    "models.student": ("Student", "create_student"),
    "models.regressor": ("FeatureRegressor",),
    "models.interpreter": ("Interpreter",),
    "teachers.base": ("Teacher",),
    "teachers.module": ("ModuleTeacher",),
    "losses": ("feature_loss", "interpreter_loss", "label_distillation"),
    "spec": ("FeatureSpec",),
    "runtime.errors": ("UserError",),
    "distill.config": ("PretrainConfig", "TrainInterpreterConfig", "MakeFeaturesConfig", "MakeLabelsConfig"),
    "downstream.config": ("EvaluateConfig",),
    "exports.config": ("ExportConfig",),
    "reports.config": ("ReportConfig", "InspectConfig"),
    "teachers.published.config": ("GetTeacherConfig",),
    "teachers.training.config": ("TrainTeacherConfig",),
}  # fmt: skip
_PLACES = {name: module for module, names in _OFFERED.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dreamteacher' has no attribute '{name}'", name=name, obj=None)
    value = getattr(importlib.import_module(f"dreamteacher.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
